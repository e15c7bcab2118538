"""What CWD compares, as pictures: the softmax over the positions of every normalised channel of an FPN output."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .data import CocoFolder
from .models import FPN_LEVELS

EPS = 1e-5  # as norm="batch" of kdops


@dataclass
class LevelMaps:
    """One level's FPN output, Tensor[N, C, H, W], and its channel attention, a distribution over H and W."""

    features: Tensor

    @property
    def attention(self) -> Tensor:
        x = self.features.float()
        mean = x.mean(dim=(0, 2, 3), keepdim=True)
        variance = x.var(dim=(0, 2, 3), keepdim=True, correction=0)
        normalised = (x - mean) / (variance + EPS).sqrt()
        return normalised.flatten(2).softmax(dim=2).unflatten(2, x.shape[2:])

    @property
    def mean_attention(self) -> Tensor:
        """Tensor[N, H, W], the mean over the channels."""
        return self.attention.mean(dim=1)


@torch.no_grad()
def level_maps(
    model: nn.Module, data: CocoFolder, indices: list[int], device: torch.device, aligns: list[nn.Module] = ()
) -> list[LevelMaps]:
    """The FPN outputs on some images, one entry per level, on the CPU; ``aligns`` are applied where given."""
    kept: list[Tensor] = []
    layers = [model.get_submodule(name) for name in FPN_LEVELS]
    hooks = [layer.register_forward_hook(lambda _module, _inputs, output: kept.append(output)) for layer in layers]
    try:
        model.eval()
        model([data[index][0].to(device) for index in indices])
    finally:
        for hook in hooks:
            hook.remove()
    kept.reverse()  # the FPN works from the coarsest level to the finest
    if aligns:
        kept = [align(features) for align, features in zip(aligns, kept)]
    return [LevelMaps(features.float().cpu()) for features in kept]


def agreement(teacher: LevelMaps, student: LevelMaps) -> float:
    """Pearson correlation of the two mean attentions over all positions of all images."""
    maps = torch.stack((teacher.mean_attention.flatten(), student.mean_attention.flatten()))
    return float(torch.corrcoef(maps)[0, 1])
