"""The student alone, out of a checkpoint of a distillation run."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdops.distill._reading import read_checkpoint
from kdops.files import write_atomically

__all__ = ["CALLBACK_MARK", "LAYOUTS", "STUDENT_CONFIG", "CheckpointPart", "StudentCheckpoint", "student_checkpoint"]

#: Names under which checkpoints keep their weights; without one of them the checkpoint itself is a state dict.
_ENTRIES = ("state_dict", "model", "model_state_dict", "student")
#: What wrappers put before every key of a state dict, and the counters of averaged models, which they leave bare.
_WRAPPERS = ("module", "_orig_mod")
_COUNTERS = ("n_averaged", "steps")
#: In the state of Lightning's callback: the student's name in the LightningModule.
CALLBACK_MARK = "kdops_student"
#: In meta, beside ``cfg``, the config of the whole run as mmengine writes it: the config of the student alone.
STUDENT_CONFIG = "kdops_student_cfg"


@dataclass(frozen=True)
class _Layout:
    """Top-level names in the state dict of a distillation run: the student's, and what may stand beside it."""

    student: str
    beside: tuple[str, ...]
    needed: tuple[str, ...] = ()

    def fits(self, names: set[str]) -> bool:
        return {self.student, *self.needed} <= names <= {self.student, *self.beside}


_LAYOUTS = {
    "kdops": _Layout("student", ("distiller",), needed=("distiller",)),
    "mmrazor": _Layout("architecture", ("teacher", "distiller", "data_preprocessor")),
    "mgd": _Layout("student", ("teacher", "distill_losses")),
}
#: The layouts that `student_checkpoint` knows; "mgd" is MTPD's too.
LAYOUTS = tuple(_LAYOUTS)


@dataclass(frozen=True)
class CheckpointPart:
    """Some of a checkpoint: how many tensors, and their bytes."""

    tensors: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.tensors:6d} tensors  {self.bytes / 1e6:10.2f} MB"


@dataclass(frozen=True)
class StudentCheckpoint:
    """What `student_checkpoint` did; ``str()`` of it is the report that the command prints.

    Attributes:
        path: the file that was written.
        layout: the layout of the source, one of ``LAYOUTS``.
        kept: the student.
        dropped: everything else by name: parts of the state dict as ``"state_dict: teacher"``, entries of the
            checkpoint as ``"optimizer"``.
        meta: whether the source had a ``meta``, which is kept.
        averaged: whether the weights are those that mmengine's EMAHook averaged.
    """

    path: Path
    layout: str
    kept: CheckpointPart
    dropped: dict[str, CheckpointPart]
    meta: bool
    averaged: bool

    def __str__(self) -> str:
        width = max(len(name) for name in ("student", *self.dropped))
        lines = [f"layout   {self.layout}", f"kept     {'student':{width}} {self.kept}"]
        lines += [f"dropped  {name:{width}} {part}" for name, part in self.dropped.items()]
        if self.meta:
            lines.append("kept     meta")
        if self.averaged:
            lines.append("weights  the average that mmengine's EMAHook keeps; the raw ones were in ema_state_dict")
        return "\n".join([*lines, f"written  {self.path} ({self.path.stat().st_size / 1e6:.2f} MB)"])


