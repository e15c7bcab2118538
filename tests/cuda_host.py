"""The CUDA kernels on the CPU: builds them against the host shim and calls them as operators on CPU tensors.

With --ptx the shim keeps the host's side, and the kernels run as nvcc's PTX.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ptx import cuda, mode
from torch import Tensor
from torch.utils import cpp_extension

from kdops import testing

ROOT = Path(__file__).resolve().parent.parent
BLOCK, CLUSTER, WAVES, CHANNELS_LAST = 1, 2, 3, 4
#: The smallest bf16 maps for which every kind of synchronization between blocks occurs on an H100: clusters of 8
#: blocks, waves of groups of at least 3, each with several channels.
MEETING = {BLOCK: (2, 3, 20, 20), CLUSTER: (32, 2, 80, 80), WAVES: (4, 130, 80, 80), CHANNELS_LAST: (2, 130, 40, 41)}
H100 = {"architecture": 90, "multiprocessors": 132, "shared": 227 << 10, "l2": 50 << 20}


class LaunchRecord(NamedTuple):
    blocks: int
    cluster: int
    cooperative: int
    shared_bytes: int


class Shim:
    """The loaded library: operators under torch.ops.kdops_shim, and the simulated device."""

    def __init__(self, path: str) -> None:
        self._library = ctypes.CDLL(path)
        for name in ("shim_loaded", "shim_stored"):
            getattr(self._library, name).restype = ctypes.c_int64
        self._library.shim_launches.restype = ctypes.c_char_p
        self.ops = torch.ops.kdops_shim
        self._as_ptx = mode.architecture is not None
        if self._as_ptx:
            cuda.take_over(self._library)

    def device(
        self,
        architecture: int = 90,
        multiprocessors: int = 4,
        shared: int = 227 << 10,
        l2: int = 50 << 20,
        code: int | None = None,
        busy: int = 0,
    ) -> None:
        """``code``: the architecture that the kernels were compiled for; ``busy``: multiprocessors that others hold."""
        code = architecture if code is None else code
        self._library.shim_set_device(architecture, multiprocessors, shared, l2, code, busy)

    @contextmanager
    def planning(self) -> Iterator[None]:
        """Launches are recorded, but not run."""
        self._library.shim_plan_only(True)
        try:
            yield
        finally:
            self._library.shim_plan_only(False)

    def order(self, seed: int) -> None:
        """The order in which threads run: 0 first come first served, odd random, even with some blocks far ahead."""
        cuda.order(seed) if self._as_ptx else self._library.shim_set_order(seed)

    def reset(self) -> None:
        self._library.shim_reset()
        mode.forget()

    @property
    def bytes(self) -> tuple[int, int]:
        """Loaded from and stored to the maps since the last reset."""
        if self._as_ptx:
            return cuda.bytes_moved()
        return self._library.shim_loaded(), self._library.shim_stored()

    @property
    def launches(self) -> list[LaunchRecord]:
        text = self._library.shim_launches().decode()
        return [LaunchRecord(*map(int, launch.split(","))) for launch in text.split(";") if launch]


@lru_cache(maxsize=1)
def shim() -> Shim:
    """Builds the shim (half a minute the first time) and loads it."""
    sources = [ROOT / "csrc/cuda" / name for name in ("ops.cpp", "call.cpp", "plan.cpp")]
    sources += [ROOT / "tests/cuda_shim" / name for name in ("shim.cpp", "kernels.cpp")]
    path = cpp_extension.load(
        name="kdops_shim",
        sources=[str(s) for s in sources],
        extra_include_paths=[str(ROOT / "csrc"), str(ROOT / "tests/cuda_shim")],
        extra_cflags=["-O2", "-g0", "-DKDOPS_HOST_SHIM", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas"],
        is_python_module=False,
        is_standalone=False,
        verbose=False,
    )
    if path is None:  # PyTorch 2.4 loads the library and does not return its path
        path = str(Path(cpp_extension._get_build_directory("kdops_shim", False)) / "kdops_shim.so")
    return Shim(path)


NORMS = {None: (0, 0.0), "batch": (1, 1e-5), "pkd": (2, 1e-6)}
REDUCTIONS = {"mean": 0, "sum": 1, "none": 2}
NOTHING, STATS, GRADS = 0, 1, 2


def parameters(case: testing.Case) -> tuple:
    """The scalar arguments of a case's operator, in the order of its schema."""
    options = dict(case.options)
    norm, eps = NORMS[options.get("norm", "pkd" if case.loss == "pkd_loss" else None)]
    tail = (norm, options.get("eps") or eps, options.get("loss_weight", 1.0), REDUCTIONS[case.reduction])
    return tail if case.loss == "pkd_loss" else (options.get("tau", 1.0), *tail)


