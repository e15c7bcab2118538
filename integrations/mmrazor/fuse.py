"""Rewrites normalise-then-CWD, as RTMDet's distillation configs write it, into one fused loss.

The pattern: the student's map goes through a ConvModuleConnector whose norm is BN(affine=False,
track_running_stats=False) without activation, the teacher's through a NormConnector with the same norm, and both into
ChannelWiseDivergence. That BN has no parameters and no buffers, so the connector without it has the same state-dict
keys, and ``norm="batch"`` in the loss computes the same values with no normalised map in memory.
"""
from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Union

from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log
from mmrazor.models.distillers import ConfigurableDistiller
from mmrazor.registry import MODELS
from torch import device, nn

CWD_TYPES = ("ChannelWiseDivergence", "KDOpsChannelWiseDivergence")
BATCH_NORM_TYPES = ("BN", "BN2d")
BATCH_NORM_EPS = 1e-5
CONV_NORM_ACT = ("conv", "norm", "act")

Cfg = Union[Config, ConfigDict, dict]


@dataclass
class FuseReport:
    """The result of `fuse`: the names of losses that it rewrote, and of those that it left, each with the reason."""

    fused: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"kdops: fused normalisation and CWD of {', '.join(self.fused) or 'no loss'}"]
        lines += [f"kdops: left {name}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


def fuse(cfg: Cfg) -> tuple[Cfg, FuseReport]:
    """Rewrite the normalise-then-CWD pattern of a config into a plain connector and the fused normalising loss.

    Values, gradients and state-dict keys stay the same; the normalised maps and the softmax maps are never stored.

    Args:
        cfg: a whole config (with ``model.distiller``), a model config (with ``distiller``), or the config of a
            ConfigurableDistiller. Not changed.

    Returns:
        A rewritten copy of ``cfg``, and a report of what was rewritten, what was left and why, which is also logged.

    Raises:
        ValueError: ``cfg`` has no distiller.
    """
    cfg = copy.deepcopy(cfg)
    report = _fuse_distiller(_find_distiller(cfg))
    print_log(str(report), logger="current", level=logging.INFO)
    return cfg, report


@MODELS.register_module()
class KDOpsDistiller(ConfigurableDistiller):
    """MMRazor's ConfigurableDistiller that applies `fuse` to its own config.

    The command-line form of `fuse`: ``--cfg-options model.distiller.type=KDOpsDistiller``. A config without losses, or
    one that MMRazor rejects, is passed to MMRazor unchanged.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**(fuse(kwargs)[0] if _well_formed(kwargs) else kwargs))


def _well_formed(cfg: Mapping) -> bool:
    """Whether there are losses and mappings to read; if not, MMRazor's distiller raises its own error."""
    mappings = cfg.get("loss_forward_mappings") or {}
    if not isinstance(cfg.get("distill_losses"), Mapping) or not isinstance(mappings, Mapping):
        return False
    return all(
        isinstance(mapping, Mapping) and all(isinstance(record, Mapping) for record in mapping.values())
        for mapping in mappings.values()
    )


def fuse_in_place(distiller: ConfigurableDistiller, cfg: Cfg) -> FuseReport:
    """Rewrite a distiller that is already built as `fuse` rewrites its config.

    Connectors keep their Parameter objects, so an optimizer or DistributedDataParallel that refers to them still works.
    No random number is drawn.

    Args:
        distiller: built from ``cfg``; changed.
        cfg: as `fuse` takes it. Not changed.

    Returns:
        The report of `fuse`, which is also logged.

    Raises:
        ValueError: ``cfg`` has no distiller, or the connectors of another one.
    """
    cfg = _with_synchronised_norms(_find_distiller(cfg), distiller)
    fused, report = fuse(cfg)
    for name in report.fused:
        distiller.distill_losses[name] = _build_on_meta(fused["distill_losses"][name])
    for name, connector in (cfg.get("connectors") or {}).items():
        if name not in fused["connectors"]:
            del distiller.connectors[name]
        elif fused["connectors"][name] != connector:
            plain = _build_on_meta(fused["connectors"][name])
            _share_parameters(distiller.connectors[name], plain)
            distiller.connectors[name] = plain
    distiller.loss_forward_mappings = fused.get("loss_forward_mappings") or {}
    return report


def _with_synchronised_norms(cfg: Cfg, distiller: ConfigurableDistiller) -> Cfg:
    """A copy of the config with the norms that mmengine's ``sync_bn=`` has replaced in the model."""
    cfg = copy.deepcopy(cfg)
    connectors = cfg.get("connectors") or {}
    if set(connectors) != set(distiller.connectors):
        raise ValueError(
            f"fuse_in_place: the distiller must have the connectors of its config, {sorted(connectors)}, "
            f"got {sorted(distiller.connectors)}"
        )
    for name, connector in connectors.items():
        synchronised = any("SyncBatchNorm" in type(module).__name__ for module in distiller.connectors[name].modules())
        if synchronised and isinstance(connector, Mapping) and connector.get("norm_cfg"):
            connector["norm_cfg"]["type"] = "SyncBN"
    return cfg


def _build_on_meta(cfg: Cfg) -> nn.Module:
    """A module on the meta device: its parameters are neither allocated nor initialised."""
    with device("meta"):
        return MODELS.build({**cfg, "_scope_": "mmrazor"})


def _share_parameters(source: nn.Module, target: nn.Module) -> None:
    """Replace a module's parameters by the Parameter objects of the same names in another."""
    for name, parameter in source.named_parameters():
        path, _, leaf = name.rpartition(".")
        setattr(target.get_submodule(path), leaf, parameter)


def _find_distiller(cfg: Cfg) -> Cfg:
    for keys in (("model", "distiller"), ("distiller",), ()):
        found = cfg
        for key in keys:
            found = found.get(key) if isinstance(found, (Mapping, Config)) else None
        if isinstance(found, (Mapping, Config)) and found.get("distill_losses") is not None:
            return found
    raise ValueError("fuse: cfg must have distill_losses at model.distiller, at distiller or at its top, got none")


def _fuse_distiller(distiller: Cfg) -> FuseReport:
    report = FuseReport()
    losses, mappings = distiller["distill_losses"], distiller.get("loss_forward_mappings") or {}
    connectors = distiller.get("connectors") or {}
    users = _connector_users(mappings)
    eps_of = {}
    for name in losses:
        try:
            eps_of[name] = _matched_eps(losses[name], mappings.get(name), connectors)
        except _NoMatch as reason:
            report.left[name] = str(reason)
    _drop_shared_with_others(eps_of, mappings, users, report)
    for name, eps in eps_of.items():
        losses[name].update(type="mmrazor.KDOpsChannelWiseDivergence", norm="batch", eps=eps)
        _without_norm(connectors[mappings[name]["preds_S"]["connector"]])
        connectors.pop(mappings[name]["preds_T"].pop("connector"), None)
        report.fused.append(name)
    return report


class _NoMatch(Exception):
    """Why a loss does not match the pattern."""


def _matched_eps(loss: Cfg, mapping: Cfg | None, connectors: Cfg) -> float:
    """The eps of the pair of norms that feeds a CWD loss; raises _NoMatch if it does not match."""
    if _type_name(loss) not in CWD_TYPES:
        raise _NoMatch(f"its type is {loss['type']}, not one of {', '.join(CWD_TYPES)}")
    if loss.get("norm") is not None:
        raise _NoMatch(f"it has norm={loss['norm']!r} already")
    if mapping is None or set(mapping) != {"preds_S", "preds_T"}:
        raise _NoMatch("loss_forward_mappings does not give it exactly preds_S and preds_T")
    eps = []
    for key, kind in (("preds_S", "ConvModuleConnector"), ("preds_T", "NormConnector")):
        if mapping[key].get("connector_idx") is not None:
            raise _NoMatch(f"{key} takes one item of its connector's output")
        connector = connectors.get(mapping[key].get("connector"))
        if not isinstance(connector, Mapping) or _type_name(connector) != kind:
            raise _NoMatch(f"{key} does not go through a {kind}")
        eps.append(_plain_batch_norm_eps(key, connector))
    if mapping["preds_S"]["from_student"] is not True or mapping["preds_T"]["from_student"] is not False:
        raise _NoMatch("preds_S must come from the student and preds_T from the teacher")
    student = connectors[mapping["preds_S"]["connector"]]
    # mmcv's default activation is ReLU, so a missing act_cfg is not "none".
    if student.get("act_cfg", "ReLU") is not None:
        raise _NoMatch("the student's connector has an activation")
    if tuple(student.get("order", CONV_NORM_ACT)) != CONV_NORM_ACT:
        raise _NoMatch(f"the student's connector has order={student['order']!r}")
    if eps[0] != eps[1]:
        raise _NoMatch(f"the two norms differ in eps ({eps[0]} and {eps[1]})")
    return eps[0]


def _plain_batch_norm_eps(key: str, connector: Cfg) -> float:
    norm = connector.get("norm_cfg")
    if norm is None or norm["type"] not in BATCH_NORM_TYPES:
        raise _NoMatch(f"the norm of {key} is {norm and norm['type']}, not one of {', '.join(BATCH_NORM_TYPES)}")
    if norm.get("affine", True) or norm.get("track_running_stats", True):
        raise _NoMatch(f"the norm of {key} is not BN(affine=False, track_running_stats=False)")
    return norm.get("eps", BATCH_NORM_EPS)


def _connector_users(mappings: Cfg) -> dict[str, set[str]]:
    users: dict[str, set[str]] = {}
    for name, mapping in mappings.items():
        for record in mapping.values():
            if record.get("connector"):
                users.setdefault(record["connector"], set()).add(name)
    return users


def _drop_shared_with_others(
    eps_of: dict[str, float], mappings: Cfg, users: dict[str, set[str]], report: FuseReport
) -> None:
    """Leave losses whose connector also feeds a loss that was left: that one still needs the norm."""
    changed = True
    while changed:
        changed = False
        for name in list(eps_of):
            own = {mappings[name][key]["connector"] for key in ("preds_S", "preds_T")}
            others = {user for connector in own for user in users[connector]} - set(eps_of)
            if others:
                del eps_of[name]
                report.left[name] = f"it shares a connector with {', '.join(sorted(others))}"
                changed = True


def _without_norm(connector: Cfg) -> None:
    """Remove the norm from a ConvModuleConnector config; with it, bias="auto" meant no bias, so set that explicitly."""
    if connector.pop("norm_cfg", None) is not None and connector.get("bias", "auto") == "auto":
        connector["bias"] = False


def _type_name(cfg: Cfg) -> str:
    kind = cfg["type"]
    return kind.split(".")[-1] if isinstance(kind, str) else kind.__name__
