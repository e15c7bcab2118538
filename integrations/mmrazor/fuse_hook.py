"""`fuse` as a hook, for a model that the Runner has already built."""
from __future__ import annotations

import logging
from collections.abc import Mapping

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from mmrazor.models.distillers import ConfigurableDistiller
from mmrazor.registry import HOOKS

from .fuse import FuseReport, KDOpsDistiller, fuse_in_place


@HOOKS.register_module()
class KDOpsFuseHook(Hook):
    """Rewrites the model's distiller as `fuse` rewrites its config, before the run begins.

    The optimizer, which is built earlier, keeps the same parameters, and the state dict keeps its keys: a run can be
    resumed with or without the hook. What was rewritten and what was left is logged, and is in ``report``.

    Raises:
        TypeError: the Runner was not built from a config, or its model has no ConfigurableDistiller.
    """

    # Before EMAHook, which copies the model when the run begins.
    priority = "VERY_HIGH"

    def __init__(self) -> None:
        self.report: FuseReport | None = None

    def before_run(self, runner: Runner) -> None:
        # The Runner calls this again before it validates or tests.
        if self.report is not None:
            return
        cfg = runner.cfg.get("model")
        if not isinstance(cfg, Mapping):
            raise TypeError(
                "KDOpsFuseHook: the Runner must be built from a config with a model (Runner.from_cfg), got "
                f"{type(cfg).__name__} for its model"
            )
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        distiller = getattr(model, "distiller", None)
        if not isinstance(distiller, ConfigurableDistiller):
            raise TypeError(
                "KDOpsFuseHook: the model must be an algorithm of MMRazor with a ConfigurableDistiller, got "
                f"{type(model).__name__} with {type(distiller).__name__}"
            )
        if isinstance(distiller, KDOpsDistiller):
            self.report = FuseReport()
            print_log("kdops: a KDOpsDistiller is fused already", logger=runner.logger, level=logging.INFO)
        else:
            self.report = fuse_in_place(distiller, cfg)
