"""Builds the optional extension kdops._C, and prints what it builds and why.

CPU kernels always; CUDA kernels if PyTorch is a CUDA build, nvcc is found, and a GPU is found or FORCE_CUDA=1 is set.
Without PyTorch at build time (build isolation) or without a C++ compiler the package installs without the extension:
The GPU then uses Triton and the CPU the eager reference. KDOPS_REQUIRE_EXTENSION=1 makes that an error.
"""

from __future__ import annotations

import glob
import os
import shutil
import sys

from setuptools import find_packages, setup

REQUIRED = os.environ.get("KDOPS_REQUIRE_EXTENSION") == "1"


def say(text: str) -> None:
    print(f"kdops: {text}", file=sys.stderr, flush=True)


def without_extension(reason: str) -> dict:
    if REQUIRED:
        raise SystemExit(f"kdops: the extension was required, but {reason}")
    say(f"building without the extension kdops._C, as {reason}")
    return {}


def find_cuda() -> None:
    """Set CUDA_HOME if nvcc on the path is a link or a script, and the list of architectures if there is no GPU."""
    import torch

    nvcc = shutil.which("nvcc")
    beside = nvcc and os.path.exists(os.path.join(os.path.dirname(os.path.dirname(nvcc)), "include", "cuda_runtime.h"))
    if nvcc and not beside and os.path.exists("/usr/local/cuda/include/cuda_runtime.h"):
        os.environ.setdefault("CUDA_HOME", "/usr/local/cuda")
    if not torch.cuda.is_available():  # else PyTorch builds for the GPUs it finds
        newest = tuple(map(int, (torch.version.cuda or "0.0").split("."))) >= (12, 8)
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0a;10.0+PTX" if newest else "8.0+PTX;9.0a")


def cuda_sources() -> tuple[list[str], str]:
    """The CUDA sources to build, or none and the reason."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    sources = sorted(glob.glob("csrc/cuda/*.cu") + glob.glob("csrc/cuda/*.cpp"))
    if not sources:
        return [], "there are no CUDA sources"
    if torch.version.cuda is None:
        return [], f"PyTorch {torch.__version__} is not a CUDA build"
    if CUDA_HOME is None:
        return [], "nvcc was not found (CUDA_HOME)"
    if not torch.cuda.is_available() and os.environ.get("FORCE_CUDA") != "1":
        return [], "no GPU is seen (FORCE_CUDA=1 builds all the same)"
    return sources, ""


def extension_arguments() -> dict:
    try:
        import torch

        find_cuda()
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
    except ImportError:
        return without_extension("PyTorch is not importable at build time (use --no-build-isolation)")
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        return without_extension(f"the C++ compiler {compiler!r} was not found")

    class Build(BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:  # a failed build is reported, and the package installs without the extension
                if REQUIRED:
                    raise
                say(f"the extension did not build, going on without it: {error}")

    # libgomp is PyTorch's own, found when the extension is loaded: linking another would start a second thread pool.
    # GCC's own AVX-512 headers warn about registers they leave undefined on purpose.
    quiet = ["-Wno-ignored-attributes", "-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    flags = {"cxx": ["-O3", "-g0", "-fopenmp", "-fvisibility=hidden", *quiet]}
    sources = ["csrc/bindings.cpp", *sorted(glob.glob("csrc/cpu/*.cpp"))]
    headers = glob.glob("csrc/**/*.h", recursive=True) + glob.glob("csrc/**/*.cuh", recursive=True)
    from_cuda, reason = cuda_sources()
    if from_cuda:
        say(f"building kdops._C with CPU and CUDA {torch.version.cuda} kernels")
        flags["cxx"].append(f"-DKDOPS_CUDA={torch.version.cuda}")
        flags["nvcc"] = ["-O3", "--threads=2"]
        extension = CUDAExtension(
            "kdops._C", sources + from_cuda, include_dirs=["csrc"], extra_compile_args=flags, depends=headers
        )
    else:
        say(f"building kdops._C with CPU kernels; without CUDA kernels, as {reason}")
        extension = CppExtension("kdops._C", sources, extra_compile_args=flags["cxx"], depends=headers)
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


def packages() -> dict:
    """kdops, and the folder integrations/ as kdops.integrations."""
    inner = find_packages("integrations")
    return {
        "packages": [*find_packages(include=["kdops", "kdops.*"]), "kdops.integrations"]
        + [f"kdops.integrations.{name}" for name in inner],
        "package_dir": {"kdops.integrations": "integrations"},
        "package_data": {"kdops": ["py.typed"], "kdops.integrations": ["**/configs/**", "**/*.md"]},
    }


setup(**packages(), **extension_arguments())
