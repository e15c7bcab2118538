"""Random calls of the public losses. A call is a few plain values and a seed, and is rebuilt from them bit for bit.

`random_call` draws one from any source of choices, so that Hypothesis and a campaign over seeds share the generator;
the first entry of a choice is the simplest. `Call.inputs` makes its maps: views into buffers full of NaN.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from kdops import MGDLoss

LOSSES = ("cwd_loss", "pkd_loss", "mgd_loss", "MGDLoss")
DTYPES = ("float32", "bfloat16", "float16", "float64")
ORDERS = tuple(permutations(range(4)))
#: Around the widths of vector registers and of tiles, and primes.
EXTENTS = (1, 2, 3, 4, 5, 7, 8, 9, 13, 15, 16, 17, 19, 31, 32, 33, 37, 63, 64, 65, 80, 127, 129, 257)
WIDTHS = (1, 2, 3, 5, 8, 12, 17, 32, 33, 64)
_LARGEST_HALF = 6e4

Pick = Callable[[Sequence[Any]], Any]


@dataclass(frozen=True)
class View:
    """Where a map lies in its buffer: dimensions from the slowest to the fastest, what is left out, what repeats."""

    order: tuple[int, ...] = (0, 1, 2, 3)
    before: tuple[int, ...] = (0, 0, 0, 0)
    after: tuple[int, ...] = (0, 0, 0, 0)
    step: tuple[int, ...] = (1, 1, 1, 1)
    expanded: tuple[int, ...] = ()

    def of(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The buffer, NaN where the map is not, and the map in it; an expanded dimension repeats its first entry."""
        shape = values.shape
        for d in self.expanded:
            values = values.narrow(d, 0, 1)
        outer = [b + n * s + a for n, b, a, s in zip(values.shape, self.before, self.after, self.step)]
        buffer = values.new_full([outer[d] for d in self.order], torch.nan)
        cut = tuple(slice(b, b + n * s, s) for n, b, s in zip(values.shape, self.before, self.step))
        view = buffer.permute([self.order.index(d) for d in range(4)])[cut]
        return buffer, view.copy_(values).expand(shape)


@dataclass(frozen=True)
class Level:
    """A pair of maps; the teacher's height and width where they differ."""

    shape: tuple[int, ...] = (2, 3, 4, 5)
    teacher_size: tuple[int, ...] | None = None
    student_dtype: str = "float32"
    teacher_dtype: str = "float32"
    student_view: View = View()
    teacher_view: View = View()


@dataclass(frozen=True)
class Values:
    """The values of the maps: normal numbers around a mean per channel, and special values."""

    scale: float = 1.0
    mean: float = 0.0  # in deviations
    constant: str = ""  # whose channels have one that is constant: student, teacher, both
    spike: float = 0.0  # the largest element, in deviations
    near: float | None = None  # the teacher is gain times the student times 1 + near * noise
    gain: float = 1.0
    bad: str = ""  # a non-finite element: "student nan", "teacher -inf"


