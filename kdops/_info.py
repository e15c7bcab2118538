"""The report of ``kdops info``: versions and devices for a bug report, and the kernel that each loss uses and why."""

from __future__ import annotations

import os
import pkgutil
import platform
from collections.abc import Iterator
from importlib import metadata

import torch

import kdops
from kdops import _extension, _op

__all__ = ["report"]


def report() -> str:
    """Return the report as text."""
    sections = (
        ("versions", _versions()),
        ("devices", _devices()),
        ("extension kdops._C", _built()),
        ("backends", _backends()),
    )
    return "\n\n".join("\n".join([title, *_aligned(rows)]) for title, rows in sections)


def losses() -> list[str]:
    """The losses' names: one module each."""
    return sorted(module.name for module in pkgutil.iter_modules(kdops.__path__) if module.name.endswith("_loss"))


def _versions() -> Iterator[tuple[str, str]]:
    yield "kdops", kdops.__version__
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    yield "torch", f"{torch.__version__}, {_torch_build()}"
    for package in ("triton", "torchvision", "numpy"):
        yield package, _installed(package)


def _torch_build() -> str:
    if torch.version.cuda is not None:
        return f"built for CUDA {torch.version.cuda}"
    return "built for ROCm" if torch.version.hip is not None else "built for the CPU only"


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> Iterator[tuple[str, str]]:
    yield "cpu", f"{_processor()}, {os.cpu_count()} logical cores, {torch.get_num_threads()} threads in PyTorch"
    if _extension.extension is not None:
        yield "", f"instruction sets: {', '.join(_extension.extension.instruction_sets())} (the first is used)"
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.1f} GiB"
    if not torch.cuda.is_available():
        yield "cuda", "PyTorch sees no GPU"


def _processor() -> str:
    """The processor's name, if the system provides it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _built() -> Iterator[tuple[str, str]]:
    info = _extension.build_info()
    if info is None:
        yield "not built", str(_op.unavailable(torch.device("cpu")))
        return
    yield from info.items()
    release = torch.__version__.split("+")[0]
    if info.get("torch", release) != release:
        yield "warning", f"it was built for torch {info['torch']}, and this is {release}: reinstall kdops"


def _backends() -> Iterator[tuple[str, str]]:
    devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cuda"]
    for device in ("cpu", *devices):
        for loss in losses():
            for number, line in enumerate(_backend(loss, torch.device(device))):
                yield ("" if number else f"{loss} on {device}"), line


def _backend(loss: str, device: torch.device) -> Iterator[str]:
    """What ``backend="auto"`` selects, then each alternative and why it is not selected."""
    reason = _op.unavailable(device) or _unregistered(loss, device)
    if device.type == "cuda" and not torch.cuda.is_available():
        yield "nothing to run on: PyTorch sees no GPU" + (f"; besides, {reason}" if reason else "")
    elif reason is None:
        yield f"fused: {_kernel(device)}"
        yield 'not the reference (eager PyTorch): backend="reference" asks for it'
    elif device.type == "cpu":
        yield "reference (eager PyTorch)"
        yield f"not fused: {reason}"
    else:
        yield f"none: {reason}"
        yield 'not the reference (eager PyTorch): backend="reference" asks for it'


def _unregistered(loss: str, device: torch.device) -> str | None:
    """Why the dispatcher lacks a kernel that should be there, or None if it has it."""
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"kdops::{loss}", device.type.upper()):
        return None
    return "no kernel is registered for it; kdops._C is older than this kdops: reinstall"


def _kernel(device: torch.device) -> str:
    if device.type == "cpu":
        return f"C++ kernel, {_extension.extension.instruction_sets()[0]}"
    return "Triton kernel"


def _aligned(rows: Iterator[tuple[str, str]]) -> list[str]:
    listed = list(rows)
    width = max((len(name) for name, _ in listed), default=0)
    return [f"  {name:{width}}  {value}" for name, value in listed]
