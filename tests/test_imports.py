"""The import rules of the repository, and both ways of importing a loss."""

import ast
import subprocess
import sys
from pathlib import Path

import kdops

ROOT = Path(kdops.__file__).parent
LOSSES = {"cwd_loss", "pkd_loss", "mgd_loss"}


def imports(path):
    """Dotted names that a file imports from kdops or triton, wherever the statement stands."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {n for n in names if n.split(".")[0] in ("kdops", "triton")}


def test_imports_go_one_way():
    for path in ROOT.glob("*.py"):
        names = imports(path)
        if path.stem in LOSSES:
            others = LOSSES - {path.stem}
            assert not {n for n in names if n.split(".")[1] in others}, f"{path.name} imports another loss"
        if path.stem in ("_op", "_checks", "_norm", "_extension"):
            assert not {n for n in names if len(n.split(".")) > 1 and n.split(".")[1] in LOSSES | {"distill"}}, (
                path.name
            )
        if path.stem not in ("__init__", "cli", "__main__"):
            assert not {n for n in names if n.startswith("kdops.distill")}, path.name
        assert not {n for n in names if n.startswith("kdops._triton")}, f"{path.name} reaches _triton eagerly"


def test_only_the_triton_folder_imports_triton():
    inside = sorted((ROOT / "_triton").glob("*.py"))
    assert inside
    for path in ROOT.rglob("*.py"):
        names = imports(path)
        if path.parent.name == "_triton":
            outside = {n for n in names if n.startswith("kdops") and not n.startswith("kdops._triton")}
            assert not outside, f"_triton/{path.name} imports {outside}"
        else:
            assert not {n for n in names if n.startswith("triton")}, path.name


def test_annotations_of_kernels_are_no_strings():
    """Triton 3.0's interpreter does not see a tl.constexpr that is a string."""
    texts = {path.name: path.read_text() for path in (ROOT / "_triton").glob("*.py")}
    kernels = {name for name, text in texts.items() if "@triton.jit" in text}
    assert {"scale.py", "mgd_mask.py"} <= kernels
    assert not {name for name in kernels if "from __future__ import annotations" in texts[name]}


def test_distill_uses_public_losses():
    private = ("kdops._op", "kdops._extension", "kdops._triton", "kdops._norm")
    for path in (ROOT / "distill").glob("*.py"):
        assert not {n for n in imports(path) if n.startswith(private)}, path.name


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_both_import_forms():
    code = (
        "import torch, kdops.cwd_loss, kdops.pkd_loss; from kdops import cwd_loss; from kdops.cwd_loss import CWDLoss;"
        "s, t = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5);"
        "print(torch.equal(kdops.cwd_loss(s, t), cwd_loss(s, t)), bool(kdops.pkd_loss(s, t) > 0));"
        "print(CWDLoss is kdops.CWDLoss)"
    )
    assert run(code) .split() == ["True"] * 3


def test_import_is_light():
    heavy = ("triton", "matplotlib", "sklearn", "torchvision", "pandas")
    assert run(f"import sys, kdops; print([m for m in {heavy} if m in sys.modules])") == "[]"


def test_files_are_short():
    repository = ROOT.parent
    limits = {".py": 400, ".cpp": 500, ".h": 500, ".cu": 500, ".cuh": 500}
    folders = ("kdops", "csrc", "integrations", "benchmarks", "tests")
    files = [p for f in folders for p in (repository / f).rglob("*") if p.suffix in limits]
    assert len(files) > 20
    long = {
        str(p.relative_to(repository)): n for p in files if (n := len(p.read_text().splitlines())) > limits[p.suffix]
    }
    assert not long