def student_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    layout: str | None = None,
    force: bool = False,
    allow_pickle: bool = False,
) -> StudentCheckpoint:
    """Write the student of a distillation run's checkpoint as a checkpoint of its own, that the plain network loads.

    Known layouts of the weights, by the names in front of their keys:

    ========= =============================== ====================================================
    layout    student                         dropped from the weights
    ========= =============================== ====================================================
    kdops     ``student.``                    ``distiller.``
    mmrazor   ``architecture.``               ``teacher.``, ``distiller.``, ``data_preprocessor.``
    mgd       ``student.`` (MGD and MTPD)     ``teacher.``, ``distill_losses.``
    ========= =============================== ====================================================

    Of kdops, besides the state dict of a `DistilledStudent`: weights of the student alone beside an entry
    ``distiller`` with the distiller's state, and checkpoints of Lightning with kdops' callback.

    Weights are looked for in the entries ``state_dict``, ``model``, ``model_state_dict`` and ``student``, or in the
    checkpoint itself, under the prefixes of DistributedDataParallel and torch.compile too. They are written to the
    entry that they were in, with the ``meta`` that stood beside them; optimizer, schedulers and all else are dropped.
    Where mmengine's EMAHook was at work, ``state_dict`` has the averaged weights, and those are taken. Where kdops'
    hooks for mmengine have noted the student's own config in ``meta``, it becomes the file's ``cfg``.

    Args:
        source: checkpoint of a distillation run, as ``torch.save`` wrote it.
        target: file to write, by way of a temporary file beside it.
        layout: one of ``"kdops"``, ``"mmrazor"``, ``"mgd"``: take this one, whatever else is in the weights. None
            finds it, and refuses weights with parts that it does not know.
        force: replace an existing target.
        allow_pickle: read files that hold more than tensors and plain values. They can run any code: only for files
            from a source that you trust.

    Returns:
        StudentCheckpoint: what was kept and dropped, with counts and bytes.

    Raises:
        FileNotFoundError: no source, or no folder for the target.
        FileExistsError: the target exists and ``force`` is False.
        ValueError: the source is no checkpoint, needs ``allow_pickle``, holds no weights or no student; the layout is
            unknown.
    """
    source, target = Path(source), Path(target)
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"student_checkpoint: layout must be one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"student_checkpoint: the target's folder must exist, got {target.parent}")
    if target.is_dir() or (target.exists() and not force):
        raise FileExistsError(f"student_checkpoint: {target} exists; force=True (--force) replaces a file")
    content = read_checkpoint(source, allow_pickle)
    entry, weights = _weights(source, content)
    layout, prefix, others = _layout_of(source, content, entry, weights, layout)
    student = _extract(weights, prefix)
    dropped = {f"{entry}: {name}" if entry else name: _measure(part) for name, part in others.items()}
    if entry is not None:
        dropped.update({str(k): _measure(v) for k, v in content.items() if k not in (entry, "meta")})
    meta = entry is not None and "meta" in content
    kept: Any = student if entry is None else {**({"meta": _own_meta(content["meta"])} if meta else {}), entry: student}
    write_atomically(target, lambda temporary: torch.save(kept, temporary))
    averaged = entry == "state_dict" and "ema_state_dict" in content
    return StudentCheckpoint(target, layout, _measure(student), dropped, meta, averaged)


def _weights(source: Path, content: Mapping[Any, Any]) -> tuple[str | None, Mapping[str, Any]]:
    """The entry that holds the weights (None: the checkpoint itself does), and the weights."""
    for entry in _ENTRIES:
        if _is_state_dict(content.get(entry)):
            return entry, content[entry]
    if _is_state_dict(content):
        return None, content
    raise ValueError(
        f"student_checkpoint: {source} holds no weights: there must be a state dict in {', '.join(_ENTRIES)} or the "
        f"file itself, got entries {_listed(content)}"
    )


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and all(isinstance(key, str) for key in value)
        and any(isinstance(entry, Tensor) for entry in value.values())
    )