@dataclass(frozen=True)
class Call:
    """One call of a loss and its backward."""

    loss: str
    seed: int = 0
    levels: tuple[Level, ...] = (Level(),)
    as_list: bool = False
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    values: Values = Values()
    weight: float = 1.0  # grad_output; times a random number per value of reduction "none"
    twice: bool = False  # backward twice, with retain_graph

    def json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Call:
        plain = json.loads(text)
        levels = tuple(
            Level(**{**x, "student_view": _view(x["student_view"]), "teacher_view": _view(x["teacher_view"])})
            for x in map(_tuples, plain["levels"])
        )
        return Call(**{**plain, "levels": levels, "values": Values(**plain["values"])})

    @property
    def reduction(self) -> str:
        return self.options.get("reduction", "mean")

    @property
    def wide(self) -> bool:
        """Whether sums are kept in fp64."""
        return any("float64" in (x.student_dtype, x.teacher_dtype) for x in self.levels)

    def inputs(self) -> Inputs:
        generator = torch.Generator().manual_seed(self.seed)
        maps = [self._pair(level, generator) for level in self.levels]
        students = [view.requires_grad_() for (_, view), _ in maps]
        inputs = Inputs(students, [view for _, (_, view) in maps], [buffer for pair in maps for buffer, _ in pair])
        if self.loss == "MGDLoss":
            self._add_module(inputs, generator)
        return inputs

    def _pair(self, level: Level, generator: torch.Generator) -> tuple:
        v = self.values
        n, c, h, w = level.shape
        student_shape = (n, self.options.get("student_channels", c), h, w)
        student = self._map(student_shape, level.student_dtype, v.constant in ("student", "both"), generator)
        student = level.student_view.of(student)
        if v.near is None:
            shape = (n, c, *(level.teacher_size or (h, w)))
            teacher = self._map(shape, level.teacher_dtype, v.constant in ("teacher", "both"), generator)
        else:
            noise = torch.randn(level.shape, generator=generator, dtype=torch.float64)
            teacher = _rounded(v.gain * student[1].double() * (1 + v.near * noise), level.teacher_dtype)
        teacher = level.teacher_view.of(teacher)
        whose, _, bad = v.bad.partition(" ")
        if bad:
            x = student[1] if whose == "student" else teacher[1]
            place = [int(torch.randint(k, (), generator=generator)) for k in x.shape]
            x[tuple(place)] = float(bad)
        return student, teacher

    def _map(self, shape: tuple, dtype: str, constant: bool, generator: torch.Generator) -> Tensor:
        v, c = self.values, shape[1]
        deviation = torch.rand((1, c, 1, 1), generator=generator, dtype=torch.float64) + 0.5
        mean = v.mean * torch.randint(2, (1, c, 1, 1), generator=generator).double().mul_(2).sub_(1)
        x = torch.randn(shape, generator=generator, dtype=torch.float64) * deviation + mean
        if v.spike:
            x.view(-1)[int(torch.randint(x.numel(), (), generator=generator))] = v.spike
        if constant:
            channel = int(torch.randint(c, (), generator=generator))
            x[:, channel] = mean[0, channel] + torch.randn((), generator=generator, dtype=torch.float64)
        return _rounded(x * v.scale, dtype)

    def _add_module(self, inputs: Inputs, generator: torch.Generator) -> None:
        (level,), o = self.levels, dict(self.options)
        n, c, h, w = level.shape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            inputs.module = MGDLoss(o.pop("student_channels", c), c, backend="fused", **o)
        inputs.module.to(getattr(torch, level.student_dtype))
        shape = (n, c, 1, 1) if o.get("mask_on_channel") else (n, 1, h, w)
        inputs.mask = torch.rand(shape, generator=generator) >= inputs.module.lambda_mgd


@dataclass
class Inputs:
    """The maps of a call, and for MGDLoss its module and mask."""

    students: list[Tensor]
    teachers: list[Tensor]
    buffers: list[Tensor]
    module: MGDLoss | None = None
    mask: Tensor | None = None

    @property
    def leaves(self) -> list[Tensor]:
        """What gets gradients."""
        return [*self.students, *(self.module.parameters() if self.module else ())]


def random_call(pick: Pick, losses: Sequence[str] = LOSSES, resize: bool = True, room: int = 100000) -> Call:
    """Draw a call; ``pick`` chooses one entry of a sequence.

    resize: may the loss resize a map before its kernels? room: the most elements of a map.
    """
    loss = pick(losses)
    options = _options(pick, loss, resize)
    count = pick((1, 1, 1, 2, 3, 4)) if loss in ("cwd_loss", "pkd_loss") else 1
    values = _values(pick, with_bad=loss != "MGDLoss")
    levels = []
    for _ in range(count):
        shape = _shape(pick, loss, room)
        if options.get("norm", "pkd" if loss == "pkd_loss" else None) and shape[0] * shape[2] * shape[3] == 1:
            shape = (2, *shape[1:])
        levels.append(_level(pick, shape, options))
    if options.get("resize") or "student_channels" in options:
        values = replace(values, near=None, bad="", constant="")
    return Call(
        loss,
        pick(range(2**20)),
        tuple(levels),
        count > 1 or (loss in ("cwd_loss", "pkd_loss") and pick((False, False, True))),
        options,
        values,
        pick((1.0, 2.0, 65536.0, 0.3, -1.7, -0.25, 0.0)),
        pick((False, False, True)),
    )


