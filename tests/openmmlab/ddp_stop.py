"""One of the processes of test_ddp.py: ddp_stop.py FORM FOLDER."""
from __future__ import annotations

import copy
import sys

import torch
import toys
from mmengine.dist import get_rank
from mmengine.hooks import Hook

STOP_EPOCH = 2
STOP = dict(type="mmrazor.KDOpsStopDistillHook", stop_epoch=STOP_EPOCH)
FORMS = {
    "mmrazor": dict(hooks=[STOP], model=toys.algorithm()),
    "mmrazor, fused": dict(hooks=[dict(type="mmrazor.KDOpsFuseHook"), STOP], model=toys.algorithm()),
    "mmdet": dict(
        hooks=[dict(type="mmdet.KDOpsDistillHook"), dict(type="mmdet.KDOpsStopHook", stop_epoch=STOP_EPOCH)],
        model=toys.detector(), default_scope="mmdet"),
}


class Watch(Hook):
    """Notes every step's losses, and the distiller's parameters as long as there is distillation."""

    def __init__(self):
        self.losses, self.distiller = [], {}

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses.append({name: float(value) for name, value in outputs.items()})
        if runner.epoch < STOP_EPOCH:
            self.distiller = copy.deepcopy(dict(runner.model.module.distiller.named_parameters()))


def main(form: str, folder: str) -> None:
    torch.distributed.init_process_group("gloo")  # mmengine's own start of the processes asks for a GPU
    if form == "mmdet":
        import kdops.integrations.mmdet  # noqa: F401
    else:
        import kdops.integrations.mmrazor  # noqa: F401
    watch = Watch()
    options = dict(FORMS[form])
    runner = toys.runner(
        f"{folder}/run", [*options.pop("hooks"), watch], launcher="pytorch", optim_wrapper=toys.SGD,
        cfg=dict(model_wrapper_cfg=dict(device_ids=None, find_unused_parameters=False)), **options)
    runner.train()
    found = dict(
        losses=watch.losses, distiller=watch.distiller, student=dict(runner.model.module.named_parameters()),
        batch_norms=[name for name, module in runner.model.module.named_modules() if "BatchNorm" in str(type(module))])
    torch.save(found, f"{folder}/rank{get_rank()}.pth")
    # Left to the interpreter's exit, gloo's threads may end the process with an abort.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
