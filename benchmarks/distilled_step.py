"""A distilled training step beside the plain student's: what the teacher costs as it is, and prepared.

    python -m benchmarks.distilled_step

Random weights and images; batch norms have statistics. Two pairs of networks: the demo's, and torchvision's FCOS on a
ResNet-18 taught by one on a ResNet-34 at 320 pixels. CWD on normalised channels of three FPN levels. Agreement comes
first: every variant's loss on one batch must be that of the plain teacher with the eager formula, to the tolerance that
its teacher's precision has. All variants of a pair are timed in turn. Read the ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from kdops.integrations.pytorch.demo.models import FPN_LEVELS, DetectorConfig, build_detector
from torch import Tensor, nn

from benchmarks import memory, table, timing
from kdops import CWDLoss, Distiller, Tap, TeacherOptions

PLAIN, STOCK, KDOPS = "plain student", "eager losses, teacher as it is", "kdops, teacher as it is"
#: The options of a variant's teacher; the others run it as it is.
PREPARED = {
    "kdops, folded": TeacherOptions(compile=False),
    "kdops, compiled": TeacherOptions(compile=True),
    "kdops, folded bf16": TeacherOptions(dtype=torch.bfloat16, compile=False),
    "kdops, compiled bf16": TeacherOptions(dtype=torch.bfloat16, compile=True),
}
VARIANTS = (PLAIN, STOCK, KDOPS, *PREPARED)
#: Name -> student, teacher (backbone, FPN width), images, side.
PAIRS = {
    "demo: slim10 <- resnet18": (("slim10", 64), ("resnet18", 128), 8, 128),
    "FCOS resnet18 <- resnet34": (("resnet18", 256), ("resnet34", 256), 2, 320),
}
STEP, TEACHER = timing.STEP, "teacher"
RELATIVE_ERROR = {torch.bfloat16: 1e-2, None: 1e-5}
OUTPUT = "distilled_step.csv"


class Variant:
    """A student, its optimizer and, unless it is the plain one, its distiller."""

    def __init__(self, name: str, pair: str, device: str) -> None:
        student, teacher, batch, side = PAIRS[pair]
        torch.manual_seed(0)
        self.teacher = with_statistics(detector(teacher, side, device))
        self.student = detector(student, side, device).train()
        self.images = [torch.rand(3, side, side, device=device) for _ in range(batch)]
        box = torch.tensor([[0.2, 0.2, 0.7, 0.7]], device=device) * side
        self.targets = [{"boxes": box, "labels": torch.ones(1, dtype=torch.int64, device=device)}] * batch
        parameters = list(self.student.parameters())
        self.distiller: Distiller | None = None
        if name != PLAIN:
            loss = CWDLoss(norm="batch", backend="reference" if name == STOCK else "auto")
            taps = [Tap(level, loss=loss, align=(student[1], teacher[1])) for level in FPN_LEVELS]
            self.distiller = Distiller(self.student, self.teacher, taps, teacher_options=PREPARED.get(name))
            parameters += self.distiller.parameters()
        # The learning rate is 0, so that every repetition computes the same.
        self.optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0)
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def step(self) -> Tensor:
        """One training step; returns the distillation loss."""
        total = sum(self.student(self.images, self.targets).values())
        added = total.new_zeros(()) if self.distiller is None else self.distiller.loss().total
        (total + added).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return added.detach()

    @contextlib.contextmanager
    def watched(self, device: str) -> Iterator[None]:
        """Take the teacher's part of the steps by the clock."""
        if self.distiller is None:
            yield
            return
        run = self.distiller._teacher.run
        self.distiller._teacher.run = self._timed(run, device)
        try:
            yield
        finally:
            del self.distiller._teacher.run

    def _timed(self, run: Callable[..., Any], device: str) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            timing.synchronise(device)
            start = time.perf_counter()
            maps = run(*args)
            timing.synchronise(device)
            self.seconds[TEACHER] += time.perf_counter() - start
            return maps

        return timed


def detector(what: tuple[str, int], side: int, device: str) -> nn.Module:
    """A torchvision FCOS as the demo builds it."""
    backbone, width = what
    built = build_detector(DetectorConfig("fcos", backbone, width, 11, side))
    return built.to(device, memory_format=torch.channels_last)


def with_statistics(network: nn.Module) -> nn.Module:
    """Batch norms as training leaves them, so that folding has something to do."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return network


def check_agreement(losses: dict[str, float]) -> dict[str, float]:
    """The relative errors of the losses; an AssertionError if one is too large."""
    errors = {name: abs(value / losses[STOCK] - 1) for name, value in losses.items() if name != PLAIN}
    for name, error in errors.items():
        dtype = PREPARED[name].dtype if name in PREPARED else None
        if not error <= RELATIVE_ERROR[dtype]:
            raise AssertionError(f"{name}: the loss is off by {error:.1e}, more than {RELATIVE_ERROR[dtype]:.0e}")
    return errors


def measure(pair: str, seconds: float, device: str) -> list[table.Row]:
    """Rows of all variants of a pair of networks: whole step, its teacher's part, peak memory."""
    variants = {name: Variant(name, pair, device) for name in VARIANTS}
    errors = check_agreement({name: variant.step().item() for name, variant in variants.items()})
    peaks = {name: memory.peak_above_inputs(variant.step, device) for name, variant in variants.items()}
    times = timing.calls({name: variant.step for name, variant in variants.items()}, seconds, device)
    teachers = {name: teacher_part(variant, device) for name, variant in variants.items() if name != PLAIN}
    _, _, batch, side = PAIRS[pair]
    common = table.stamp(device) | {"op": pair, "shape": f"{batch}x3x{side}x{side}", "dtype": "float32"}
    rows = []
    for name, quantiles in times.items():
        row = {"provider": name, "mode": STEP, "peak_bytes": str(peaks[name])}
        row |= {f"p{q}_us": f"{getattr(quantiles, f'p{q}'):.0f}" for q in (20, 50, 80)}
        rows.append(common | row | ({"value_error": f"{errors[name]:.1e}"} if name in errors else {}))
        if name in teachers:
            rows.append(common | {"provider": name, "mode": TEACHER, "p50_us": f"{teachers[name]:.0f}"})
    return rows


def teacher_part(variant: Variant, device: str, repeats: int = 11) -> float:
    """Microseconds of a step that are the teacher's, by a clock around it."""
    variant.seconds.clear()
    with variant.watched(device):
        for _ in range(repeats):
            variant.step()
    return variant.seconds[TEACHER] / repeats * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", nargs="*", default=list(PAIRS), choices=list(PAIRS))
    parser.add_argument("--seconds", type=float, default=60.0, help="for each pair")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=table.RESULTS / OUTPUT)
    arguments = parser.parse_args()
    rows = []
    for pair in arguments.pairs:
        rows += measure(pair, arguments.seconds, arguments.device)
        table.write(arguments.output, rows)
    plain = {row["op"]: float(row["p50_us"]) for row in rows if row["provider"] == PLAIN}
    for row in rows:
        time_us = float(row["p50_us"])
        print(f"{row['op']:26} {row['provider']:32} {row['mode']:14} {time_us / 1e3:8.1f} ms "
              f"{time_us / plain[row['op']]:6.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
