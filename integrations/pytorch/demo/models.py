"""Plain torchvision detectors (FCOS, RetinaNet) with an FPN, in widths that train from scratch in minutes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet, conv1x1

from .files import save_checkpoint

# The FPN outputs of strides 8, 16 and 32. The pooled fourth level repeats the third and is not distilled.
FPN_LEVELS = ("backbone.fpn.layer_blocks.0", "backbone.fpn.layer_blocks.1", "backbone.fpn.layer_blocks.2")
FPN_STRIDES = (8, 16, 32)


class SlimResNet(nn.Module):
    """A ResNet of torchvision's BasicBlocks with any number of channels in its first stage (resnet18 has 64)."""

    def __init__(self, blocks: tuple[int, ...], width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        inner = width
        for stage, count in enumerate(blocks):
            outer, stride = width * 2**stage, 1 if stage == 0 else 2
            shortcut = None
            if stride != 1:
                shortcut = nn.Sequential(conv1x1(inner, outer, stride), nn.BatchNorm2d(outer))
            layer = [BasicBlock(inner, outer, stride, shortcut), *(BasicBlock(outer, outer) for _ in range(count - 1))]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layer))
            inner = outer
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


# name: (make the backbone, channels of its stages 2 to 4)
BACKBONES = {
    "slim10": (lambda: SlimResNet((1, 1, 1, 1), 32), (64, 128, 256)),
    "slim18": (lambda: SlimResNet((2, 2, 2, 2), 32), (64, 128, 256)),
    "resnet18": (lambda: ResNet(BasicBlock, [2, 2, 2, 2], zero_init_residual=True), (128, 256, 512)),
    "resnet34": (lambda: ResNet(BasicBlock, [3, 4, 6, 3], zero_init_residual=True), (128, 256, 512)),
    "resnet50": (lambda: ResNet(Bottleneck, [3, 4, 6, 3], zero_init_residual=True), (512, 1024, 2048)),
}
MODELS = ("fcos", "retinanet")


@dataclass(frozen=True)
class DetectorConfig:
    """``num_classes`` counts the background, as torchvision does."""

    model: str
    backbone: str
    fpn_channels: int
    num_classes: int
    image_size: int


def build_detector(config: DetectorConfig) -> nn.Module:
    """The plain torchvision model, randomly initialised."""
    if config.backbone not in BACKBONES:
        raise ValueError(f"build_detector: backbone must be one of {', '.join(BACKBONES)}, got {config.backbone!r}")
    if config.model not in MODELS:
        raise ValueError(f"build_detector: model must be one of {', '.join(MODELS)}, got {config.model!r}")
    make, channels = BACKBONES[config.backbone]
    stages = {"layer2": "0", "layer3": "1", "layer4": "2"}
    backbone = BackboneWithFPN(make(), stages, list(channels), config.fpn_channels)
    common = {
        "num_classes": config.num_classes,
        "min_size": config.image_size,
        "max_size": config.image_size,
        "score_thresh": 0.05,
        "topk_candidates": 400,
    }
    return (_fcos if config.model == "fcos" else _retinanet)(backbone, config, common)


def _fcos(backbone: nn.Module, config: DetectorConfig, common: dict[str, Any]) -> nn.Module:
    anchors = AnchorGenerator(tuple((size,) for size in (8, 16, 32, 64)), ((1.0,),) * 4)
    head = FCOSHead(config.fpn_channels, 1, config.num_classes, num_convs=2)
    # The distances to the box's sides pass a ReLU. From torchvision's start at 0, an early large step can put it to
    # sleep for good; from 1 (an anchor's size) it stays awake.
    nn.init.ones_(head.regression_head.bbox_reg.bias)
    return FCOS(backbone, anchor_generator=anchors, head=head, **common)


def _retinanet(backbone: nn.Module, config: DetectorConfig, common: dict[str, Any]) -> nn.Module:
    sizes = tuple((size, int(size * 2 ** (1 / 3)), int(size * 2 ** (2 / 3))) for size in (16, 32, 64, 128))
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 4)
    head = RetinaNetHead(config.fpn_channels, 9, config.num_classes, norm_layer=_group_norm)
    return RetinaNet(backbone, anchor_generator=anchors, head=head, **common)


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(32, channels)


def save_student(path: Path, model: nn.Module, config: DetectorConfig, meta: dict[str, Any]) -> None:
    """The student alone, as ``{"model": state_dict, "meta": {...}}``: no teacher, no align layer, no optimizer."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_checkpoint(path, {"model": weights, "meta": {**meta, "detector": asdict(config)}})


def load_student(path: Path) -> nn.Module:
    """The plain torchvision model of a checkpoint that `save_student` wrote."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    model = build_detector(DetectorConfig(**checkpoint["meta"]["detector"]))
    model.load_state_dict(checkpoint["model"])
    return model.eval()


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def forward_gflops(model: nn.Module, image_size: int) -> float:
    """Multiplications and additions of one image's forward pass through backbone and head, in units of 1e9."""
    from torch.utils.flop_counter import FlopCounterMode

    device = next(model.parameters()).device
    training = model.training
    model.eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model.head(list(model.backbone(torch.zeros(1, 3, image_size, image_size, device=device)).values()))
    model.train(training)
    return counter.get_total_flops() / 1e9
