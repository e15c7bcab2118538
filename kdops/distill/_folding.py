"""Batch norms that become a part of the convolution in front of them, where the code proves that nothing else sees it.

torch.fx traces the largest parts of a network that it can; inside them it is known what reads a convolution's output.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kdops.distill._capture import inert
from kdops.distill._copying import copy_sharing_tensors, hooks_of
from kdops.distill.teacher_options import first_line

__all__ = ["fold_batch_norms"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def fold_batch_norms(network: nn.Module, kept: Collection[str]) -> tuple[list[str], dict[str, str]]:
    """Fold batch norms into convolutions, in place.

    Args:
        network: a network of our own, in eval mode.
        kept: names of layers whose output must stay what it is.

    Returns:
        The names of the convolutions that took in a batch norm, and the batch norms that are left, with the reasons.
    """
    names = {module: name for name, module in network.named_modules()}
    uses = _Uses()
    kept = [*kept, *(name for module, name in names.items() if _hooked(module))]
    traced = _without_hooks(copy_sharing_tensors(network))  # code that runs during a trace may leave traces
    _trace(traced, {module: name for name, module in traced.named_modules()}, uses)
    folded, left = [], {}
    for norm in [module for module in names if _is_batch_norm(module)]:
        name = names[norm]
        convolutions = uses.before.get(name, set())
        source = next(iter(convolutions)) if len(convolutions) == 1 else None
        reason = _why_not(name, norm, source, network, uses, kept)
        if reason is not None:
            left[name] = reason
            continue
        convolution = network.get_submodule(source)
        fused = _fused(convolution, norm)
        convolution.weight, convolution.bias = fused.weight, fused.bias
        _replace(network, norm, nn.Identity().eval())
        folded.append(source)
    return folded, left


class _Uses:
    """What the traces have shown, by the layers' names; None stands for anything else, or for what is not known."""

    def __init__(self) -> None:
        self.behind: dict[str, set[str | None]] = {}  # convolution -> the batch norms that alone read its output
        self.before: dict[str, set[str | None]] = {}  # batch norm -> the convolutions whose output it reads
        self.untraced: dict[str, str] = {}  # layer -> which part that calls it could not be traced, and why

    def add(self, graph: fx.Graph, part: nn.Module, names: dict[nn.Module, str]) -> None:
        """Note who reads what in one part of the network."""

        def layer(node: Any, kind: Any) -> str | None:
            if not isinstance(node, fx.Node) or node.op != "call_module":
                return None
            module = part.get_submodule(node.target)
            return names[module] if kind(module) else None

        for node in graph.nodes:
            convolution, norm = layer(node, _is_convolution), layer(node, _is_batch_norm)
            if convolution is not None:
                reader = layer(next(iter(node.users)), _is_batch_norm) if len(node.users) == 1 else None
                self.behind.setdefault(convolution, set()).add(reader)
            if norm is not None:
                source = layer(node.args[0], _is_convolution) if len(node.args) == 1 else None
                self.before.setdefault(norm, set()).add(source)


def _trace(module: nn.Module, names: dict[nn.Module, str], uses: _Uses) -> None:
    """Trace a module, or, where that fails, its parts."""
    try:
        graph = _Tracer().trace(module, concrete_args=_defaults(module))
    except Exception as error:  # the code of a network may fail in any way when it is given proxies
        why = f"{type(module).__name__} '{names[module]}', which calls it, cannot be traced ({first_line(error)})"
        for child in module.children():
            if _is_convolution(child) or _is_batch_norm(child):
                uses.behind.setdefault(names[child], set()).add(None)
                uses.before.setdefault(names[child], set()).add(None)
                uses.untraced[names[child]] = why
            elif any(_is_convolution(part) for part in child.modules()):
                _trace(child, names, uses)
    else:
        uses.add(graph, module, names)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_convolution(m) or _is_batch_norm(m) or super().is_leaf_module(m, module_qualified_name)


def _defaults(module: nn.Module) -> dict[str, Any]:
    parameters = inspect.signature(module.forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _why_not(
    name: str, norm: nn.Module, source: str | None, network: nn.Module, uses: _Uses, kept: Collection[str]
) -> str | None:
    """Why a batch norm cannot be folded, None if it can."""
    if type(norm) not in _BATCH_NORMS:
        return f"it is a {type(norm).__name__}, not one of PyTorch's plain batch norms"
    if norm.running_mean is None or norm.running_var is None:
        return "it takes its statistics from the batch"
    if name in uses.untraced:
        return uses.untraced[name]
    if source is None:
        return "it does not follow one convolution, and nothing else"
    convolution = network.get_submodule(source)
    if uses.behind[source] != {name}:
        return uses.untraced.get(source, f"the output of '{source}' is read elsewhere too")
    if type(convolution) not in (*_CONVOLUTIONS, *_TRANSPOSED):
        return f"'{source}' is a {type(convolution).__name__}, not one of PyTorch's plain convolutions"
    if type(convolution) in _TRANSPOSED and convolution.groups > 1:
        return f"'{source}' is a transposed convolution in groups"
    if _hooked(norm):
        return "it has hooks"
    if any(_inside(source, layer) and not _inside(name, layer) for layer in kept):
        return f"a tap or a hook needs '{source}' as it is"
    return None


def _fused(convolution: nn.Module, norm: nn.Module) -> nn.Module:
    """The convolution with the batch norm in its weights, which are computed in float64 and rounded once."""
    exact = [copy.deepcopy(module).to("cpu", torch.float64) for module in (convolution, norm)]
    fused = fuse_conv_bn_eval(*exact, transpose=type(convolution) in _TRANSPOSED)
    return fused.to(convolution.weight.device, convolution.weight.dtype).requires_grad_(False)


def _replace(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another, under every name that it has."""
    for parent in list(network.modules()):
        for name, child in list(parent._modules.items()):  # every name, where named_children() gives one
            if child is old:
                setattr(parent, name, new)


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd)


def _is_batch_norm(module: nn.Module) -> bool:
    if isinstance(module, (_BatchNorm, _InstanceNorm)):
        return isinstance(module, _BatchNorm)
    own = dict(module.named_buffers(recurse=False))
    return isinstance(own.get("running_mean"), Tensor) and isinstance(own.get("running_var"), Tensor)


def _hooked(module: nn.Module) -> bool:
    return any(hook is not inert for hook in hooks_of(module))


def _without_hooks(network: nn.Module) -> nn.Module:
    for module in network.modules():
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
    return network


def _inside(name: str, layer: str) -> bool:
    return not layer or name == layer or name.startswith(layer + ".")
