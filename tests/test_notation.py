"""docs/design/notation.md against the sources: every table marked as checked has their names, in their order."""

import ast
import importlib
import re
from pathlib import Path

import pytest

from kdops import _checks, _cuda, _norm, _op

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "design" / "notation.md"
pytestmark = pytest.mark.skipif(not DOCUMENT.exists(), reason="needs a source checkout")

CPU, CPU_CODES = "csrc/cpu/{}_loss.cpp", "csrc/cpu/problem.h"
CUDA, CUDA_REDUCTION, CUDA_DTYPE = "csrc/cuda/problem.h", "csrc/cuda/call.h", "csrc/cuda/kernels.h"
STRIP = "csrc/cpu/strip.h"
TRITON_STATISTICS = {"cwd": "kdops/_triton/cwd_rows.py", "pkd": "kdops/_triton/pkd_kernels.py"}
TILES = "kdops/_triton/tiles.py"


def checked_table(heading):
    """The rows of the table below a heading, by column: the code, and a name in backticks or None."""
    text = DOCUMENT.read_text().split(f"### {heading} (checked)\n", 1)[1]
    table = re.search(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)[0].splitlines()
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table)
    codes = [int(row[0]) for row in rows]
    names = {column: [row[header.index(column)].strip("`") or None for row in rows] for column in header[1:]}
    return codes, names


def enum(path, name):
    """The members of a C++ enum with their values."""
    body = re.search(rf"enum {name}\b[^{{;]*{{(.*?)}};", (ROOT / path).read_text(), flags=re.DOTALL)[1]
    members, value = {}, -1
    for entry in re.sub(r"//.*", "", body).split(","):
        if entry.strip():
            member, _, given = (part.strip() for part in entry.partition("="))
            value = int(given) if given else value + 1
            members[member] = value
    return members


def triton_constants(path):
    """The integers that a module of device code names: NAME = tl.constexpr(1), in tuples too."""
    constants = {}
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, ast.Assign):
            target, value = node.targets[0], node.value
            pairs = zip(target.elts, value.elts) if isinstance(target, ast.Tuple) else [(target, value)]
            for name, call in pairs:
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "tl.constexpr":
                    constants[name.id] = ast.literal_eval(call.args[0]) if is_integer(call.args[0]) else None
    return {name: value for name, value in constants.items() if value is not None}


def is_integer(node):
    return isinstance(node, ast.Constant) and isinstance(node.value, int)


@pytest.mark.parametrize("loss", ["cwd", "pkd"])
def test_saved_statistics(loss):
    codes, names = checked_table(f"Saved statistics of {loss.upper()}")
    count, name = len(codes), loss.capitalize()
    assert codes == list(range(count))
    assert enum(CPU.format(loss), "Stat") == dict(zip([*names["CPU"], "kStats"], range(count + 1)))
    assert enum(CUDA, f"{name}Stat") == dict(zip([*names["CUDA"], f"k{name}Stats"], range(count + 1)))
    constants = triton_constants(TRITON_STATISTICS[loss])
    public = {key: value for key, value in constants.items() if not key.startswith("_")}
    assert public == dict(zip(names["Triton"], codes))
    assert importlib.import_module(f"kdops.{loss}_loss")._fused.fields == count
    launcher = (ROOT / f"kdops/_triton/{loss}_loss.py").read_text()
    assert int(re.search(r"^STATS_FIELDS = (\d+)$", launcher, flags=re.MULTILINE)[1]) == count


def test_the_level_table():
    codes, names = checked_table("Level table of Triton")
    public = {key: value for key, value in triton_constants(TILES).items() if not key.startswith("_")}
    assert public == dict(zip(names["Triton"], codes))


CODES = {
    "Normalisation": {
        "Python": {repr(k).replace("'", '"'): v for k, v in _norm.CODES.items()},
        "CPU": (CPU_CODES, "Norm"),
        "CUDA": (CUDA, "Norm"),
    },
    "Reduction": {
        "Python": {f'"{k}"': v for k, v in _checks.REDUCTIONS.items()},
        "CPU": (CPU_CODES, "Reduction"),
        "CUDA": (CUDA_REDUCTION, "Reduction"),
    },
    "What the forward saves": {
        "Python": {x.name: x.value for x in _op.Save if x != _op.Save.BOTH},
        "CPU": (CPU_CODES, "Save"),
        "CUDA": (CUDA_REDUCTION, "Save"),
    },
    "Path of a GPU call": {"Python": {x.name: x.value for x in _cuda.Path}, "CUDA": (CUDA, "Path")},
    "Element type": {"CPU": (STRIP, "Dtype"), "CUDA": (CUDA_DTYPE, "Dtype")},
    "What lies in neighbouring lanes": {"CPU": (STRIP, "Lanes")},
}


@pytest.mark.parametrize("heading", CODES)
def test_codes(heading):
    codes, names = checked_table(heading)
    assert set(names) == {"name", *CODES[heading]}
    for column, source in CODES[heading].items():
        members = source if isinstance(source, dict) else enum(*source)
        documented = {name: code for name, code in zip(names[column], codes) if name is not None}
        assert members == documented, column


def test_every_checked_table_is_checked():
    headings = re.findall(r"^### (.*) \(checked\)$", DOCUMENT.read_text(), flags=re.MULTILINE)
    known = {"Saved statistics of CWD", "Saved statistics of PKD", "Level table of Triton", *CODES}
    assert set(headings) == known and len(headings) == len(known)
