"""The workloads: which loss on which maps. Every loss of kdops.testing.LOSSES is measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kdops import testing
from kdops.testing import Case

Shape = tuple[int, ...]

#: Options that a loss is measured with; another loss is measured with the first options of its cases.
OPTIONS: dict[str, dict[str, Any]] = {
    "cwd_loss": {"norm": "batch"},
    "pkd_loss": {"norm": "pkd"},
}
YOLO_CHANNELS = (96, 192, 320)
YOLO_SIZES = (80, 40, 20)
FPN_SIZES = ((200, 304), (100, 152), (50, 76), (25, 38), (13, 19))
#: On a CPU, the largest student map that the full set takes, in elements: the fp64 oracle needs about 100 bytes each.
CPU_ELEMENTS = 2**26


def workloads(name: str, device: str) -> list[Case]:
    """The ``"quick"`` or ``"full"`` set for a device."""
    if name == "full":
        cases = list(dict.fromkeys([*_QUICK[device](), *_full()]))
        return [c for c in cases if device != "cpu" or elements(c) <= CPU_ELEMENTS]
    return list(_QUICK[device]())


def workload(
    loss: str, *shapes: Shape, dtype: torch.dtype = torch.float32, layout: str = "nchw", **options: Any
) -> Case:
    """A case whose student and teacher have the same dtype and layout."""
    options = options or OPTIONS.get(loss, testing.LOSSES[loss][1][0])
    return Case(loss, options, shapes, dtype, dtype, layout, layout)


def pyramid(batch: int, channels: int) -> tuple[Shape, ...]:
    """The three levels of an RTMDet or YOLO neck at 640x640."""
    return tuple((batch, channels, size, size) for size in YOLO_SIZES)


def elements(case: Case) -> int:
    """Elements of one map, summed over levels."""
    return sum(torch.Size(shape).numel() for shape in case.shapes)


def shape_text(case: Case) -> str:
    """``8x128x80x80``, levels joined by ``+``."""
    return "+".join("x".join(map(str, shape)) for shape in case.shapes)


def options_text(case: Case) -> str:
    """``norm=batch tau=4.0``."""
    return " ".join(f"{key}={value}" for key, value in case.options.items())


def dtype_text(case: Case) -> str:
    return str(case.student_dtype).replace("torch.", "")


def key(case: Case) -> str:
    """One line that names a workload: what ``--only`` matches."""
    return " ".join((case.loss, options_text(case), shape_text(case), dtype_text(case), case.student_layout))


def _quick_cpu() -> Iterator[Case]:
    yield workload("cwd_loss", (8, 128, 80, 80))
    yield workload("cwd_loss", (2, 256, 100, 152))
    yield workload("cwd_loss", (8, 128, 80, 80), dtype=torch.bfloat16)
    yield workload("cwd_loss", (8, 128, 20, 20))
    yield workload("cwd_loss", *pyramid(8, 128))
    yield workload("cwd_loss", (8, 128, 80, 80), layout="channels_last")
    yield workload("cwd_loss", (8, 128, 80, 80), norm=None, tau=4.0)
    for loss in testing.LOSSES:
        if loss != "cwd_loss":
            yield workload(loss, (8, 128, 80, 80))


def _quick_gpu() -> Iterator[Case]:
    half = torch.bfloat16
    yield workload("cwd_loss", (32, 256, 80, 80), dtype=half)
    yield workload("cwd_loss", (32, 256, 80, 80))
    yield workload("cwd_loss", (8, 256, 200, 304), dtype=half)
    yield workload("cwd_loss", (32, 256, 80, 80), dtype=half, layout="channels_last")
    yield workload("cwd_loss", (32, 192, 20, 20), dtype=half)
    yield workload("cwd_loss", *pyramid(32, 192), dtype=half)
    yield workload("cwd_loss", (32, 256, 80, 80), dtype=half, norm=None, tau=4.0)
    for loss in testing.LOSSES:
        if loss != "cwd_loss":
            yield workload(loss, (32, 256, 80, 80), dtype=half)


_QUICK = {"cpu": _quick_cpu, "cuda": _quick_gpu}


def _full() -> Iterator[Case]:
    shapes = [(n, c, size, size) for n in (8, 32) for c in YOLO_CHANNELS for size in YOLO_SIZES]
    shapes += [(n, 256, *size) for n in (2, 8) for size in FPN_SIZES]
    shapes += [(8, 2048, 20, 20)]
    for dtype in (torch.float32, torch.bfloat16):
        for layout in ("nchw", "channels_last"):
            for shape in shapes:
                yield workload("cwd_loss", shape, dtype=dtype, layout=layout)
            for channels in YOLO_CHANNELS:
                yield workload("cwd_loss", *pyramid(8, channels), dtype=dtype, layout=layout)
            for loss in testing.LOSSES:
                for shape in ((8, 192, 80, 80), (8, 192, 20, 20), (2, 256, 100, 152)):
                    yield workload(loss, shape, dtype=dtype, layout=layout)
        yield workload("cwd_loss", (8, 192, 80, 80), dtype=dtype, norm=None, tau=4.0)
