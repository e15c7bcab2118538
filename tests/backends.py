"""The backends for random calls without a GPU, by name.

cpu            the public losses
interpreter    the Triton kernels in Triton's interpreter
triton80, 90, 100  the Triton kernels as PTX
cuda80, 90, 100    the CUDA kernels as PTX, each call on the path that its seed picks of those that take it

All but cpu are chosen before anything imports triton, one to a process.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from judge import Backend, Miss, judge, operators, public
from random_calls import DTYPES, LOSSES, Call, Inputs, Level, View
from torch import Tensor
from triton_interpreter import launcher

from kdops._cuda import Path

OPERATORS = ("cwd_loss", "pkd_loss", "mgd_loss")
NAMES = ("cpu", "interpreter", *(f"{kind}{a}" for kind in ("triton", "cuda") for a in (80, 90, 100)))


def as_it_is(call: Call) -> Call:
    return call


def as_detectors_have_it(call: Call) -> Call:
    """The call with maps that the CUDA kernels take: of one dtype, all nchw or all channels_last, slices at most."""
    dtype = DTYPES[call.seed // 2 % 3]
    order = ((0, 1, 2, 3), (0, 2, 3, 1))[call.seed % 2]

    def view(v: View) -> View:
        return View(order, (*v.before[:2], 0, 0), (*v.after[:2], 0, 0))

    def level(x: Level) -> Level:
        return Level(x.shape, None, dtype, dtype, view(x.student_view), view(x.teacher_view))

    return replace(call, levels=tuple(map(level, call.levels)))


class Choice(NamedTuple):
    """A backend and the calls for it: of which losses, whether with maps to be resized, the most elements of a map, and
    what is done to a call before. cuts: it cuts bfloat16."""

    run: Backend
    losses: tuple[str, ...] = OPERATORS
    resize: bool = False
    room: int = 5000
    adapt: Callable[[Call], Call] = as_it_is
    cuts: bool = False

    def judge(self, call: Call) -> list[Miss]:
        """What is wrong with the results of a call on this backend."""
        return judge(self.adapt(call), self.run, self.cuts)


def choose(name: str) -> Choice:
    """Make the backend of this name ready."""
    if name == "cpu":
        return Choice(public, LOSSES, resize=True, room=100000)
    if name == "interpreter":
        os.environ["TRITON_INTERPRET"] = "1"
        torch.use_deterministic_algorithms(True)  # fresh memory is NaN
        return Choice(operators(triton_launcher), cuts=True)
    kind, architecture = re.fullmatch(r"([a-z]+)(\d+)", name).groups()
    from ptx import mode

    mode.start(int(architecture), {})
    if kind == "triton":
        return Choice(operators(triton_launcher))
    return Choice(cuda, ("cwd_loss", "pkd_loss"), adapt=as_detectors_have_it)


def triton_launcher(loss: str) -> Any:
    """Forward and backward of the Triton kernels; launches of the previous call are dropped."""
    from ptx import mode

    mode.forget()
    return launcher(loss)


def cuda(call: Call, inputs: Inputs, weights: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The CUDA kernels on one of the paths that take the call, of which there must be one."""
    import cuda_host

    shim = cuda_host.shim()
    shim.device()
    shim.order(call.seed % 8)
    shim.reset()
    maps = [[s.detach() for s in inputs.students], inputs.teachers]
    refusals = {path: shim.ops.cuda_refusal(call.loss, path, *maps) for path in Path if path != Path.TRITON}
    paths = [path for path, reason in refusals.items() if not reason]
    if not paths:
        raise AssertionError(f"no path takes the call: {refusals}")
    path = paths[call.seed % len(paths)]

    def find(loss: str) -> SimpleNamespace:
        forward, backward = (getattr(shim.ops, f"{loss}{kind}_cuda") for kind in ("", "_backward"))
        return SimpleNamespace(forward=lambda *args: forward(*args, path), backward=lambda *args: backward(*args, path))

    return operators(find)(call, inputs, weights)
