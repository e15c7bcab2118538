"""Times the paths of the CUDA kernels, with the gradient in both places, beside Triton.

A step is forward and backward in a CUDA graph, on inputs that the cache has lost: the kernels' time without the host's.
The entries `faster_on` of `kdops._cuda.RULES` are to come from this file's CSV.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import agreement, memory, shapes, table, timing
from benchmarks.run import DISAGREES
from kdops import _cuda
from kdops.testing import Case, as_list

ROUTED = ("cwd_loss", "pkd_loss")
TRITON = "triton"
STATISTICS, IN_FORWARD = "gradient from statistics", "gradient in the forward"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_paths", description=__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="only workloads whose name contains TEXT")
    parser.add_argument("--replays", type=int, default=30, help="of each graph (default: 30)")
    parser.add_argument("--output", default=str(table.RESULTS), metavar="FOLDER")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu_paths: no GPU is seen")
    if not _cuda.built():
        raise SystemExit("benchmarks.gpu_paths: kdops._C was built without CUDA kernels")
    name = "-".join(torch.cuda.get_device_name().lower().split())
    path, stamp, rows = Path(options.output) / f"{name}_paths.csv", table.stamp("cuda"), []
    cases = [c for c in shapes.workloads("quick", "cuda") if c.loss in ROUTED and options.only in shapes.key(c)]
    for case in (progress := tqdm(cases, unit="workload")):
        progress.set_description(shapes.key(case))
        rows += [{**row, **stamp} for row in measured(case, options.replays)]
        table.write(path, rows)
    wrong = [row for row in rows if row["mode"] == DISAGREES]
    for row in wrong:
        print(f"{row['provider']} disagrees with the fp64 oracle on {row['shape']} {row['dtype']}: no time is reported")
    return 1 if wrong else 0


def measured(case: Case, replays: int) -> Iterator[table.Row]:
    """Rows of one workload: the providers that agree with the oracle, timed as whole steps."""
    student, teacher = case.inputs("cuda")
    inputs = shapes.elements(case) * case.student_dtype.itemsize * 2
    copies = [case.inputs("cuda", seed) for seed in range(timing.copies_beyond_l2(inputs))]
    oracle = agreement.Oracle(case, student, teacher)
    for name, forced in providers(case, student, teacher).items():
        with forced():
            errors = oracle.errors(name, case.call, student, teacher)
        row = {
            "op": case.loss,
            "options": shapes.options_text(case),
            "provider": name,
            "shape": shapes.shape_text(case),
            "dtype": shapes.dtype_text(case),
            "layout": case.student_layout,
            "value_error": f"{errors.value:.1e}",
            "gradient_error": f"{errors.gradient:.1e}",
        }
        if not errors.agree:
            yield {**row, "mode": DISAGREES}
            continue
        steps = [_step(forced, case, *maps) for maps in copies]
        times = timing.quantiles(timing.graph(steps, replays))._asdict()
        peak = str(memory.peak_above_inputs(steps[0], "cuda"))
        yield {**row, "mode": timing.GRAPH, "peak_bytes": peak, **{f"{q}_us": f"{t:.2f}" for q, t in times.items()}}


def providers(case: Case, student: Any, teacher: Any) -> dict[str, Callable[[], AbstractContextManager]]:
    """Triton, and every path that takes these maps, with the gradient in both places."""
    found: dict[str, Callable[[], AbstractContextManager]] = {TRITON: nullcontext}
    for path in _cuda.Path:
        if path == _cuda.Path.TRITON:
            continue
        if _cuda.refusal(case.loss, path, as_list(student), as_list(teacher)) is None:
            for place in (STATISTICS, IN_FORWARD):
                found[f"{path.name.lower()}, {place}"] = partial(_cuda.forced, path, place == IN_FORWARD)
    return found


def _step(forced: Callable[[], AbstractContextManager], case: Case, student: Any, teacher: Any) -> timing.Step:
    step = timing.Step(lambda: case.call(student, teacher), student)

    def call() -> Any:
        with forced():  # the backward too
            return step()

    return timing.Step(call)


if __name__ == "__main__":
    sys.exit(main())
