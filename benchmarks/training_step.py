"""Whole training steps of a distilled detector: the share of the loss in a step, with each implementation.

torchvision's FCOS on a ResNet-18, its five FPN outputs distilled from a ResNet-34 by CWD on normalised channels.
Weights are random, images are noise: the time of a step does not depend on either.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks import memory, providers, shapes, timing
from kdops.testing import Case

UNDISTILLED = "without distillation"
PROVIDERS = (UNDISTILLED, providers.EAGER, providers.COMPILE, providers.KDOPS)
#: Images per step and their side, and the dtype that convolutions and so the maps have under autocast.
SIZES = {"cpu": (2, 256, torch.float32), "cuda": (16, 640, torch.bfloat16)}


class TrainingStep:
    """Forward, loss, backward and the optimizer's step of a student beside its teacher."""

    def __init__(self, device: str) -> None:
        batch, self.side, self.dtype = SIZES[device]
        torch.manual_seed(0)
        self.device, self.student = device, _fcos("resnet18", self.side).to(device).train()
        self.teacher = _fcos("resnet34", self.side).backbone.to(device).eval().requires_grad_(False)
        self.student.backbone.register_forward_hook(self._keep)
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=1e-4, momentum=0.9)
        self.images = [torch.rand(3, self.side, self.side, device=device) for _ in range(batch)]
        box = torch.tensor([[0.2, 0.2, 0.7, 0.7]], device=device) * self.side
        self.targets = [{"boxes": box, "labels": torch.ones(1, dtype=torch.int64, device=device)}] * batch
        self.maps: tuple[list[Tensor], list[Tensor]] = ([], [])

    def case(self) -> Case:
        """The loss of a step as a workload."""
        self.run(None)
        return shapes.workload("cwd_loss", *(tuple(m.shape) for m in self.maps[0]), dtype=self.maps[0][0].dtype)

    def run(self, loss: providers.Provider | None) -> None:
        """One step; without a loss the teacher runs too, and only the detector's own losses are minimised."""
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            total = sum(self.student(self.images, self.targets).values())
        if loss is not None:
            total = total + loss(*self.maps)
        total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _keep(self, module: nn.Module, inputs: tuple, output: dict[str, Tensor]) -> None:
        with torch.no_grad():
            self.maps = (list(output.values()), list(self.teacher(*inputs).values()))


def measure(device: str, seconds: float) -> tuple[Case, dict[str, tuple[timing.Quantiles, int]]]:
    """Time and peak memory above weights, images and optimizer state of a step with each loss."""
    step = TrainingStep(device)
    case = step.case()
    losses = {name: None if name == UNDISTILLED else providers.build(name, case) for name in PROVIDERS}
    steps = {name: timing.Step(lambda loss=loss: step.run(loss)) for name, loss in losses.items()}
    samples = timing.interleaved(steps, seconds, device)
    found = {}
    for name in PROVIDERS:
        step.maps = ([], [])  # the last step's maps would count as held before
        found[name] = (timing.quantiles(samples[name][timing.PASS]), memory.peak_above_inputs(steps[name], device))
    return case, found


def _fcos(backbone: str, side: int) -> nn.Module:
    from torchvision.models.detection import FCOS
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    features = resnet_fpn_backbone(
        backbone_name=backbone,
        weights=None,
        trainable_layers=5,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )
    return FCOS(features, num_classes=2, min_size=side, max_size=side)
