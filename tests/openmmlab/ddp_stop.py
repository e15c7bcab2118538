"""One of the processes of test_two_processes_need_no_find_unused_parameters."""
from __future__ import annotations

import sys

import kdops.integrations.mmrazor  # noqa: F401
import torch
import toys
from mmengine.dist import get_rank
from mmengine.hooks import Hook


class Losses(Hook):
    def __init__(self):
        self.names = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.names.append(sorted(outputs))


def main(folder: str) -> None:
    torch.distributed.init_process_group("gloo")  # mmengine's own start of the processes asks for a GPU
    losses = Losses()
    hooks = [dict(type="mmrazor.KDOpsStopDistillHook", stop_epoch=2), losses]
    runner = toys.runner(
        f"{folder}/run", hooks, launcher="pytorch",
        cfg=dict(model_wrapper_cfg=dict(device_ids=None, find_unused_parameters=False)))
    runner.train()
    state = dict(runner.model.module.named_parameters())
    torch.save(dict(losses=losses.names, state=state), f"{folder}/rank{get_rank()}.pth")


if __name__ == "__main__":
    main(sys.argv[1])
