"""Builds and steps MMYOLO's RTMDet distillation configs on small random batches."""
from __future__ import annotations

import copy
import os

import mmyolo
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS, DefaultScope
from mmengine.runner import set_random_seed

PAIRS = ("tiny_rtmdet_s", "s_rtmdet_m", "m_rtmdet_l", "l_rtmdet_x")
MMYOLO_CONFIGS = os.path.join(os.path.dirname(mmyolo.__file__), ".mim", "configs")


def stock_config(pair: str) -> Config:
    """MMYOLO's own distillation config, unmodified but for the teacher's checkpoint, which cannot be downloaded."""
    cfg = Config.fromfile(os.path.join(MMYOLO_CONFIGS, "rtmdet", "distillation", f"kd_{pair}_neck_300e_coco.py"))
    cfg.model.teacher_ckpt = None
    return cfg


def drop_downloads(model: torch.nn.Module) -> torch.nn.Module:
    """Initialise from the random seed what the config would initialise from a downloaded checkpoint."""
    for module in model.modules():
        init_cfg = getattr(module, "init_cfg", None)
        if isinstance(init_cfg, dict) and init_cfg.get("type") == "Pretrained":
            module.init_cfg = None
    return model


def build(model_cfg: dict, seed: int = 0, scope: str = "mmyolo") -> torch.nn.Module:
    set_random_seed(seed)
    with DefaultScope.overwrite_default_scope(scope):
        model = drop_downloads(MODELS.build(copy.deepcopy(model_cfg)))
        model.init_weights()
    model.train()  # MMRazor's returns None
    return model


def batch(size: int, seed: int, images: int = 2, boxes: int = 3) -> dict:
    """Random images and boxes as MMYOLO's yolov5_collate gives them."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randint(0, 256, (images, 3, size, size), generator=generator, dtype=torch.uint8)
    rows = []
    for image in range(images):
        for _ in range(boxes):
            corner = torch.rand(2, generator=generator) * size * 0.5
            extent = torch.rand(2, generator=generator) * size * 0.4 + 8
            label = torch.randint(0, 80, (1,), generator=generator).float()
            rows.append(torch.cat([torch.tensor([float(image)]), label, corner, corner + extent]))
    metas = [dict(batch_input_shape=(size, size), img_shape=(size, size)) for _ in range(images)]
    return dict(inputs=inputs, data_samples=dict(bboxes_labels=torch.stack(rows), img_metas=metas))


def train(
    model: torch.nn.Module, cfg: Config, size: int, steps: int = 3, warm_up: bool = True
) -> list[dict[str, torch.Tensor]]:
    """Take some steps with the config's own optimizer, and warm-up if asked for; returns every step's logged losses."""
    optim_wrapper = build_optim_wrapper(model, copy.deepcopy(cfg.optim_wrapper))
    warm_up_cfg = next(cfg_ for cfg_ in cfg.param_scheduler if cfg_["type"] == "LinearLR")
    schedulers = [PARAM_SCHEDULERS.build({**warm_up_cfg, "optimizer": optim_wrapper})] if warm_up else []
    dtype = next(model.parameters()).dtype
    logs = []
    for step in range(steps):
        set_random_seed(step)
        data = batch(size, step)
        data["data_samples"]["bboxes_labels"] = data["data_samples"]["bboxes_labels"].to(dtype)
        logs.append(model.train_step(data, optim_wrapper))
        for scheduler in schedulers:
            scheduler.step()
    return logs


def gradients(model: torch.nn.Module, size: int) -> dict[str, torch.Tensor]:
    """The gradients of one batch's losses, by parameter name."""
    set_random_seed(0)
    model.zero_grad()
    losses = model(**model.data_preprocessor(batch(size, 0), training=True), mode="loss")
    model.parse_losses(losses)[0].backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads
