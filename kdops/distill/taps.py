"""Which layers are compared, by which loss: the description that a Distiller is built from."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Union

from torch import Tensor, nn

from kdops.distill.schedules import WeightSchedule, as_schedule

__all__ = ["Place", "Tap", "find_layer", "unwrap"]

Align = Union[None, bool, "tuple[int, int]", nn.Module]
_PLACE = re.compile(r"(?P<layer>[^\[\]]*)(\[(?P<key>[^\[\]]+)\])?")


@dataclass(frozen=True)
class Tap:
    """A layer of the student, the layer of the teacher that it learns from, and the loss between their outputs.

    Args:
        student: name of a layer as in ``student.named_modules()``, for example ``"neck.out_layers.0.conv"``. Where a
            layer returns a tuple, a list or a dict of maps, the one that is meant stands in brackets behind it:
            ``"neck[1]"``, ``"backbone.fpn[p6]"``. Its output gets the gradient.
        teacher: name of the teacher's layer, in the same form; the student's name when None.
        loss: any loss of kdops, or a module (or function) of two arguments, student and teacher map, that returns a
            scalar. Taps with the same kdops loss, options and weight go through one call for all of them. A module's
            parameters (MGD's generator) are trained: they are among the Distiller's parameters. The options of kdops's
            losses are read when the Distiller is made.
        align: what brings the student's map to the teacher's width. None: nothing. True: a 1x1 convolution without
            bias (RTMDet), its widths found from a first batch; ``(student_width, teacher_width)``: the same, widths
            given. A module: that module (DAMO-YOLO: ``nn.Conv2d(s, t, 1)``, with bias).
        weight: factor of this tap's loss: a number, or a schedule (see `kdops.CosineWeight`).
        name: name of the term in the results; the student's layer when None.
        same_shape: False lets maps of different shapes through to a loss that can take them.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or form.
    """

    student: str
    teacher: str | None = None
    loss: Callable[[Tensor, Tensor], Tensor] | None = None
    align: Align = None
    weight: float | WeightSchedule = 1.0
    name: str | None = None
    same_shape: bool = True

    def __post_init__(self) -> None:
        for role, layer in (("student", self.student), ("teacher", self.teacher)):
            if not isinstance(layer, str) and not (layer is None and role == "teacher"):
                raise TypeError(f"Tap: {role} must be the name of a layer, got {type(layer).__name__}")
        if not callable(self.loss) or isinstance(self.loss, type):
            raise TypeError(f"Tap: loss must be a module or a function of two maps, got {self.loss!r}")
        if getattr(self.loss, "reduction", None) == "none":
            raise ValueError("Tap: loss must return a scalar, got a loss with reduction='none'")
        object.__setattr__(self, "weight", as_schedule("Tap", self.weight))
        if not _is_align(self.align):
            raise TypeError(
                f"Tap: align must be None, True, (student_width, teacher_width) or a module, got {self.align!r}"
            )

    @property
    def places(self) -> tuple[Place, Place]:
        """The parsed places of student and teacher."""
        teacher = self.student if self.teacher is None else self.teacher
        return Place.parse(self.student), Place.parse(teacher)

    @property
    def label(self) -> str:
        """The name under which the tap's loss is reported."""
        return self.student if self.name is None else self.name


@dataclass(frozen=True)
class Place:
    """A layer's name and, where it returns several maps, the index or key of one of them."""

    layer: str
    key: int | str | None = None

    @staticmethod
    def parse(text: str) -> Place:
        """Read ``"layer"``, ``"layer[1]"`` or ``"layer[p6]"``."""
        match = _PLACE.fullmatch(text)
        if match is None:
            raise ValueError(f"Tap: a layer must be written 'name' or 'name[index]', got {text!r}")
        key = match["key"]
        if key is not None and key.lstrip("-").isdigit():
            return Place(match["layer"], int(key))
        return Place(match["layer"], None if key is None else key.strip("'\""))

    def __str__(self) -> str:
        return self.layer if self.key is None else f"{self.layer}[{self.key}]"

    def pick(self, role: str, output: Any) -> Tensor:
        """Return the 4-D map that is meant from a layer's output; say what came if there is none."""
        picked = output if self.key is None else self._entry(role, output)
        if not isinstance(picked, Tensor):
            came = type(picked).__name__ + _choices(self, picked)
            raise TypeError(f"{role} layer '{self}' must give a tensor, got {came}")
        if picked.dim() != 4:
            raise ValueError(
                f"{role} layer '{self}' must give a 4-D map (N, C, H, W), "
                f"got {picked.dim()} dimensions with shape {tuple(picked.shape)}"
            )
        return picked

    def _entry(self, role: str, output: Any) -> Any:
        if isinstance(output, (list, tuple)) and isinstance(self.key, int):
            if -len(output) <= self.key < len(output):
                return output[self.key]
        elif hasattr(output, "keys"):
            for key in (self.key, str(self.key)):
                if key in output:
                    return output[key]
        raise ValueError(
            f"{role} layer '{self.layer}' has no output [{self.key}], "
            f"it gave {type(output).__name__}{_choices(self, output)}"
        )


def _choices(place: Place, output: Any) -> str:
    if isinstance(output, (list, tuple)) and output:
        return f" of {len(output)}: name one of '{place.layer}[0]' to '{place.layer}[{len(output) - 1}]'"
    if hasattr(output, "keys"):
        return ": name one of " + ", ".join(f"'{place.layer}[{key}]'" for key in output.keys())
    return ""


def _is_align(align: Any) -> bool:
    if isinstance(align, tuple):
        return len(align) == 2 and all(isinstance(width, int) and width > 0 for width in align)
    return align is None or isinstance(align, (bool, nn.Module))


def unwrap(network: nn.Module) -> nn.Module:
    """Return the module inside DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        if isinstance(network, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            network = network.module
        elif isinstance(getattr(network, "_orig_mod", None), nn.Module):
            network = network._orig_mod
        else:
            return network


def find_layer(role: str, network: nn.Module, place: Place) -> nn.Module:
    """Return a layer by name; an unknown one is refused with the names that are near to it."""
    layers = dict(network.named_modules())
    if place.layer in layers:
        return layers[place.layer]
    near = _near(place.layer, list(layers))
    hint = f"did you mean {near}?" if near else "its parts are " + _listed([n for n, _ in network.named_children()])
    raise ValueError(f"{role} has no layer '{place.layer}'; {hint}")


def _near(name: str, layers: Sequence[str]) -> str:
    suffixes = [layer for layer in layers if layer and (layer.endswith("." + name) or name.endswith("." + layer))]
    near = sorted(suffixes, key=len, reverse=True)[:3] or difflib.get_close_matches(name, layers, n=3, cutoff=0.6)
    return _listed(near)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
