"""The CUDA sources compile and link for real GPUs, without one: no spills, registers within the planned occupancy."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("80", "90a", "100")
REGISTERS = 65536  # of a multiprocessor
THREADS = 256
# Blocks that should be resident on a multiprocessor, so that some load while others compute; four except for these.
PLANNED_BLOCKS = {"channels": 3, "backward": 3, "merge": 2}
KERNELS = {f"{loss}_{k}" for loss in ("cwd", "pkd") for k in ("channels", "backward", "lane_moments", "lane_gradient")}
KERNELS |= {"cwd_lane_merge", "cwd_lane_sums", "cwd_lane_finish", "pkd_lane_merge"}


def missing() -> str | None:
    if shutil.which("nvcc") is None:
        return "nvcc is not installed"
    if torch.version.cuda is None:
        return "PyTorch is not a CUDA build"
    release = re.search(r"release (\d+)", subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout)
    if release is None or release.group(1) != torch.version.cuda.split(".")[0]:
        return "nvcc and PyTorch are of different CUDA versions"
    return None


pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


def nvcc(*arguments: str) -> str:
    done = subprocess.run(["nvcc", "-std=c++20", *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The folder of objects, and the output of ptxas."""
    folder = tmp_path_factory.mktemp("cuda")
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    said = ""
    for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        output = str(folder / f"{source.stem}.cu.o")
        said += nvcc("-O3", "--threads=2", "-Xcompiler=-fPIC", *targets, "-Xptxas=-v", "-c", str(source), "-o", output)
    return folder, said


def kernels(said: str) -> list[tuple[str, str, int, int, int]]:
    """Of each kernel and architecture: stack and spilled bytes, registers."""
    entry = re.compile(
        r"Compiling entry function '(\w+)' for 'sm_(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        re.DOTALL,
    )
    return [(m[1], m[2], int(m[3]), int(m[4]) + int(m[5]), int(m[6])) for m in entry.finditer(said)]


def test_no_spills_and_registers_within_the_plan(compiled):
    found = kernels(compiled[1])
    for architecture in ARCHITECTURES:
        names = " ".join(name for name, of, *_ in found if of == architecture)
        assert all(kernel in names for kernel in KERNELS), architecture
    for name, architecture, stack, spilled, registers in found:
        assert (stack, spilled) == (0, 0), (name, architecture)
        blocks = next((b for part, b in PLANNED_BLOCKS.items() if part in name), 4)
        in_warps = -(-registers // 8) * 8  # registers are given out eight to a thread
        assert in_warps * THREADS * blocks <= REGISTERS, (name, architecture, registers)


@pytest.mark.parametrize("loss", ["cwd_loss", "pkd_loss"])
def test_code_without_clusters_traps_where_it_would_need_them(loss, tmp_path):
    """In a kernel for sm_80 a barrier that does nothing would silently give wrong results."""
    for architecture, barriers in (("80", False), ("90a", True)):
        ptx = tmp_path / f"{architecture}.ptx"
        nvcc("-ptx", "-O3", f"-arch=sm_{architecture}", f"csrc/cuda/{loss}.cu", "-o", str(ptx))
        entries = {text.split("(")[0]: text for text in ptx.read_text().split(".entry ")[1:]}
        on_chip = [text for name, text in entries.items() if "_channels" in name and "Lb1E" in name]
        assert len(on_chip) == 3  # element types
        for text in on_chip:
            assert ("barrier.cluster" in text) == barriers and ("trap;" in text) != barriers


def test_links_and_registers(compiled):
    """The library loads without a GPU, and its operators have CUDA kernels."""
    folder, _ = compiled
    includes = [f"-I{path}" for path in [ROOT / "csrc", *cpp_extension.include_paths()]]
    for source in sorted((ROOT / "csrc/cuda").glob("*.cpp")):
        nvcc("-O1", "-Xcompiler=-fPIC", *includes, "-c", str(source), "-o", str(folder / f"{source.stem}.o"))
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    libraries += ["-lc10", "-lc10_cuda", "-ltorch_cpu", "-ltorch", "-cudart", "shared"]
    library = folder / "kdops_cuda.so"
    nvcc("-shared", *map(str, folder.glob("*.o")), *libraries, "-o", str(library))
    script = f"""
import torch
torch.ops.load_library({str(library)!r})
for op in ("cwd_loss_cuda", "cwd_loss_backward_cuda", "pkd_loss_cuda", "pkd_loss_backward_cuda"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"kdops::{{op}}", "CUDA"), op
print("registered")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "registered", done.stderr
