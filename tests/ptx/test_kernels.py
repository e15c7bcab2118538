"""The project's own kernels as PTX for sm_90: some cases of each of their tests. `make test-ptx` runs them all."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from triton_interpreter import run_pytest

from . import counters, mode

TESTS = Path(__file__).resolve().parent.parent
TRITON = (
    "test_triton_cwd.py",
    "test_triton_pkd.py",
    "test_triton_mgd.py",
    "test_triton_accuracy.py",
    "ptx/test_launches.py",
    "ptx/test_mutations.py",
    "ptx/test_counters.py",
)
CUDA = ("test_cuda_paths.py", "test_cuda_precision.py", "ptx/test_rounding.py")

if mode.architecture is None:

    def test_triton_kernels():
        reason = counters.missing("triton")
        if reason:
            pytest.skip(reason)
        run_pytest("--ptx=90", "--ptx-cases=3", *(str(TESTS / name) for name in TRITON))

    @pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
    def test_cuda_kernels():
        run_pytest("--ptx=90", "--ptx-cases=2", *(str(TESTS / name) for name in CUDA))

    def test_memory_is_known_without_triton():
        """As with PyTorch's CPU builds, which bring none."""
        code = (
            "import sys; sys.modules['triton'] = None;"
            "from ptx import memory, mode; mode.start(90, {});"
            "import torch; x = torch.zeros(5);"
            "assert (x.data_ptr(), x.data_ptr() + 20) in memory.allocations()"
        )
        subprocess.run([sys.executable, "-c", code], cwd=TESTS, check=True)
