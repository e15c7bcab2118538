"""Counts the kernels of training steps: interpreted as PTX, and read as machine code. A process of its own.

python -m ptx.count BACKEND ARCHITECTURE FILE [--quick]: rows go to FILE. `ptx.counters` starts it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from kdops import testing

from . import cubin, mode, sass
from .sheet import ARCHITECTURES, Row, Step, write

#: The architecture whose instructions are read, too.
MACHINE_CODE = 90
#: Of a loss by its name here: the operator and its options.
LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "cwd": ("cwd_loss", {"norm": None, "tau": 1.0}),
    "cwd-batch": ("cwd_loss", {"norm": "batch", "tau": 1.0}),
    "pkd": ("pkd_loss", {"norm": "pkd"}),
    "mgd": ("mgd_loss", {}),
}
SHAPES = {
    "20x20": ((2, 64, 20, 20),),
    "40x40": ((2, 64, 40, 40),),
    "80x80": ((2, 32, 80, 80),),
    "pyramid": ((2, 32, 50, 76), (2, 32, 25, 38), (2, 32, 13, 19)),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LAYOUTS = ("nchw", "channels_last")
#: Which ways of the CUDA kernels a map in NCHW takes.
WAYS = {
    "20x20": ("block",),
    "40x40": ("block", "cluster", "waves"),
    "80x80": ("cluster", "waves"),
    "pyramid": ("waves",),
}
#: What other architectures are asked about.
COMPILED = "40x40"
#: What make test counts.
QUICK = {
    ("40x40", "bf16", "nchw"),
    ("40x40", "bf16", "channels_last"),
    ("40x40", "fp32", "nchw"),
    ("pyramid", "bf16", "nchw"),
}
_STORE = re.compile(r"^(@!?%\w+\s+)?(st|red)\.")


def steps(architecture: int, quick: bool) -> Iterator[Step]:
    """Those to count, whatever the backend; quick: some of them."""
    for shape, loss, dtype, layout in itertools.product(SHAPES, LOSSES, DTYPES, LAYOUTS):
        chosen = shape == COMPILED or architecture == MACHINE_CODE
        if quick:
            chosen &= (shape, dtype, layout) in QUICK
        if chosen and not (loss == "mgd" and len(SHAPES[shape]) > 1):
            yield Step("", loss, shape, dtype, layout, architecture)


@dataclass
class Code:
    """A kernel as machine code."""

    resources: cubin.Resources
    function: sass.Function | None  # of the architecture that is read

    @cached_property
    def hot(self) -> list[sass.Code]:
        return self.function.hot() if self.function else []


def codes(machine_code: bytes, architecture: int) -> dict[str, Code]:
    """Every kernel by its symbol."""
    functions = sass.functions(cubin.listing(machine_code)) if architecture == MACHINE_CODE else {}
    return {name: Code(found, functions.get(name)) for name, found in cubin.resources(machine_code).items()}


def counted(results: list[Any], elements: int) -> dict[str, float]:
    """What the launches of a kernel did."""
    instructions = [i for result in results for i in result.instructions]
    writes = [i for i in instructions if _STORE.match(i["text"])]
    reads = [i for i in instructions if not _STORE.match(i["text"])]
    return {
        "launches": len(results),
        "instructions": round(32 * sum(result.steps for result in results) / elements, 2),
        "read_sectors": sum(i["sectors"] for i in reads),
        "read_least": sum(i["dense_sectors"] for i in reads),
        "written_sectors": sum(i["sectors"] for i in writes),
        "written_least": sum(i["dense_sectors"] for i in writes),
        "waves": sum(i["waves"] for i in instructions),
        "waves_least": sum(i["dense_waves"] for i in instructions),
    }


def compiled(found: list[Code], shared: int, pair: int) -> dict[str, float]:
    """What the machine code of a kernel needs, in the worst of its forms; pair: bytes of an element of both maps."""
    loops = [loop for code in found for loop in code.hot if loop.loads or loop.stores]
    of_pairs = [sum(len(x.instructions) * pair / sum(x.loads) for x in code.hot if x.loads) for code in found]
    worst = {
        "registers": max(code.resources.registers for code in found),
        "local_bytes": max(code.resources.local for code in found),
        "shared_bytes": shared + max(code.resources.shared for code in found),
        "loop_instructions": max(of_pairs) or None,
        "load_bytes": min((sum(x.loads) / len(x.loads) for x in loops if x.loads), default=None),
        "store_bytes": min((sum(x.stores) / len(x.stores) for x in loops if x.stores), default=None),
        "loads_in_flight": min((x.loads_in_flight for x in loops if x.loads_in_flight is not None), default=None),
    }
    return {name: round(value, 2) for name, value in worst.items() if value is not None}


def maps(step: Step) -> tuple[testing.Case, list, list, int]:
    """A case, its student's and teacher's maps, and how many elements a side has."""
    operator, options = LOSSES[step.loss]
    dtype = DTYPES[step.dtype]
    case = testing.Case(operator, options, SHAPES[step.shape], dtype, dtype, step.layout, step.layout)
    student, teacher = ([x.detach() for x in testing.as_list(side)] for side in case.inputs())
    return case, student, teacher, sum(x.numel() for x in student)


def row(step: Step, kernel: str, compiler: str, results: list, found: list[Code], elements: int) -> Row:
    """Of all launches of a kernel in a step."""
    shared = max(result.shared for result in results)
    pair = 2 * DTYPES[step.dtype].itemsize
    counters = counted(results, elements) | compiled(found, shared, pair)
    return Row(step, kernel, compiler, counters)


def only_compiled(made: Row) -> Row:
    """Without what its launches did."""
    kept = {name: value for name, value in made.counters.items() if name not in counted([], 1)}
    return replace(made, counters=kept)


def by_entry() -> dict[str, list[tuple[Any, Any]]]:
    """The launches since the last `mode.forget`: the module and the result of each."""
    found: dict[str, list] = {}
    for (module, entry, *_), result in zip(mode.launches, mode.results):
        found.setdefault(entry, []).append((module, result))
    return found


def run_on_triton(step: Step) -> int:
    """Forward and backward of a step; returns how many elements a map has."""
    from triton_interpreter import launcher, mgd_on_triton, parameters

    if step.loss == "mgd":
        ((n, c, h, w),) = SHAPES[step.shape]
        with mgd_on_triton():
            testing.MGDCase(c, c, (n, h, w), dtype=DTYPES[step.dtype], layout=step.layout).step().run()
        return n * c * h * w
    case, student, teacher, elements = maps(step)
    kernels, scalars = launcher(case.loss), parameters(case.loss, case.options, case.reduction)
    value, stats, _ = kernels.forward(student, teacher, *scalars, 1)
    kernels.backward(torch.ones_like(value), student, teacher, stats, *scalars)
    return elements


def triton_rows(architecture: int, quick: bool) -> Iterator[Row]:
    """Of Triton's kernels: what they do, and what Triton's own last stage makes of them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import compiler

    from . import driver

    backend = compiler.CUDABackend(GPUTarget("cuda", architecture, 32))
    options = backend.parse_options({})

    def code_of(ptx: str) -> Code:
        (code,) = codes(driver.make_cubin(backend, ptx, {}, options, architecture), architecture).values()
        return code

    made = []
    for step in steps(architecture, quick):
        mode.forget()
        elements = run_on_triton(step)
        made += [(step._replace(backend="triton"), entry, pairs, elements) for entry, pairs in by_entry().items()]
    texts = list({module.text for _, _, pairs, _ in made for module, _ in pairs})
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        code = dict(zip(texts, pool.map(code_of, texts)))
    for step, entry, pairs, elements in made:
        found = [code[text] for text in {module.text for module, _ in pairs}]
        results = [result for _, result in pairs]
        yield row(step, entry, f"triton {triton.__version__}", results, found, elements)


