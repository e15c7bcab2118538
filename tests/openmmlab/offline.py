"""Lets configs whose weights would be downloaded start from random ones."""
from __future__ import annotations

from typing import Any

from mmengine.config import Config
from mmengine.hub import get_config


def offline(model_cfg: Any) -> Any:
    """A model config without downloads, its teachers written out in place of the names of their configs."""
    if isinstance(model_cfg, (list, tuple)):
        return type(model_cfg)(offline(item) for item in model_cfg)
    if not isinstance(model_cfg, dict):
        return model_cfg
    changed = {key: offline(value) for key, value in model_cfg.items()}
    if isinstance(changed.get("init_cfg"), dict) and changed["init_cfg"].get("type") == "Pretrained":
        changed["init_cfg"] = None
    if "teacher_checkpoint" in changed:
        changed["teacher_checkpoint"] = None
        if isinstance(changed["teacher"], str):
            changed["teacher"] = offline(get_config(changed["teacher"]).model)
    return type(model_cfg)(changed)


def offline_config(path: Any) -> Config:
    cfg = Config.fromfile(path)
    cfg.model = offline(cfg.model)
    return cfg
