"""torch.compile for a network that is only read: as a whole, or in the largest parts that it takes in one graph.

A detector's forward seldom is one graph, for it resizes images and picks boxes in Python; its backbone and neck are.
"""

from __future__ import annotations

import contextlib
import logging
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from kdops.distill.teacher_options import first_line

__all__ = ["WHOLE", "CompiledParts"]

logger = logging.getLogger("kdops")

#: Name of the part that is the whole network.
WHOLE = "(all)"


class CompiledParts:
    """Calls a network whose parts are compiled when they run first; called like the function that it is made with.

    Between two calls the network is a plain one, which can be copied and pickled.

    Args:
        network: the network, frozen.
        call: what runs it: ``call(network, *args, **kwargs)``; its result is not wanted.
        leave: called after every compiled part, where hooks inside cannot leave the run.

    Attributes:
        names: names of the parts that are compiled.
        refused: the parts that are not, as torch.compile refused them, each with the reason.
    """

    def __init__(self, network: nn.Module, call: Callable[..., Any], leave: Callable[[], None]) -> None:
        self._network, self._leave = network, leave
        self._names = {module: name for name, module in network.named_modules()}
        device = next((p.device.type for p in network.parameters()), "cpu")
        # On a CPU it packs the weights; on a GPU it would only keep them twice.
        self._freezes = device == "cpu" and _kept_by_pytorch() is not None
        self._options = _graph_capture() if device == "cuda" else None
        self._parts: dict[nn.Module, _Part] = {}
        self._generated: list[Any] = []
        self._whole = _Part(self, WHOLE, lambda *args, **kwargs: _without_result(call, network, args, kwargs), None)
        self.refused: dict[str, str] = {}

    @property
    def names(self) -> list[str]:
        """Names of the parts that are compiled, in the order in which they first ran."""
        return [part.name for part in (self._whole, *self._parts.values()) if part.compiled is not None]

    def __call__(self, network: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Run the network."""
        import torch._inductor.config  # not when kdops is imported, as it brings the compiler along

        kept = _kept_by_pytorch()
        generated = [] if kept is None else kept
        before = len(generated)
        with self._in_place(), torch._inductor.config.patch(freezing=self._freezes):
            try:
                self._whole(*args, **kwargs)
            finally:
                self._generated += generated[before:]

    def close(self) -> None:
        """Let go of everything compiled, and of the weights that it holds."""
        for part in (self._whole, *self._parts.values()):
            part.forget()
        for module in self._generated:  # PyTorch keeps them for good
            for name in [name for name in vars(module) if name.startswith("_frozen_param")]:
                delattr(module, name)
        self._parts, self._generated = {}, []

    def gave_up(self, part: _Part, error: Exception) -> None:
        """Go on with the parts of a part that was refused."""
        self.refused[part.name] = first_line(error)
        logger.info("kdops: the teacher's part '%s' is not compiled: %s", part.name, self.refused[part.name])
        if not _of_the_compiler(error):
            self._take_parts_of(self._network if part.module is None else part.module)

    def _take_parts_of(self, module: nn.Module) -> None:
        for child in module.children():
            if child in self._parts or not _worthwhile(child):
                continue
            if type(child).forward is nn.Module.forward:  # a list of modules
                self._take_parts_of(child)
            else:
                self._parts[child] = part = _Part(self, self._names[child], child.forward, child)
                vars(child)["forward"] = part

    @contextlib.contextmanager
    def _in_place(self) -> Iterator[None]:
        for module, part in self._parts.items():
            vars(module)["forward"] = part
        try:
            yield
        finally:
            for part in self._parts.values():
                part.restore()


class _Part:
    """A function that is compiled when it is first called, and not any more once that has failed."""

    def __init__(self, owner: CompiledParts, name: str, function: Callable[..., Any], module: nn.Module | None) -> None:
        self.owner, self.name, self.function, self.module = owner, name, function, module
        self.own = None if module is None else vars(module).get("forward")
        self.given_up = False
        self.code: types.CodeType | None = None
        self.compiled: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.given_up:
            return self.function(*args, **kwargs)
        try:
            if self.compiled is None:
                self.compiled = self._compile()
            output = self.compiled(*args, **kwargs)
        except Exception as error:  # whatever is wrong with the call itself shows again without the compiler
            self.given_up = True
            self.forget()
            self.owner.gave_up(self, error)
            return self.function(*args, **kwargs)
        self.owner._leave()
        return output

    def forget(self) -> None:
        """Let go of the compiled code, which PyTorch keeps with the function's code."""
        if self.code is not None:
            from torch._dynamo.eval_frame import reset_code

            reset_code(self.code)
        self.code = self.compiled = None

    def restore(self) -> None:
        """Give the module its own forward back."""
        if self.own is None:
            vars(self.module).pop("forward", None)
        else:
            vars(self.module)["forward"] = self.own

    def _compile(self) -> Callable[..., Any]:
        function = self.function

        def teacher_part(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        # Code of its own: PyTorch limits and keeps what it compiles by the code object.
        self.code = teacher_part.__code__.replace()
        own = types.FunctionType(self.code, teacher_part.__globals__, closure=teacher_part.__closure__)
        return torch.compile(own, fullgraph=True, options=self.owner._options)


def _without_result(
    call: Callable[..., Any], network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Run the network for its hooks alone, so that the compiler leaves out what they do not need."""
    call(network, *args, **kwargs)


def _kept_by_pytorch() -> list[Any] | None:
    """The generated modules, which PyTorch keeps with the weights that are frozen in them.

    None for older versions, which take a module that they have for another network of the same form.
    """
    from torch._inductor.codecache import PyCodeCache

    return getattr(PyCodeCache, "modules", None)


def _graph_capture() -> dict[str, Any]:
    import torch._inductor.config as config

    wanted = {"triton.cudagraphs": True, "triton.cudagraph_skip_dynamic_graphs": True}
    return {name: value for name, value in wanted.items() if hasattr(config.triton, name.split(".")[1])}


def _worthwhile(module: nn.Module) -> bool:
    """Whether there are two layers or more to bring together."""
    return sum(next(part.parameters(recurse=False), None) is not None for part in module.modules()) > 1


def _of_the_compiler(error: Exception) -> bool:
    """Whether the compiler itself fails, as without a C++ compiler, so that it would fail in every part."""
    return any(kind.__name__ in ("BackendCompilerFailed", "InductorError") for kind in type(error).__mro__)
