"""Two processes under mmengine's DistributedDataParallel, without find_unused_parameters, through the stop."""
from __future__ import annotations

import math
import os
import subprocess
import sys

import torch

HERE = os.path.dirname(__file__)


def train(form, folder):
    """What either process saw and ended with."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29613",
               os.path.join(HERE, "ddp_stop.py"), form, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pth", weights_only=True) for rank in range(2)]


def assert_trained_together(ranks):
    """Equal weights from unequal data, with distillation before the stop (2 of 4 steps) and without it afterwards."""
    for part in ("student", "distiller"):
        first, second = (rank[part] for rank in ranks)
        assert first and set(first) == set(second)
        assert all(torch.equal(first[name], second[name]) for name in first), part
    for rank in ranks:
        assert ["distill.loss_feat" in losses for losses in rank["losses"]] == [True] * 2 + [False] * 2
        assert all(math.isfinite(value) for losses in rank["losses"] for value in losses.values())
        assert all(losses["distill.loss_feat"] > 1e-4 for losses in rank["losses"][:2])
    assert ranks[0]["losses"][0] != ranks[1]["losses"][0], "both processes saw the same data"


def test_mmrazor(tmp_path):
    runs = []
    for form in ("mmrazor", "mmrazor, fused"):
        (tmp_path / form).mkdir()
        runs.append(train(form, tmp_path / form))
        assert_trained_together(runs[-1])
    stock, fused = (run[0] for run in runs)
    for name, value in {**stock["student"], **stock["distiller"]}.items():
        torch.testing.assert_close({**fused["student"], **fused["distiller"]}[name], value, rtol=1e-5, atol=1e-5)


def test_mmdet(tmp_path):
    ranks = train("mmdet", tmp_path)
    assert_trained_together(ranks)
