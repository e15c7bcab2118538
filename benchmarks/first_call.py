"""Seconds of a provider's first forward and backward in a fresh process, with empty and with filled compiler caches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import providers, shapes, timing
from kdops.testing import Case

MODES = ("first call, cold cache", "first call, warm cache")
CASES = {
    "cpu": shapes.workload("cwd_loss", (8, 128, 20, 20)),
    "cuda": shapes.workload("cwd_loss", (32, 192, 20, 20), dtype=torch.bfloat16),
}


def measure(provider: str, device: str) -> dict[str, float]:
    """Seconds by mode: two processes one after the other that share new cache folders."""
    with tempfile.TemporaryDirectory() as folder:
        caches = {name: os.path.join(folder, name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
        return {mode: _in_a_process(provider, device, caches) for mode in MODES}


def _in_a_process(provider: str, device: str, caches: dict[str, str]) -> float:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.first_call", provider, device]
    root = str(Path(__file__).resolve().parent.parent)
    environment = {**os.environ, **caches}
    printed = subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(printed.stdout.splitlines()[-1])


def _first_call(provider: str, device: str, case: Case) -> float:
    """The imports of PyTorch and kdops and the initialisation of the GPU are not counted: training pays for them."""
    student, teacher = case.inputs(device)
    timing.synchronise(device)
    start = time.perf_counter()
    run = providers.build(provider, case)
    timing.Step(lambda: run(student, teacher), student)()
    timing.synchronise(device)
    return time.perf_counter() - start


if __name__ == "__main__":
    print(json.dumps(_first_call(sys.argv[1], sys.argv[2], CASES[sys.argv[2]])))