def forward(ops: Any, case: testing.Case, student: Any, teacher: Any, path: int, save: int) -> tuple:
    """Loss, statistics and gradients of a case on a path; ``ops`` is the shim's or torch.ops.kdops."""
    maps = [[x.detach() for x in testing.as_list(m)] for m in (student, teacher)]
    return getattr(ops, f"{case.loss}_cuda")(*maps, *parameters(case), save, path)


def backward(
    ops: Any, case: testing.Case, grad_output: Tensor, student: Any, teacher: Any, stats: Tensor, path: int
) -> list:
    """The gradients of a case from its statistics."""
    maps = [[x.detach() for x in testing.as_list(m)] for m in (student, teacher)]
    return getattr(ops, f"{case.loss}_backward_cuda")(grad_output, *maps, stats, *parameters(case), path)


def check(ops: Any, case: testing.Case, path: int, device: str = "cpu", seed: int = 0) -> None:
    """A case on a path against the fp64 oracle: value, and gradient in both places, within testing's budgets."""
    student, teacher = case.inputs(device, seed)
    loss, stats, grads = forward(ops, case, student, teacher, path, STATS)
    assert loss.dtype == torch.float32 and not grads
    generator = torch.Generator().manual_seed(seed + 1)
    half = case.student_dtype == torch.float16  # as under a GradScaler
    weights = torch.full(loss.shape, 65536.0) if half else torch.rand(loss.shape, generator=generator) + 0.5
    weights = weights.to(device)
    values, expected = oracle(case, student, teacher, weights)
    _compare(case, loss, backward(ops, case, weights, student, teacher, stats, path), values, expected, student)
    value_only, none, _ = forward(ops, case, student, teacher, path, NOTHING)
    assert torch.equal(value_only, loss) and none.numel() == 0
    if case.reduction != "none" and not half:
        loss, none, grads = forward(ops, case, student, teacher, path, GRADS)
        assert none.numel() == 0
        _compare(case, loss, grads, *oracle(case, student, teacher, torch.ones_like(loss)), student)


def oracle(case: testing.Case, student: Any, teacher: Any, weights: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The fp64 values in one tensor like the operator's, and the gradients."""
    if case.reduction != "none":
        values, gradients = case.oracle(student, teacher, weights)
        return values[0], gradients
    shapes = [s.shape[1:2] if case.loss == "pkd_loss" else s.shape[:2] for s in testing.as_list(student)]
    split = [w.view(shape) for w, shape in zip(weights.split([s.numel() for s in shapes]), shapes)]
    values, gradients = case.oracle(student, teacher, split)
    return torch.cat([v.flatten() for v in values]), gradients


def _compare(case: testing.Case, loss: Tensor, grads: list, values: Tensor, expected: list, student: Any) -> None:
    assert testing.relative_error(loss, values) <= testing.VALUE_BUDGET[case.student_dtype]
    assert len(grads) == len(expected)
    for g, e, s in zip(grads, expected, testing.as_list(student)):
        assert g.dtype == s.dtype and g.stride() == torch.empty_like(s).stride()
        assert testing.relative_error(g, e) <= testing.GRADIENT_BUDGET[case.student_dtype]
