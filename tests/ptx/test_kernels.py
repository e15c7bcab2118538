"""The project's own kernels as PTX for sm_90: some cases of each of their tests. `make test-ptx` runs them all."""

import shutil
from pathlib import Path

import pytest
from triton_interpreter import run_pytest

from . import mode

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
        triton = pytest.importorskip("triton")
        if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 4):
            pytest.skip("the driver stands in for a GPU from Triton 3.4 on")
        run_pytest("--ptx=90", "--ptx-cases=3", *(str(TESTS / name) for name in TRITON))

    @pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
    def test_cuda_kernels():
        run_pytest("--ptx=90", "--ptx-cases=2", *(str(TESTS / name) for name in CUDA))
