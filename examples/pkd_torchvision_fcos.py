"""PKD between two torchvision FCOS detectors, on three levels of their feature pyramids in one call."""

import torch
from torch import nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from kdops import Distiller, PKDLoss, Tap


def detector(backbone: str) -> FCOS:
    levels = {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256), "norm_layer": nn.BatchNorm2d}
    fpn = resnet_fpn_backbone(backbone_name=backbone, weights=None, trainable_layers=5, **levels)
    return FCOS(fpn, num_classes=3, min_size=96, max_size=96)


torch.manual_seed(0)
student, teacher = detector("resnet18"), detector("resnet34")
loss = PKDLoss(loss_weight=10.0)  # the published weight for one-stage detectors
distiller = Distiller(student, teacher, [Tap(f"backbone.fpn.layer_blocks.{i}", loss=loss) for i in range(3)])
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)  # equal widths: no align layer, nothing else to train
images = list(torch.rand(2, 3, 96, 96))
target = {"boxes": torch.tensor([[20.0, 30.0, 70.0, 80.0]]), "labels": torch.tensor([1])}

for step in range(5):
    task = sum(student(images, [target, target]).values())
    distillation = distiller.loss()
    optimizer.zero_grad()
    (task + distillation).backward()
    optimizer.step()
    distiller.step()
    print(f"step {step}: task {task.item():.4f}, distillation {distillation.total.item():.4f}")
