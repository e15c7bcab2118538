"""Counts the kernels and compares with counters.csv: `PYTHONPATH=tests python -m ptx.counters`. README.md tells more.

Fails where a counter of the same compiler is worse than its limit; --write makes the fresh rows the stored ones.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

from . import sheet

RENEW = "PYTHONPATH=tests python -m ptx.counters --write"


def missing(backend: str) -> str | None:
    """Why a backend cannot be counted here."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if backend == "cuda":
        return "nvcc is not installed" if shutil.which("nvcc") is None else None
    old = tuple(map(int, version("triton").split(".")[:2])) < (3, 4)
    return "the driver stands in for a GPU from Triton 3.4 on" if old else None


def counted(backend: str, architecture: int, quick: bool = False) -> list[sheet.Row]:
    """Fresh rows, from a process in which kernels run as PTX."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.csv")
        command = [sys.executable, "-m", "ptx.count", backend, str(architecture), str(file)] + ["--quick"] * quick
        here = [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, here)), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        return sheet.read(file)


def text_of(changes: Sequence[sheet.Change]) -> str:
    """Changes step by step, a line each; what is beyond its limit is marked."""
    ordered = sorted(changes, key=lambda change: change.step)
    lines = []
    for step, each in groupby(ordered, key=lambda change: change.step):
        lines += [str(step), *(f"  {'!' if change.exceeds else ' '} {change}" for change in each)]
    return "\n".join(lines)


def failure(found: sheet.Comparison) -> str:
    """What to say where a counter has become worse."""
    return f"{text_of(found.failures)}\n{len(found.failures)} counters are worse; if that is right: {RENEW}"


def warning(found: sheet.Comparison) -> str:
    """What to say where other compilers have made the stored rows: nothing fails then."""
    head = f"counters not compared strictly: {found.differs}. {len(found.reports)} are beyond their limits"
    return "\n".join([head, text_of(sorted(found.reports, key=lambda x: -x.worse)[:10])])


def report(stored: list[sheet.Row], fresh: list[sheet.Row], word: str) -> tuple[str, bool]:
    """Old and new of all that differs, and whether it fails; word: only steps and kernels that contain it."""
    found = sheet.compare(stored, fresh)
    together = sheet.compare(sheet.totals(stored), sheet.totals(fresh))
    chosen = [x for x in [*together.all, *found.all] if word in f"{x.kernel} {x.step}"]
    lines = [text_of(chosen)] if chosen else []
    lines.append(f"{len(fresh)} rows, {len(found.all)} counters differ, {len(found.failures)} fail")
    lines += [found.differs] if found.differs else []
    lines += [f"if that is right: {RENEW}"] if found.failures else []
    return "\n".join(lines), bool(found.failures)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--architectures", type=int, nargs="+", choices=sheet.ARCHITECTURES, default=sheet.ARCHITECTURES
    )
    parser.add_argument("--backends", nargs="+", choices=("triton", "cuda"), default=("triton", "cuda"))
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--quick", action="store_true", help="only the steps that make test counts")
    how.add_argument("--write", action="store_true", help="store the fresh rows of these backends and architectures")
    parser.add_argument("-k", metavar="WORD", default="", help="show only kernels or steps that contain it")
    options = parser.parse_args()
    backends = [backend for backend in options.backends if not missing(backend)]
    for backend in set(options.backends) - set(backends):
        print(f"{backend} is left out: {missing(backend)}")
    which = [(backend, architecture) for backend in backends for architecture in options.architectures]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        fresh = [row for rows in pool.map(lambda x: counted(*x, options.quick), which) for row in rows]
    stored = sheet.read() if sheet.PATH.exists() else []
    text, failed = report(stored, fresh, options.k)
    print(text)
    if options.write:
        kept = (row for row in stored if (row.step.backend.partition("-")[0], row.step.architecture) not in which)
        sheet.write([*fresh, *kept])
        return 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
