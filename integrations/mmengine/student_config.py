"""The student's own config, made from the config of its distillation."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.runner import Runner

from kdops.distill.checkpoints import STUDENT_CONFIG

#: The keys of the student's config in a model's config: of KDOpsDistilledDetector, and of MMRazor's algorithms.
STUDENT_NAMES = ("student", "architecture")
#: Packages, hooks and loops that only distillation uses.
IMPORTS = ("kdops", "mmrazor")
HOOKS = ("StopDistillHook",)
VAL_LOOPS = {"SingleTeacherDistillValLoop": "ValLoop"}


def note_student_config(runner: Runner, checkpoint: dict) -> None:
    """Add the student's own config to a checkpoint's meta, if the run's config has a student."""
    plain = student_config(runner.cfg)
    if plain is not None:
        checkpoint["meta"][STUDENT_CONFIG] = plain.pretty_text


def student_config(cfg: Config) -> Config | None:
    """The config of the student alone: the same data, evaluation and schedule, without distillation.

    Args:
        cfg: config of a run. Not changed.

    Returns:
        The student's config; None if the run's model has no student with a config.
    """
    plain = copy.deepcopy(cfg)
    model = _student(plain.get("model"))
    if model is None:
        return None
    plain.model = model
    plain.pop("find_unused_parameters", None)
    if isinstance(plain.get("custom_imports"), Mapping):
        imports = plain.custom_imports["imports"]
        imports = [imports] if isinstance(imports, str) else imports
        plain.custom_imports["imports"] = [name for name in imports if name.split(".")[0] not in IMPORTS]
    if isinstance(plain.get("custom_hooks"), (list, tuple)):
        plain.custom_hooks = [hook for hook in plain.custom_hooks if not _distils(hook)]
    if isinstance(plain.get("default_hooks"), Mapping):
        plain.default_hooks = {name: hook for name, hook in plain.default_hooks.items() if not _distils(hook)}
    loop = VAL_LOOPS.get(_type_name(plain.get("val_cfg")))
    if loop is not None:
        plain.val_cfg["type"] = loop
    return plain


def _student(model: Any) -> Any:
    """The student's part of a model's config, which may be the name of a config file (MMRazor's ``cfg_path``)."""
    if not isinstance(model, Mapping):
        return None
    student = next((model[name] for name in STUDENT_NAMES if isinstance(model.get(name), Mapping)), None)
    if student is not None and student.get("cfg_path") and not student.get("type"):
        student = _from_file(**student)
    if student is not None and model.get("data_preprocessor") is not None:
        student["data_preprocessor"] = model["data_preprocessor"]
    return student


def _from_file(cfg_path: str, pretrained: bool = False, **options: Any) -> Any:
    """The model that mmengine's `get_model` builds, as a config."""
    cfg = get_config(cfg_path)
    if "data_preprocessor" in cfg:
        cfg.model.data_preprocessor = cfg.data_preprocessor
    for name, value in options.items():
        cfg.model.setdefault(name, value)
    cfg.model.setdefault("_scope_", cfg_path.split("::")[0])
    return cfg.model


def _distils(hook: Any) -> bool:
    name = _type_name(hook)
    return name.startswith("KDOps") or name in HOOKS


def _type_name(cfg: Any) -> str:
    kind = cfg.get("type", "") if isinstance(cfg, Mapping) else type(cfg)
    return kind.split(".")[-1] if isinstance(kind, str) else kind.__name__