def cuda_rows(architecture: int, quick: bool) -> Iterator[Row]:
    """Of the CUDA kernels: what nvcc makes of them and, for sm_90, what they do."""
    import cuda_host as host

    from . import cuda

    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    compiler = "nvcc " + re.search(r"V([\d.]+)", said).group(1)
    target = f"sm_{architecture}" + "a" * (architecture == 90)
    code: dict[str, Code] = {}
    for text in cuda.texts(target):
        code |= codes(_assembled(text, target), architecture)
    shim = host.shim()
    shim.device(**host.H100)
    paths = {"block": host.BLOCK, "cluster": host.CLUSTER, "waves": host.WAVES, "lanes": host.CHANNELS_LAST}

    def run(step: Step, path: int, gradient: bool) -> int:
        case, student, teacher, elements = maps(step)
        save = host.GRADS if gradient else host.STATS
        value, stats, _ = host.forward(shim.ops, case, student, teacher, path, save)
        if not gradient:
            host.backward(shim.ops, case, torch.ones_like(value), student, teacher, stats, path)
        return elements

    left_out = ("mgd", "cwd") if quick else ("mgd",)  # without a normalisation the same kernels run
    for step in (x for x in steps(architecture, quick) if x.loss not in left_out):
        for way in WAYS[step.shape] if step.layout == "nchw" else ("lanes",):
            for gradient in (False, True):
                mode.forget()
                elements = run(step, paths[way], gradient)
                named = step._replace(backend=f"cuda-{way}" + "-gradient" * gradient)
                for entry, pairs in by_entry().items():
                    results = [result for _, result in pairs]
                    yield row(named, _kernel(entry), compiler, results, [code[entry]], elements)


def _assembled(ptx: str, target: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "kernels.ptx"), Path(folder, "kernels.cubin")
        source.write_text(ptx)
        subprocess.run(["nvcc", "-cubin", f"-arch={target}", str(source), "-o", str(out)], check=True)
        return out.read_bytes()


def _kernel(symbol: str) -> str:
    """cwd_channels for _ZN5kdops4cuda12cwd_channels..."""
    length, rest = re.match(r"_ZN5kdops4cuda(\d+)(\w+)", symbol).groups()
    return rest[: int(length)]


BACKENDS = {"triton": triton_rows, "cuda": cuda_rows}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("backend", choices=BACKENDS)
    parser.add_argument("architecture", type=int, choices=ARCHITECTURES)
    parser.add_argument("file", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    # The shim's simulated device is an H100: for others its kernels are only compiled.
    interpreted = options.architecture if options.backend == "triton" else 90
    mode.start(interpreted, {"count": True, "races": False})
    torch.set_num_threads(1)
    rows = BACKENDS[options.backend](options.architecture, options.quick)
    write((x if options.architecture == interpreted else only_compiled(x) for x in rows), options.file)


if __name__ == "__main__":
    main()
