"""A teacher that is prepared on the first batch for being only read."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from kdops.distill._capture import Capture, Frozen
from kdops.distill._compiling import CompiledParts
from kdops.distill._copying import copy_sharing_tensors
from kdops.distill._folding import fold_batch_norms
from kdops.distill.taps import Place, find_layer, unwrap
from kdops.distill.teacher_options import TeacherOptions, TeacherReport, relative_difference

__all__ = ["hold_teacher"]

logger = logging.getLogger("kdops")


def hold_teacher(role: str, network: nn.Module, places: Sequence[Place], options: TeacherOptions | None) -> Frozen:
    """Hold a teacher as it is, or on the way to being prepared."""
    if options is None:
        return Frozen(role, network, places)
    for place in places:
        find_layer(role, unwrap(network), place)
    try:
        return Prepared(role, network, places, options)
    except (TypeError, RuntimeError, AttributeError) as error:  # a module that copy.deepcopy does not take
        logger.warning("kdops: the teacher is not prepared, as it cannot be copied: %s", error)
        return Frozen(role, network, places)


class Prepared(Frozen):
    """A frozen network that is exchanged for a prepared copy on its first run.

    It never holds the given network itself but a copy on the same memory, which is let go when the prepared one has
    passed the comparison. What is pickled is the network as it stands, without anything compiled.
    """

    def __init__(self, role: str, network: nn.Module, places: Sequence[Place], options: TeacherOptions) -> None:
        network = unwrap(network)
        super().__init__(role, copy_sharing_tensors(network), places)
        self.options = options
        self.report: TeacherReport | None = None
        self._parts: CompiledParts | None = None
        self._watched = _versions(network)

    def run(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Place, Tensor]:
        """Return the tapped maps; the first run prepares the network and compares it with the given one."""
        if self.report is None:
            return self._prepare(call, args, kwargs)
        if any(_changed(reference, version) for reference, version in self._watched):
            raise RuntimeError(
                "Distiller: the teacher's weights were changed after it was prepared, which reads them once; "
                "leave teacher_options out for a teacher that goes on changing"
            )
        return self._run(call, args, kwargs)

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change all tensors of the network; what was compiled for the old ones is compiled again."""
        self._drop_parts()
        super().apply(change)

    def free(self) -> None:
        """Let go of the network and everything compiled."""
        self._drop_parts()
        super().free()

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the hooks, what was compiled, and the given network's changes."""
        return {**super().__getstate__(), "options": self.options, "report": self.report}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Put the hooks on again, unless the network is gone."""
        state = dict(state)
        report = state.pop("report")
        super().__setstate__(state)
        self.report, self.checked = report, report is not None

    def _prepare(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Place, Tensor]:
        self.checked = False
        expected = super().run(call, args, kwargs)
        self._watched = [(reference, reference()._version) for reference, _ in self._watched if reference() is not None]
        given, capture = self.network, self.capture
        report = TeacherReport()
        self.network = self._converted(given, report)
        self.capture = Capture(capture.role, self.network, capture.places)
        weakref.finalize(self, self.capture.remove).atexit = False
        try:
            maps = self._run(call, args, kwargs)
            self._compare(maps, expected, report)
            self._note_compiled(report)
        except BaseException:
            self._drop_parts()
            self.capture.remove()
            self.network, self.capture = given, capture
            raise
        report.bytes = _bytes_apart(self.network, given)
        capture.remove()
        self.report = report
        logger.info("%s", report)
        if self.options.compile and not report.compiled:
            logger.warning("kdops: no part of the teacher can be compiled: %s", report.not_compiled)
        for reason, layers in _by_reason(report.left).items():
            logger.warning("kdops: the teacher's %s stay(s) as it is: %s", layers, reason)
        return maps

    def _converted(self, given: nn.Module, report: TeacherReport) -> nn.Module:
        network, options = copy_sharing_tensors(given), self.options
        if options.fold_batch_norm:
            kept = [place.layer for place in self.capture.places]
            report.folded, report.left = fold_batch_norms(network, kept)
        layers = {name: m for name, m in network.named_modules() if isinstance(m, (_ConvNd, nn.Linear))}
        if options.dtype is not None:
            report.left.update(_in_dtype(layers, options.dtype))
        if options.channels_last:
            _in_channels_last(layers.values())
        return network

    def _run(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Place, Tensor]:
        if self.options.compile and self._parts is None:
            self._parts = CompiledParts(self.network, call, self.capture.leave_if_complete)
            self._close_parts = weakref.finalize(self, self._parts.close)
            self._close_parts.atexit = False
        device = (self.device or torch.device("cpu")).type
        as_student = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        with self._precision(device):
            maps = super().run(self._parts or call, args, kwargs)
        for place, feature in maps.items():
            if self.options.dtype is not None and feature.dtype == self.options.dtype:
                feature = feature.to(as_student)
            # A CUDA graph writes its next maps where these are.
            maps[place] = feature.clone() if device == "cuda" and self._parts is not None else feature
        return maps

    @contextlib.contextmanager
    def _precision(self, device: str) -> Iterator[None]:
        with torch.autocast(device, self.options.dtype) if self.options.dtype else contextlib.nullcontext():
            yield

    def _compare(self, maps: dict[Place, Tensor], expected: dict[Place, Tensor], report: TeacherReport) -> None:
        device = next(iter(maps.values())).device
        precisions = {feature.dtype for feature in expected.values()} | {self.options.dtype}
        precisions |= {tensor.dtype for tensor in self.network.parameters()}
        if torch.is_autocast_enabled(device.type):
            precisions.add(torch.get_autocast_dtype(device.type))
        report.tolerance = self.options.allowed(list(precisions), device)
        report.differences = {str(place): relative_difference(maps[place], expected[place]) for place in maps}
        if not all(value <= report.tolerance for value in report.differences.values()):
            listed = ", ".join(f"'{place}': {value:.2e}" for place, value in report.differences.items())
            raise RuntimeError(
                f"Distiller: the prepared teacher's maps differ from the teacher's by more than {report.tolerance:.0e} "
                f"in relative terms on the first batch: {listed}; its teacher_options were {self.options}: leave out "
                "what it does not bear (dtype, fold_batch_norm=False, compile=False), or give a larger tolerance"
            )

    def _note_compiled(self, report: TeacherReport) -> None:
        if self._parts is None:
            return
        report.compiled, report.not_compiled = self._parts.names, dict(self._parts.refused)
        if self.options.compile is True and not report.compiled:
            raise RuntimeError(f"Distiller: no part of the teacher can be compiled: {report.not_compiled}")

    def _drop_parts(self) -> None:
        if self._parts is not None:
            self._close_parts()
            self._parts = None


def _in_dtype(layers: dict[str, nn.Module], dtype: torch.dtype) -> dict[str, str]:
    """Convert layers whose weights are in float32, and return those that are left, with the reason."""
    left = {}
    for name, layer in layers.items():
        if layer.weight.dtype == torch.float32:
            layer.to(dtype)
        elif layer.weight.dtype != dtype:
            left[name] = f"its weights are in {layer.weight.dtype}"
    return left


def _in_channels_last(layers: Iterable[nn.Module]) -> None:
    for layer in layers:
        weight = layer._parameters.get("weight")  # none where it is computed from others
        if weight is not None and weight.dim() == 4:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)


def _versions(network: nn.Module) -> list[tuple[weakref.ref[Tensor], int]]:
    """What shows later whether a network's weights were changed, without keeping them."""
    tensors = chain(network.parameters(), network.buffers())
    return [(weakref.ref(tensor), tensor._version) for tensor in tensors if not tensor.is_inference()]


def _changed(reference: weakref.ref[Tensor], version: int) -> bool:
    tensor = reference()
    return tensor is not None and tensor._version != version


def _bytes_apart(network: nn.Module, given: nn.Module) -> int:
    """Memory of a network's tensors that is not another's."""
    shared = {tensor.untyped_storage().data_ptr() for tensor in chain(given.parameters(), given.buffers())}
    own = {tensor.untyped_storage().data_ptr(): tensor for tensor in chain(network.parameters(), network.buffers())}
    return sum(tensor.untyped_storage().nbytes() for pointer, tensor in own.items() if pointer not in shared)


def _by_reason(left: dict[str, str]) -> dict[str, str]:
    grouped: dict[str, list[str]] = {}
    for layer, reason in left.items():
        grouped.setdefault(reason, []).append(f"'{layer}'")
    return {reason: ", ".join(layers) for reason, layers in grouped.items()}
