"""What csrc/cuda/launch.cu queries and sets in the CUDA runtime, on a simulated one: no GPU, no launch."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent.parent
HEADERS = [p / "include" for p in (Path(cpp_extension.CUDA_HOME or "/"), Path("/usr/local/cuda"))]
HEADERS = [p for p in HEADERS if (p / "cuda_runtime.h").exists()]
COOPERATIVE_LAUNCH_TOO_LARGE, INVALID_VALUE = 720, 1

pytestmark = pytest.mark.skipif(not HEADERS, reason="CUDA's headers are not here")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    library = tmp_path_factory.mktemp("runtime") / "launch.so"
    # -Bsymbolic: its own runtime takes precedence over the real one, which PyTorch may have loaded.
    flags = "-x c++ -std=c++20 -O1 -shared -fPIC -pthread -Wl,-Bsymbolic".split()
    sources = [ROOT / "csrc/cuda/launch.cu", ROOT / "tests/cuda_shim/runtime.cpp"]
    command = [os.environ.get("CXX", "c++"), *flags, f"-I{HEADERS[0]}", f"-I{ROOT / 'csrc'}", *map(str, sources)]
    done = subprocess.run([*command, "-o", str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


@pytest.fixture
def runtime(built, tmp_path):
    """A separate copy for each test, since the results of queries are cached."""
    runtime = ctypes.CDLL(str(shutil.copy(built, tmp_path / "launch.so")))
    runtime.runtime_run.restype = ctypes.c_char_p
    return runtime


def test_shared_memory_is_allowed_once_and_in_full(runtime):
    """A limit set to the size of each launch would be wrong for another thread's launch in between."""
    for shared in (60 << 10, 200 << 10, 50 << 10, 0):
        assert runtime.runtime_run(shared, 1, 0) == b""
    assert runtime.runtime_run_from_threads(8, 50) == 0
    assert runtime.runtime_launches() == 4 + 8 * 50
    assert runtime.runtime_shared_set() == 1
    assert runtime.runtime_least_shared() == 227 << 10


@pytest.mark.parametrize(("ptx", "binary", "code"), [(90, 90, 90), (80, 90, 80), (80, 80, 80), (100, 100, 100)])
def test_architecture_of_the_code_and_not_of_the_device(ptx, binary, code, runtime):
    """PTX of sm_80 that the driver compiled for an H100 has no cluster barriers."""
    runtime.runtime_code(ptx, binary)
    assert runtime.runtime_code_architecture() == code
    assert runtime.runtime_run(0, 1, 0) == b""
    assert runtime.runtime_clusters_set() == (code >= 90)


def test_no_room_for_a_cooperative_launch_is_a_refusal(runtime):
    runtime.runtime_launches_give(COOPERATIVE_LAUNCH_TOO_LARGE)
    assert runtime.runtime_run(0, 1, 1).startswith(b"refused: the device has no room now for 256 blocks")
    runtime.runtime_launches_give(INVALID_VALUE)
    assert runtime.runtime_run(0, 1, 1) == b"error: kdops: launch: simulated error"
