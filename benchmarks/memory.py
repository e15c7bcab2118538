"""Peak memory of a call above what was allocated before it, as PyTorch's allocators saw it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch


def peak_above_inputs(call: Callable[[], Any], device: str) -> int:
    """Bytes at the highest point of a warm call, its results included, above those held before it."""
    call()
    return _peak_on_gpu(call) if device == "cuda" else _peak_on_cpu(call)


def _peak_on_gpu(call: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def _peak_on_cpu(call: Callable[[], Any]) -> int:
    """Every allocation and release of the CPU allocator, from C++ and compiled code too, in the order of time."""
    # The profiler's log level: without a GPU it would print at every start that there is none.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
        del result
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "trace.json")
        profiler.export_chrome_trace(path)
        with open(path, encoding="utf-8") as file:
            events = [e for e in json.load(file)["traceEvents"] if e.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak
