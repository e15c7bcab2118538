"""Clocks: interleaved repetitions of all providers on a CPU and on a GPU, and CUDA graphs of cold-cache launches."""

from __future__ import annotations

import gc
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy
import torch

from kdops.testing import as_list

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
PASS, HOST, STEP, PART = "pass", "host", "training step", "distillation part"
GRAPH, WARM_GRAPH = "forward+backward, CUDA graph", "forward+backward, CUDA graph, warm L2"
#: A sample shorter than this repeats its step: the clock and a cold branch predictor would weigh too much.
SHORTEST_SAMPLE = 1e-3
FEWEST, MOST = 11, 300


class Quantiles(NamedTuple):
    """Microseconds."""

    p20: float
    p50: float
    p80: float


@dataclass
class Step:
    """What one provider does in a repetition. Without ``students`` it is one plain call, else forward and backward."""

    forward: Callable[[], Any]
    students: Any = None

    def __call__(self) -> tuple:
        """The whole step, untimed: the value and the gradients."""
        value = self.forward()
        if self.students is None:
            return (value,)
        return value, torch.autograd.grad(as_list(value), as_list(self.students))


Samples = dict[str, dict[str, list[float]]]  # provider -> mode -> seconds


def quantiles(seconds: list[float]) -> Quantiles:
    """The 20th, 50th and 80th percentile, in microseconds."""
    return Quantiles(*(float(q) * 1e6 for q in numpy.percentile(seconds, (20, 50, 80))))


def interleaved(steps: dict[str, Step], seconds: float, device: str) -> Samples:
    """Time all steps in turn, in a new random order each time, for about ``seconds`` together."""
    repeats = _repeats(steps, device)
    samples: Samples = {name: defaultdict(list) for name in steps}
    measure = _cpu_sample if device == "cpu" else _DeviceClock()
    for name in _in_turn(list(steps), seconds):
        for mode, value in measure(steps[name], repeats[name]).items():
            samples[name][mode].append(value)
    return samples


def calls(functions: dict[str, Callable[[], Any]], seconds: float, device: str) -> dict[str, Quantiles]:
    """Host time of plain calls, interleaved; a GPU's queue is drained between samples, outside the clock."""
    repeats = _repeats(functions, device)
    samples: dict[str, list[float]] = defaultdict(list)
    for name in _in_turn(list(functions), seconds):
        synchronise(device)
        start = time.perf_counter()
        for _ in range(repeats[name]):
            functions[name]()
        samples[name].append((time.perf_counter() - start) / repeats[name])
    return {name: quantiles(values) for name, values in samples.items()}


def graph(steps: list[Step], replays: int = 30) -> list[float]:
    """Seconds per step on a GPU, without the host: all steps one after the other in one CUDA graph.

    With inputs of at least three times the L2 cache together, every step starts with a cold cache.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in steps:
            step()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured, stream=stream):
        for step in steps:
            step()
    captured.replay()
    seconds = []
    for _ in range(replays):
        start, end = _event(), _event()
        start.record()
        captured.replay()
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3 / len(steps))
    return seconds


def copies_beyond_l2(bytes_per_step: int) -> int:
    """How many inputs together are three times the L2 cache."""
    return max(2, math.ceil(3 * torch.cuda.get_device_properties(0).L2_cache_size / bytes_per_step))


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _cpu_sample(step: Step, repeats: int) -> dict[str, float]:
    clock, forward, backward = time.perf_counter, 0.0, 0.0
    students = None if step.students is None else as_list(step.students)
    for _ in range(repeats):
        start = clock()
        value = step.forward()
        middle = clock()
        if students is not None:
            torch.autograd.grad(as_list(value), students)
        end = clock()
        forward, backward = forward + middle - start, backward + end - middle
    if students is None:
        return {PASS: forward / repeats}
    return {FORWARD: forward / repeats, BACKWARD: backward / repeats, BOTH: (forward + backward) / repeats}


class _DeviceClock:
    """Device events around one step. A buffer larger than L2 is read before it: this evicts the cache without dirty
    lines that would be written back during the step, as a fill would leave, and the host queues the step meanwhile."""

    def __init__(self) -> None:
        self.buffer = torch.zeros(64 * 2**20, device="cuda")
        self.total = torch.zeros((), device="cuda")

    def __call__(self, step: Step, repeats: int) -> dict[str, float]:
        start, middle, end = _event(), _event(), _event()
        torch.sum(self.buffer, dim=0, out=self.total)
        start.record()
        value = step.forward()
        middle.record()
        if step.students is not None:
            torch.autograd.grad(as_list(value), as_list(step.students))
        end.record()
        torch.cuda.synchronize()
        forward, backward = start.elapsed_time(middle) / 1e3, middle.elapsed_time(end) / 1e3
        if step.students is None:
            return {PASS: forward}
        return {FORWARD: forward, BACKWARD: backward, BOTH: start.elapsed_time(end) / 1e3}


def _in_turn(names: list[str], seconds: float) -> Iterator[str]:
    """The names round by round, each round in a new random order, until the time is up."""
    order, shuffle = list(names), random.Random(0).shuffle
    end = time.perf_counter() + seconds
    with _no_collector():
        for done in range(MOST):
            if done >= FEWEST and time.perf_counter() > end:
                return
            shuffle(order)
            yield from order


def _repeats(functions: Mapping[str, Callable[[], Any]], device: str) -> dict[str, int]:
    return {name: max(1, math.ceil(SHORTEST_SAMPLE / _warm_up(f, device))) for name, f in functions.items()}


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def _warm_up(function: Callable[[], Any], device: str, times: int = 3) -> float:
    """Call a few times (a compiled function compiles here); the fastest call in seconds."""
    best = math.inf
    for _ in range(times):
        start = time.perf_counter()
        function()
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return best


@contextmanager
def _no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