def _options(pick: Pick, loss: str, resize: bool) -> dict[str, Any]:
    if loss == "mgd_loss":
        return {"alpha_mgd": pick((2e-5, 1.0, 0.3))}
    if loss == "MGDLoss":
        o = {"alpha_mgd": pick((2e-3, 2e-5, 1.0)), "lambda_mgd": pick((0.65, 0.45, 0.15, 0.0, 1.0))}
        o["mask_on_channel"] = pick((False, False, True))
        channels = pick((None, None, *WIDTHS))
        return o if channels is None else {**o, "student_channels": channels}
    o = {"norm": pick(("pkd", "batch")), "resize": pick((None,) * 6 + ("student", "teacher")) if resize else None}
    if loss == "cwd_loss":
        o = {"norm": pick((None, "batch", "pkd")), "tau": pick((1.0, 4.0, 0.5, 10.0, 0.1))}
    o["eps"] = pick((None, None, 1e-3, 1e-8))
    o["loss_weight"] = pick((1.0, 1.0, 6.0, -0.7, 1e-3))
    o["reduction"] = pick(("mean", "mean", "sum", "none"))
    return o


def _values(pick: Pick, with_bad: bool) -> Values:
    return Values(
        scale=pick((1.0,) * 4 + (0.01, 1e-3, 30.0, 1e3)),
        mean=pick((0.0,) * 4 + (1.0, 10.0, 100.0, 1000.0)),
        constant=pick(("",) * 5 + ("student", "teacher", "both")),
        spike=pick((0.0,) * 5 + (1e2, 1e4)),
        near=pick((None,) * 5 + (1e-1, 1e-2, 1e-3, 1e-5, 0.0)),
        gain=pick((1.0, 1.0, 1.5, 30.0)),
        bad=pick(("",) * 24 + tuple(f"{w} {b}" for w in ("student", "teacher") for b in ("nan", "inf", "-inf")))
        if with_bad
        else "",
    )


def _shape(pick: Pick, loss: str, most: int) -> tuple[int, ...]:
    room = min(most, pick((64,) * 2 + (512,) * 6 + (4096,) * 4 + (20000, 100000)))
    shape = {}
    if loss == "MGDLoss":
        shape["c"] = pick(WIDTHS)
        room = min(room, 512)
    for d in pick(("whnc", "cwhn", "nchw", "wcnh", "hcnw")):
        if d not in shape:
            shape[d] = pick([e for e in (EXTENTS[:8] if d == "n" else EXTENTS) if e <= room])
            room //= shape[d]
    return tuple(shape[d] for d in "nchw")


def _level(pick: Pick, shape: tuple[int, ...], options: dict[str, Any]) -> Level:
    if options.get("resize") is None:
        return Level(shape, None, pick(DTYPES), pick(DTYPES), _random_view(pick), _random_view(pick))
    # PyTorch resizes a constant map to one that is not quite, and passes gradients on in the student's dtype, where
    # that of such a channel overflows fp16: neither is the loss's doing. In fp64 the oracle is resized no better.
    size = tuple(pick([e for e in EXTENTS[:16] if shape[0] * e > 1]) for _ in "hw")
    dtypes = pick(("float32", "bfloat16")), pick(("float32", "bfloat16", "float16"))
    return Level(shape, size, *dtypes, _random_view(pick, expand=False), _random_view(pick, expand=False))


def _random_view(pick: Pick, expand: bool = True) -> View:
    kind = pick(("plain", "plain", "order", "order", "cut", "cut", "stepped", *(("expanded",) if expand else ())))
    order = ORDERS[0] if kind == "plain" else pick(ORDERS)
    if kind in ("plain", "order"):
        return View(order)
    before, after = (tuple(pick((0, 1, 3)) for _ in range(4)) for _ in range(2))
    step = tuple(pick((1, 2, 3)) for _ in range(4)) if kind == "stepped" else (1, 1, 1, 1)
    expanded = pick(((0,), (1,), (2,), (3,), (2, 3), (0, 1), (0, 1, 2, 3))) if kind == "expanded" else ()
    return View(order, before, after, step, expanded)


def _rounded(x: Tensor, dtype: str) -> Tensor:
    return (x.clamp(-_LARGEST_HALF, _LARGEST_HALF) if dtype == "float16" else x).to(getattr(torch, dtype))


def _tuples(plain: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in plain.items()}


def _view(plain: dict[str, Any]) -> View:
    return View(**_tuples(plain))
