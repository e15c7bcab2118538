"""Hooks that keep what chosen layers put out, and what a network was called with.

The hooks are objects, not closures: a copy or a pickle of the hooked network gets an inert one in their place, so that
an averaged copy of a student neither records nor drags a teacher along. They are plain enough for torch.compile to
trace them without a graph break.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdops.distill.taps import Place, find_layer, unwrap

__all__ = ["Frozen", "Recorder", "captured_once"]

AUTOCAST_DEVICES = ("cpu", "cuda")


def inert(*_: Any) -> None:
    """Stand in for a hook in a copy of a network."""


def _inert_hook() -> Callable[..., None]:
    return inert


class _Hook:
    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return inert

    def __reduce__(self) -> tuple[Any, ...]:
        return _inert_hook, ()


class Capture:
    """The outputs of some layers of one network, in one run of it.

    Args:
        role: how error texts begin: who complains, and what the network is called.
        network: the module that holds the layers.
        places: the layers, each perhaps with an index into its output.
        stop: leave the run by an exception as soon as every place has been seen.
    """

    def __init__(self, role: str, network: nn.Module, places: Sequence[Place], stop: bool = False) -> None:
        self.role = role
        self.places = tuple(dict.fromkeys(places))
        self.open = False
        self.stop = stop
        self.seen: dict[int, list[tuple[Tensor, int | None]]] = {}
        layers = [find_layer(role, network, place) for place in self.places]
        self.handles = [layer.register_forward_hook(_LayerHook(self, index)) for index, layer in enumerate(layers)]

    def take(self) -> dict[Place, Tensor]:
        """Return the maps of the run and forget them; say so if a layer did not run just once."""
        seen, self.seen = self.seen, {}
        return {place: self._one(place, seen.get(index, [])) for index, place in enumerate(self.places)}

    def _one(self, place: Place, maps: list[tuple[Tensor, int | None]]) -> Tensor:
        where = f"{self.role} layer '{place}'"
        if not maps:
            raise RuntimeError(f"{where} did not run; the maps of layers that are skipped cannot be compared")
        if len(maps) > 1:
            raise RuntimeError(f"{where} ran {len(maps)} times in one forward; name a layer that runs once")
        feature, version = maps[0]
        if version is not None and feature._version != version:
            raise RuntimeError(
                f"{where}: its output was overwritten in place by a later layer (an inplace activation or +=); "
                "name the layer that overwrites it, or make that one not inplace"
            )
        return feature

    def leave_if_complete(self) -> None:
        """Raise what leaves the run, if it is to be left as soon as every place has been seen."""
        if self.stop and len(self.seen) == len(self.places):
            raise _AllSeen

    def remove(self) -> None:
        """Take the hooks off the network."""
        self.open = False
        self.seen = {}
        for handle in self.handles:
            handle.remove()
        self.handles = []


class _LayerHook(_Hook):
    def __init__(self, capture: Capture, index: int) -> None:
        self.capture = capture
        self.index = index

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        capture = self.capture
        if not capture.open:
            return
        feature = capture.places[self.index].pick(capture.role, output)
        compiling = torch.compiler.is_compiling()
        if self.index not in capture.seen:  # not setdefault, which Dynamo of PyTorch 2.4 cannot trace
            capture.seen[self.index] = []
        capture.seen[self.index].append((feature, None if compiling else feature._version))
        if not compiling:
            capture.leave_if_complete()


class _AllSeen(BaseException):
    """Leaves a frozen network behind its last tapped layer; no Exception, so that no network swallows it."""


class Recorder:
    """Records a student's training forwards: the tapped maps, the arguments, the autocast state."""

    def __init__(self, student: nn.Module, places: Sequence[Place]) -> None:
        self.enabled = True
        self.capture = Capture("Distiller: student", student, places)
        self.passes = 0
        self.call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.autocast: dict[str, tuple[bool, torch.dtype]] = {}
        self.handles = [
            student.register_forward_pre_hook(_Enter(self), with_kwargs=True),
            student.register_forward_hook(_Leave(self)),
        ]

    def clear(self) -> None:
        """Forget what was recorded."""
        self.capture.open = False
        self.capture.seen = {}
        self.passes, self.call = 0, None

    def remove(self) -> None:
        """Take the hooks off the student for good."""
        self.enabled = False
        self.clear()
        self.capture.remove()
        for handle in self.handles:
            handle.remove()
        self.handles = []


class _Enter(_Hook):
    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        recorder = self.recorder
        if not (recorder.enabled and module.training and torch.is_grad_enabled()) or _in_backward():
            return
        # Still open: the forward before was left by an exception, and is not counted.
        recorder.passes = 1 if recorder.capture.open else recorder.passes + 1
        recorder.capture.open = True
        recorder.capture.seen = {}
        recorder.call = (args, kwargs)
        recorder.autocast = {
            device: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in AUTOCAST_DEVICES
        }


class _Leave(_Hook):
    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.recorder.capture.open = False


def _in_backward() -> bool:
    """Whether this forward is activation checkpointing's second run of a whole student."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _eval_throughout(network: nn.Module) -> None:
    """Eval mode in every part (drop-path, dropout), whatever the network's own train() and eval() leave out."""
    for module in network.modules():
        if module.training:
            module.training = False


class Frozen:
    """A network that is only read: always in eval mode, without gradients, and run no deeper than it is tapped."""

    def __init__(self, role: str, network: nn.Module, places: Sequence[Place]) -> None:
        self.network: nn.Module | None = network
        network.requires_grad_(False)
        self.capture = Capture(role, unwrap(network), places)
        weakref.finalize(self, self.capture.remove).atexit = False
        self.checked = False

    @property
    def device(self) -> torch.device | None:
        """Where the network's parameters lie, None without parameters."""
        first = next(self.network.parameters(), None)
        return None if first is None else first.device

    def run(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Place, Tensor]:
        """Return the tapped maps of ``call(network, *args, **kwargs)``.

        The first run goes through to the end, which shows a layer that runs twice; later ones stop behind the last
        tapped layer.
        """
        capture = self.capture
        _eval_throughout(self.network)
        capture.stop, capture.seen, capture.open = self.checked, {}, True
        try:
            with torch.no_grad():
                call(self.network, *args, **kwargs)
        except _AllSeen:
            pass
        finally:
            capture.open = False
        maps = capture.take()
        self.checked = True
        return maps

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change all tensors of the network, as ``to()`` does."""
        self.network._apply(change)

    def free(self) -> None:
        """Let go of the network."""
        self.capture.remove()
        self.network = None

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the hooks."""
        return {"role": self.capture.role, "network": self.network, "places": self.capture.places}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Put the hooks on again, unless the network is gone."""
        network = state["network"]
        if network is None:
            self.network, self.checked = None, True
        else:
            self.__init__(**state)


def captured_once(
    role: str, network: nn.Module, places: Sequence[Place], call: Callable[[nn.Module], Any], whole: bool = False
) -> dict[Place, Tensor]:
    """Return maps of a network that is not ours to freeze: run it in eval mode once and leave it as it was.

    With ``whole`` the run goes to the end, which shows layers that run more than once.
    """
    modes = [(module, module.training) for module in network.modules()]
    capture = Capture(role, unwrap(network), places, stop=not whole)
    _eval_throughout(network)
    capture.open = True
    try:
        with contextlib.suppress(_AllSeen), torch.no_grad():
            call(network)
        return capture.take()
    finally:
        capture.remove()
        for module, training in modes:
            module.training = training
