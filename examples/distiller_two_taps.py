"""A Distiller that runs the teacher, compares two layers and ends distillation before the last epochs."""

import torch
from torch import nn

from kdops import CWDLoss, Distiller, StopDistillation, Tap


def network(width: int) -> nn.Sequential:
    stage = (nn.Conv2d(3, width, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, padding=1))
    return nn.Sequential(*stage, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


torch.manual_seed(0)
student, teacher = network(8), network(32)
loss = CWDLoss(norm="batch")
taps = [Tap("0", loss=loss, align=(8, 32)), Tap("2", loss=loss, align=(16, 64))]  # layers as in named_modules()
distiller = Distiller(student, teacher, taps, stop=StopDistillation(epoch=4))
optimizer = torch.optim.AdamW([*student.parameters(), *distiller.parameters()], lr=1e-2)
images, labels = torch.randn(4, 8, 3, 32, 32), torch.randint(10, (4, 8))

for epoch in range(6):
    distiller.set_epoch(epoch)  # from epoch 4 on: no teacher, no hooks, and loss() is 0
    for x, y in zip(images, labels):
        task = nn.functional.cross_entropy(student(x), y)
        distillation = distiller.loss()
        optimizer.zero_grad()
        (task + distillation).backward()
        optimizer.step()
        distiller.step()
    print(f"epoch {epoch}: task {task.item():.4f}, distillation {distillation.total.item():.4f}")
