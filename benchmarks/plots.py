"""Bar charts of a results file: time in read-read-write passes and peak memory in maps."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import providers, timing

if TYPE_CHECKING:
    from benchmarks.report import Workload

SHOWN = (providers.EAGER, providers.COMPILE, providers.KDOPS)
COLOURS = dict(zip(SHOWN, ("#9a9a9a", "#4c78a8", "#d1495b")))


def write(path: Path, workloads: list[Workload]) -> None:
    """``*_speed.png`` and ``*_memory.png`` beside a results file; none where it has no workloads."""
    if not workloads:
        return
    speed = "forward+backward, in read-read-write passes over the same maps (log)"
    _bars(path.with_name(f"{path.stem}_speed.png"), workloads, _in_passes, speed, log=True)
    memory = "peak memory above the inputs, in student maps"
    _bars(path.with_name(f"{path.stem}_memory.png"), workloads, lambda w, p: w.peak_maps(p), memory, log=False)


def _in_passes(workload: Workload, provider: str) -> float:
    return workload.time(provider) / workload.time("read-read-write", timing.PASS)


def _bars(
    path: Path, workloads: list[Workload], value: Callable[[Workload, str], float], label: str, log: bool
) -> None:
    from matplotlib.figure import Figure  # only plots need it

    figure = Figure(figsize=(9, 1.2 + 0.62 * len(workloads)), layout="constrained")
    axes = figure.subplots()
    thickness = 0.8 / len(SHOWN)
    for i, provider in enumerate(SHOWN):
        values = [value(w, provider) for w in workloads]
        heights = [0.0 if math.isnan(v) else v for v in values]
        places = [row + (i - 1) * thickness for row in range(len(workloads))]
        bars = axes.barh(places, heights, thickness, label=provider, color=COLOURS[provider])
        axes.bar_label(bars, [f"{v:.3g}" if v else "" for v in heights], padding=2, fontsize=7)
    titles = [w.title.replace(", ", "\n", 1).replace("+", "\n+ ") for w in workloads]
    axes.set_yticks(range(len(workloads)), titles, fontsize=7)
    axes.invert_yaxis()
    if log:
        axes.set_xscale("log")
        axes.set_xlim(left=0.5)
    axes.margins(x=0.1)
    axes.set_xlabel(label)
    figure.legend(loc="outside upper center", ncols=len(SHOWN), fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    temporary = path.with_name(path.name + ".part")
    figure.savefig(temporary, dpi=130, format="png")
    os.replace(temporary, path)
