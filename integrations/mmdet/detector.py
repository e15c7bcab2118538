"""A detector of MMDetection with a teacher beside it, built from a config: distillation without MMRazor."""
from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any, Union

import torch
from mmdet.registry import MODELS, TASK_UTILS
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.model import BaseModel
from mmengine.runner import load_checkpoint
from torch import nn

from kdops import Distiller, ProgressiveDistillation, Stage, Tap, TeacherOptions
from kdops.distill import WarmupWeight, exclude_from_ddp

ModelCfg = Union[str, dict]
_FEATURES = ("backbone", "neck")


@MODELS.register_module()
class KDOpsDistilledDetector(BaseModel):
    """A student detector and a `kdops.Distiller` that trains it towards a teacher.

    The student trains, validates and tests as its plain config does; in training, the distillation terms are added to
    its losses as ``distill.loss_<name>``. The state dict has the student's plain keys, so checkpoints load into the
    student's plain config and back, and the distiller's under ``distiller.``; the teacher is in neither the state
    dict nor the parameters, is always in eval mode, and an EMAHook does not copy it.

    Args:
        student: config of the student, or the student.
        teacher: config of the teacher's model, or a config file: a path, or ``"mmdet::retinanet/...py"``.
        teacher_checkpoint: path or URL of the teacher's weights. None leaves them as the config initialises them.
        taps: what is compared: keyword arguments of `kdops.Tap` each, where ``loss``, ``align`` and ``weight`` may be
            configs: ``loss=dict(type="kdops.CWDLoss", norm="batch")``, ``weight=dict(type="kdops.CosineWeight", ...)``.
        weight: factor of all terms: a number, or the config of a schedule.
        split_terms: log the terms of taps that share a loss one by one; it costs a little.
        teacher_options: keyword arguments of `kdops.TeacherOptions`, to prepare every teacher on its first batch:
            ``dict(dtype="bfloat16")``, ``dict()`` for its defaults. None: it runs as it is.
        stages: progressive teachers (MTPD) in place of teacher, taps and weight: dicts with ``teacher``,
            ``teacher_checkpoint``, ``taps``, ``weight``, and a length in ``epochs`` or ``steps``.
        data_preprocessor: as for any model of mmengine; the student's when None.
        init_cfg: mmengine's initialisation config.

    Raises:
        ValueError: both or neither of ``teacher`` and ``stages`` are given, or `kdops.Distiller` raises.
        RuntimeError: stages or schedules, but no KDOpsDistillHook to drive them.
    """

    def __init__(
        self,
        student: dict | nn.Module,
        teacher: ModelCfg | None = None,
        teacher_checkpoint: str | None = None,
        taps: Sequence[dict] = (),
        weight: float | dict = 1.0,
        split_terms: bool = False,
        teacher_options: dict | None = None,
        stages: Sequence[dict] | None = None,
        data_preprocessor: dict | nn.Module | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        if (teacher is None) == (stages is None):
            raise ValueError("KDOpsDistilledDetector: exactly one of teacher and stages must be given")
        student = student if isinstance(student, nn.Module) else MODELS.build(student)
        super().__init__(data_preprocessor or student.data_preprocessor, init_cfg)
        self.student = student
        if stages is None:
            parts = [dict(teacher=teacher, teacher_checkpoint=teacher_checkpoint, taps=taps, weight=weight)]
        else:
            parts = list(stages)
        built = [_stage(**part) for part in parts]
        options = dict(
            run_teacher=_run_features if _only_features(parts) else _run_all,
            split_terms=split_terms,
            teacher_options=None if teacher_options is None else TeacherOptions(**teacher_options),
        )
        if stages is None:
            only = built[0]
            self.distiller = Distiller(student, only.teacher, only.taps, weight=only.weight, **options)
        else:
            self.distiller = ProgressiveDistillation(student, built, **options)
        self.needs_hook = stages is not None or _scheduled(parts)
        self.in_epochs = _in_epochs(built)
        exclude_from_ddp(self)

    def forward(self, inputs: Any, data_samples: Any = None, mode: str = "tensor") -> Any:
        """As the student's; with ``mode="loss"`` in training, its losses and the distillation terms."""
        outputs = self.student(inputs, data_samples, mode=mode)
        if mode != "loss" or not (self.training and torch.is_grad_enabled()):
            return outputs
        if self.needs_hook:
            raise RuntimeError(
                "KDOpsDistilledDetector: stages and weight schedules need custom_hooks=[dict(type='KDOpsDistillHook')]"
            )
        terms = self.distiller.loss().terms
        return {**outputs, **{f"distill.loss_{name}": term for name, term in terms.items()}}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict:
        """The student under its plain names, and the distiller's state."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        for key in [key for key in state if key.startswith(prefix + "student.")]:
            state[prefix + key[len(prefix + "student."):]] = state.pop(key)
        return state

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        ours = (prefix + "student.", prefix + "distiller.")
        for key in [key for key in state_dict if key.startswith(prefix) and not key.startswith(ours)]:
            state_dict[ours[0] + key[len(prefix):]] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


def load_teacher(cfg: ModelCfg, checkpoint: str | None) -> nn.Module:
    """Build a teacher from a model config or a config file, and load its weights."""
    if isinstance(cfg, str):
        cfg = (get_config(cfg) if "::" in cfg else Config.fromfile(cfg)).model
    teacher = MODELS.build(copy.deepcopy(cfg))
    if checkpoint is None:
        teacher.init_weights()
    else:
        load_checkpoint(teacher, checkpoint, map_location="cpu")
    return teacher


def _stage(
    teacher: ModelCfg,
    taps: Sequence[dict],
    teacher_checkpoint: str | None = None,
    weight: float | dict = 1.0,
    epochs: int | None = None,
    steps: int | None = None,
) -> Stage:
    load = functools.partial(load_teacher, teacher, teacher_checkpoint)
    return Stage(load, [_tap(**tap) for tap in taps], epochs=epochs, steps=steps, weight=_built(weight, TASK_UTILS))


def _tap(loss: Any, align: Any = None, weight: Any = 1.0, **names: Any) -> Tap:
    align = tuple(align) if isinstance(align, list) else _built(align, MODELS)  # a dumped config has lists for tuples
    return Tap(loss=_built(loss, MODELS), align=align, weight=_built(weight, TASK_UTILS), **names)


def _built(value: Any, registry: Any) -> Any:
    return registry.build(value) if isinstance(value, dict) else value


def _scheduled(parts: Sequence[dict]) -> bool:
    weights = [part.get("weight", 1.0) for part in parts]
    weights += [tap.get("weight", 1.0) for part in parts for tap in part["taps"]]
    return any(isinstance(weight, dict) for weight in weights)


def _in_epochs(stages: Sequence[Stage]) -> list[str]:
    """A description of what is measured in epochs: stages and schedules."""
    found = [f"stage {number} of {stage.epochs} epochs" for number, stage in enumerate(stages) if stage.epochs]
    for schedule in [weight for stage in stages for weight in (stage.weight, *(tap.weight for tap in stage.taps))]:
        while isinstance(schedule, WarmupWeight):
            schedule = schedule.after
        if getattr(schedule, "epochs", None) is not None:
            found.append(str(schedule))
    return list(dict.fromkeys(found))


def _only_features(parts: Sequence[dict]) -> bool:
    layers = [tap.get("teacher") or tap["student"] for part in parts for tap in part["taps"]]
    return all(layer.split(".")[0].split("[")[0] in _FEATURES for layer in layers)


def _run_features(teacher: nn.Module, inputs: Any, data_samples: Any = None, mode: str = "loss") -> None:
    teacher.extract_feat(inputs)


def _run_all(teacher: nn.Module, inputs: Any, data_samples: Any = None, mode: str = "loss") -> None:
    teacher(inputs, data_samples, mode="tensor")
