"""Channel-wise distillation in a plain training loop: the teacher's forward and one call of the loss."""

import torch
from torch import nn
from torch.nn import functional as F

from kdops import cwd_loss


def network(width: int) -> nn.ModuleDict:
    body = nn.Sequential(nn.Conv2d(3, width, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
    return nn.ModuleDict({"body": body, "head": nn.Linear(width, 10)})


torch.manual_seed(0)
teacher, student = network(64).eval(), network(16)
align = nn.Conv2d(16, 64, 1, bias=False)  # brings the student's map to the teacher's width, trained with the student
optimizer = torch.optim.AdamW([*student.parameters(), *align.parameters()], lr=1e-2)
images, labels = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))

for step in range(20):
    with torch.no_grad():  # the teacher must not require grad
        target = teacher["body"](images)
    features = student["body"](images)
    task = F.cross_entropy(student["head"](features.mean((2, 3))), labels)
    distillation = cwd_loss(align(features), target, norm="batch")
    optimizer.zero_grad()
    (task + distillation).backward()
    optimizer.step()
    print(f"step {step:2}: task {task.item():.4f}, distillation {distillation.item():.4f}")
