"""Compiles the Triton kernels that the tests' cases need, many at a time, into Triton's cache.

One process compiles one kernel after the other, and the cases need some two hundred. Each worker calls its share of
them on the GPU, so that the kernels are compiled exactly as the calls want them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

import torch

from kdops import testing


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.warm_triton", description=__doc__)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--share", type=int, help="be the worker of this number")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.warm_triton: no GPU is seen")
    if options.share is not None:
        return work(options.share, options.workers)
    start = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.warm_triton", "--workers", str(options.workers), "--share"]
    running = [subprocess.Popen([*command, str(share)]) for share in range(options.workers)]
    failed = sum(process.wait() != 0 for process in running)
    print(f"{options.workers} workers, {failed} of them failed, {time.perf_counter() - start:.0f} s")
    return 1 if failed else 0


def work(share: int, workers: int) -> int:
    """Every case of this share, forward and backward; a case that fails is left for the tests to show."""
    failed = 0
    for case in list(testing.cases())[share::workers]:
        try:
            student, teacher = case.inputs("cuda")
            values = testing.as_list(case.call(student, teacher))
            torch.autograd.grad(values, testing.as_list(student), [torch.ones_like(v) for v in values])
        except RuntimeError as error:
            failed += 1
            print(f"{case}: {error}", file=sys.stderr)
    torch.cuda.synchronize()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
