"""Small teachers with the layers and the code that preparing has to get right."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def settle(network: nn.Module, seed: int = 0) -> nn.Module:
    """Give the batch norms statistics and weights of a trained network, and put it in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.3, 3.0, generator=generator)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, generator=generator)
    return network.eval()


def block(before: int, width: int, norm: nn.Module | None = None, **kwargs) -> nn.Sequential:
    convolution = nn.Conv2d(before, width, 3, padding=1, bias=False, **kwargs)
    return nn.Sequential(convolution, norm or nn.BatchNorm2d(width), nn.ReLU(inplace=True))


class OwnBatchNorm(nn.Module):
    """A batch norm that is none of PyTorch's, as torchvision's FrozenBatchNorm2d is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.running_mean[:, None, None]) / (self.running_var[:, None, None] + 1e-5).sqrt()


class Residual(nn.Module):
    """The first convolution's output is read by its batch norm and by the sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        return self.bn2(self.conv2(F.relu(self.bn1(y)))) + y


class SharedConvolution(nn.Module):
    """One convolution before two batch norms, as in RTMDet's head; and a pair that runs twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.bn_a, self.bn_b = nn.Conv2d(width, width, 1), nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.pair = nn.Sequential(nn.Conv2d(width, width, 1), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(F.silu(self.pair(self.bn_a(self.conv(x)) + self.bn_b(self.conv(x)))))


class Branching(nn.Module):
    """Control flow that depends on the values, around a block that can be traced by itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(width, width, 1), nn.BatchNorm2d(width)
        self.block = block(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return self.block(y if y.sum() > 0 else -y)


class Teacher(nn.Module):
    """Two blocks and whatever is to be tried between them and the output."""

    def __init__(self, middle: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.stem = block(3, width)
        self.middle = middle
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.middle(self.stem(x)))


class Student(nn.Module):
    """One layer, whose map fits any teacher of width 8."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)