def _layout_of(
    source: Path, content: Mapping[Any, Any], entry: str | None, weights: Mapping[str, Any], asked: str | None
) -> tuple[str, str, dict[str, dict[str, Any]]]:
    """The layout, the prefix of the student's keys, and the other parts of the weights by name."""
    prefix = _wrapper(weights)
    beside = _prefix_beside(content) if entry is not None and asked in (None, "kdops") else None
    if beside is not None:
        others = {key: value for key, value in weights.items() if not key.startswith(prefix + beside)}
        return "kdops", prefix + beside, _parts(others, prefix)
    parts = _parts(weights, prefix)
    found = asked or next((name for name, known in _LAYOUTS.items() if known.fits(set(parts))), None)
    if found is None:
        raise ValueError(
            f"student_checkpoint: {source} has an unknown layout: its weights begin with {_listed(parts)}; known are "
            + "; ".join(f"{name}: '{k.student}' beside {_listed(k.beside)}" for name, k in _LAYOUTS.items())
            + ". A plain network needs no conversion; layout (--layout) takes one of them whatever else is there"
        )
    student = _LAYOUTS[found].student
    if student not in parts:
        raise ValueError(
            f"student_checkpoint: in layout {found!r} the student's keys must begin with '{student}.', got {source} "
            f"with {_listed(parts)}"
        )
    del parts[student]
    return found, f"{prefix}{student}.", parts


def _parts(weights: Mapping[str, Any], prefix: str) -> dict[str, dict[str, Any]]:
    """The weights by the first part of their names."""
    parts: dict[str, dict[str, Any]] = {}
    for key, value in weights.items():
        if key not in _COUNTERS:
            parts.setdefault(key[len(prefix) :].split(".", 1)[0], {})[key] = value
    return parts


def _prefix_beside(content: Mapping[Any, Any]) -> str | None:
    """The prefix of the student's keys where another entry shows that kdops distilled it; None without one."""
    if _is_distiller_state(content.get("distiller")):
        return ""
    callbacks = content.get("callbacks")
    states = callbacks.values() if isinstance(callbacks, Mapping) else ()
    marked = (s[CALLBACK_MARK] for s in states if isinstance(s, Mapping) and CALLBACK_MARK in s)
    return next((f"{name}." if name else "" for name in marked), None)


def _is_distiller_state(value: Any) -> bool:
    """Whether it is the state dict of a Distiller or a ProgressiveDistillation, saved as an entry of its own."""
    return (
        isinstance(value, Mapping)
        and "_extra_state" in value
        and all(str(key).split(".", 1)[0] in ("_extra_state", "taps", "distiller") for key in value)
    )


def _wrapper(weights: Mapping[str, Any]) -> str:
    """What wrappers of the whole model put before every key."""
    prefix = ""
    keys = [key for key in weights if key not in _COUNTERS]
    while True:
        longer = [f"{prefix}{w}." for w in _WRAPPERS if all(key.startswith(f"{prefix}{w}.") for key in keys)]
        if not longer:
            return prefix
        prefix = longer[0]


def _extract(weights: Mapping[str, Any], prefix: str) -> OrderedDict[str, Any]:
    """The entries under a prefix without it, and their modules' versions, by which some layers convert old weights."""
    chosen = {k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix) and k not in _COUNTERS}
    student = OrderedDict((key, _own(value)) for key, value in chosen.items())
    versions = getattr(weights, "_metadata", None)
    if versions is not None:
        root = prefix[:-1]
        student._metadata = OrderedDict(
            (name[len(prefix) :], version)
            for name, version in versions.items()
            if name == root or name.startswith(prefix)
        )
    return student


def _own_meta(meta: Any) -> Any:
    """The meta with the student's own config for the run's, where that is noted in it."""
    if not isinstance(meta, Mapping) or STUDENT_CONFIG not in meta:
        return meta
    return {**{key: value for key, value in meta.items() if key != STUDENT_CONFIG}, "cfg": meta[STUDENT_CONFIG]}


def _own(value: Any) -> Any:
    """A tensor whose memory is its own: a slice of a larger one would be saved with all of it."""
    if isinstance(value, Tensor) and value.untyped_storage().nbytes() > value.numel() * value.element_size():
        return value.clone()
    return value


def _measure(value: Any) -> CheckpointPart:
    tensors = list(_tensors(value))
    return CheckpointPart(len(tensors), sum(t.numel() * t.element_size() for t in tensors))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)


def _listed(names: Any) -> str:
    shown = [f"'{name}'" for name in names]
    return ", ".join(shown[:12]) + (f" and {len(shown) - 12} more" if len(shown) > 12 else "") or "none"
