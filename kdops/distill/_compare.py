"""What is trained besides the student, and how it is applied: align layers, then the losses of all taps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdops.distill._terms import adapts_size, adapts_width, group
from kdops.distill.taps import Place, Tap

__all__ = ["Comparison"]

Maps = Mapping[Place, Tensor]
#: Calls a sub-module with tensors.
Caller = Callable[..., Any]


def call_directly(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a module as it is."""
    return module(*args, **kwargs)


class Comparison(nn.Module):
    """The align layers and losses of some taps.

    ``align`` and ``loss`` hold the modules by the index of their tap; losses that are one call for several levels have
    no parameters and are no modules here.
    """

    def __init__(self, taps: Sequence[Tap], split_terms: bool, like: Tensor | None) -> None:
        super().__init__()
        self.taps = tuple(taps)
        self.places = [tap.places for tap in self.taps]
        self.split_terms = split_terms
        self.terms = group(self.taps)
        self.align = nn.ModuleDict()
        self.loss = nn.ModuleDict()
        self._like = like if like is None else like.detach().new_empty(0)
        for index, tap in enumerate(self.taps):
            if isinstance(tap.align, nn.Module):
                self.align[str(index)] = tap.align
            elif isinstance(tap.align, tuple):
                self._add_align(index, *tap.align)
        for term in self.terms:
            first = term.taps[0]
            if term.function is None and isinstance(self.taps[first].loss, nn.Module):
                self.loss[str(first)] = self.taps[first].loss
        if like is not None:
            self.to(like.device)

    def unknown(self) -> list[int]:
        """The taps whose align layer waits for its widths."""
        return [i for i, tap in enumerate(self.taps) if tap.align is True and str(i) not in self.align]

    def build(self, students: Maps, teachers: Maps) -> None:
        """Make the align layers whose widths were not given."""
        for index in self.unknown():
            student, teacher = self.places[index]
            feature = students[student]
            self._add_align(index, feature.shape[1], teachers[teacher].shape[1], feature.device)

    def drop(self) -> None:
        """Let go of all layers and losses."""
        self.taps, self.places, self.terms = (), [], []
        self.align, self.loss = nn.ModuleDict(), nn.ModuleDict()

    def check(self, students: Maps, teachers: Maps) -> None:
        """Raise where widths or sizes do not fit."""
        with torch.no_grad():
            self._aligned(students, teachers, call_directly)

    def forward(
        self, students: Maps, teachers: Maps, factor: Callable[[Callable[[int, int], float]], float], call: Caller
    ) -> dict[str, Tensor]:
        """Return every term by name; ``factor`` gives the value of a term's weight at this step."""
        pairs = self._aligned(students, teachers, call)
        values: dict[str, Tensor] = {}
        for term in self.terms:
            s, t = [pairs[i][0] for i in term.taps], [pairs[i][1] for i in term.taps]
            names = [self.taps[i].label for i in term.taps]
            try:
                if term.function is not None:
                    values.update(term.multi_level(names, s, t, factor(term.weight), self.split_terms))
                else:
                    values[term.name] = self._single(term.taps[0], s[0], t[0], factor(term.weight), call)
            except ValueError as error:
                raise ValueError(f"Distiller: term '{term.name}': {error}") from error
        return values

    def _single(self, index: int, student: Tensor, teacher: Tensor, factor: float, call: Caller) -> Tensor:
        key = str(index)
        if key in self.loss:
            value = call(self.loss[key], student, teacher)
        else:
            value = self.taps[index].loss(student, teacher)
        if not isinstance(value, Tensor) or value.dim() != 0:
            came = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"the loss must return a scalar tensor, got {came}")
        return value if factor == 1.0 else value * factor

    def _aligned(self, students: Maps, teachers: Maps, call: Caller) -> list[tuple[Tensor, Tensor]]:
        pairs = []
        for index, (tap, (student, teacher)) in enumerate(zip(self.taps, self.places)):
            s, t, key = students[student], teachers[teacher], str(index)
            if key in self.align:
                _check_align(tap, self.align[key], s)
                s = call(self.align[key], s)
            _check_fit(tap, s, t)
            pairs.append((s, t))
        return pairs

    def _add_align(
        self, index: int, student_width: int, teacher_width: int, device: torch.device | None = None
    ) -> None:
        like = torch.empty(0) if self._like is None else self._like
        made = nn.Conv2d(student_width, teacher_width, 1, bias=False, device=device or like.device, dtype=like.dtype)
        layers = {**self.align, str(index): made}
        # In the order of the taps, so that the order of the parameters does not depend on when a layer was made.
        self.align = nn.ModuleDict({key: layers[key] for key in sorted(layers, key=int)})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Comparison:
        if self._like is not None:
            self._like = fn(self._like)
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A checkpoint knows the widths that were found from the first batch of its run."""
        for index in self.unknown():
            weight = state_dict.get(f"{prefix}align.{index}.weight")
            if isinstance(weight, Tensor) and weight.dim() == 4:
                self._add_align(index, weight.shape[1], weight.shape[0])
        super()._load_from_state_dict(state_dict, prefix, *args)


def _check_align(tap: Tap, align: nn.Module, student: Tensor) -> None:
    first = next(align.parameters(), student)
    if first.device != student.device:
        raise ValueError(
            f"Distiller: tap '{tap.label}': align is on {first.device}, but the student's maps are on "
            f"{student.device}; move it with distiller.to('{student.device}')"
        )
    if isinstance(align, nn.Conv2d) and align.in_channels != student.shape[1]:
        raise ValueError(
            f"Distiller: tap '{tap.label}': align takes {align.in_channels} channels, "
            f"but the student's layer gives {student.shape[1]}"
        )


def _check_fit(tap: Tap, student: Tensor, teacher: Tensor) -> None:
    where = f"Distiller: tap '{tap.label}': student and teacher"
    if student.device != teacher.device:
        raise ValueError(f"{where} must be on the same device, got {student.device} and {teacher.device}")
    if not tap.same_shape:
        return
    shapes = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(f"{where} must have the same batch size, got {shapes}")
    if student.shape[1] != teacher.shape[1] and not adapts_width(tap.loss):
        widths = (student.shape[1], teacher.shape[1])
        hint = f": align=True (or align={widths}) puts a 1x1 convolution between them"
        hint = " behind its align layer" if tap.align else hint
        raise ValueError(f"{where} must have the same number of channels, got {widths[0]} and {widths[1]}{hint}")
    if student.shape[2:] != teacher.shape[2:] and not adapts_size(tap.loss):
        raise ValueError(f"{where} must have the same height and width, got {shapes}")
