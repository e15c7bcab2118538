"""Small detectors for the tests of kdops.distill, and the plain eager form of what a Distiller should compute."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYERS = ("neck.out.0", "neck.out.1")


class DropPath(nn.Module):
    """Skips its branch for random images while training, as in Swin."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * (torch.rand(x.shape[0], 1, 1, 1) < 0.5) * 2


class Neck(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(F.silu(layer(x)) for layer, x in zip(self.out, maps))


class Detector(nn.Module):
    """Stem, two stages, a neck that returns a tuple, a shared head; returns a dict of losses when given targets."""

    def __init__(self, width: int, drop: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.stage = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.drop = nn.Sequential(DropPath(), nn.Dropout(0.5)) if drop else nn.Identity()
        self.neck = Neck(width)
        self.head = nn.Conv2d(width, 4, 1)

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        c1 = self.drop(self.stem(images))
        maps = self.neck([c1, self.stage(c1)])
        out = torch.cat([self.head(x).flatten(2) for x in maps], dim=2)
        return out if targets is None else {"loss_box": (out.mean(2) - targets).square().mean()}


def images(n: int = 4, size: int = 16, seed: int = 1) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def targets(n: int = 4, seed: int = 2) -> Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))


def pair(student_width: int = 6, teacher_width: int = 10, drop: bool = False) -> tuple[Detector, Detector]:
    torch.manual_seed(0)
    return Detector(student_width), Detector(teacher_width, drop)


def maps_of(network: nn.Module, layers: tuple[str, ...], *args: Tensor) -> list[Tensor]:
    """The outputs of layers, read by hooks of the test's own."""
    seen: dict[str, Tensor] = {}
    handles = [
        network.get_submodule(layer).register_forward_hook(lambda _m, _a, out, layer=layer: seen.update({layer: out}))
        for layer in layers
    ]
    network(*args)
    for handle in handles:
        handle.remove()
    return [seen[layer] for layer in layers]


def teacher_maps(teacher: nn.Module, layers: tuple[str, ...], *args: Tensor) -> list[Tensor]:
    """The outputs of an untouched copy of the teacher in eval mode."""
    with torch.no_grad():
        return maps_of(copy.deepcopy(teacher).eval(), layers, *args)


def cwd_batch(student: Tensor, teacher: Tensor, tau: float = 1.0) -> Tensor:
    """CWD over batch-normalised maps, in float64 and in the words of the paper."""
    s, t = (F.batch_norm(x.double(), None, None, training=True, eps=1e-5).flatten(2) / tau for x in (student, teacher))
    kl = (t.softmax(2) * (t.log_softmax(2) - s.log_softmax(2))).sum(2)
    return tau**2 * kl.mean()


def cwd_plain(student: Tensor, teacher: Tensor) -> Tensor:
    """CWD without normalisation, in float64."""
    s, t = student.double().flatten(2), teacher.double().flatten(2)
    return (t.softmax(2) * (t.log_softmax(2) - s.log_softmax(2))).sum(2).mean()


def gradients(*modules: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for module in modules for p in module.parameters() if p.grad is not None]
