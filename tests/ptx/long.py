"""All tests of kernels as PTX: every architecture, in order, in random orders, with perturbed approximations.

python -m ptx.long [--architectures 80 90 100] [--seeds 2] [pytest's arguments]: without the latter, all counters too.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
MODULES = (
    *sorted(TESTS.glob("test_triton_*.py")),
    *(TESTS / "ptx" / f"test_{name}.py" for name in ("counters", "launches", "mutations", "rounding")),
    TESTS / "test_cuda_paths.py",
    TESTS / "test_cuda_precision.py",
)


def passes(seeds: int) -> list[list[str]]:
    """Options of a run over all tests: in order, then each seed with its own bound on turns and perturbed values."""
    return [[]] + [[f"--ptx-seed={s}", f"--ptx-quantum={10 * s}", "--ptx-perturb"] for s in range(1, seeds + 1)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--seeds", type=int, default=2)
    options, rest = parser.parse_known_args()
    failed = []
    for architecture in options.architectures:
        for more in passes(options.seeds):
            run = [f"--ptx={architecture}", *more]
            print(" ".join(run), flush=True)
            command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *run, *rest, *map(str, MODULES)]
            if subprocess.run(command).returncode:
                failed.append(" ".join(run))
    if not rest:
        command = [sys.executable, "-m", "ptx.counters", "--architectures", *map(str, options.architectures)]
        print("counters", flush=True)
        if subprocess.run(command).returncode:
            failed.append("counters")
    print("failed: " + "; ".join(failed) if failed else "all passed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
