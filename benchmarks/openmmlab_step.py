"""A training step of MMYOLO's RTMDet-tiny taught by RTMDet-s: MMRazor as it is, beside kdops.

    .venv-openmmlab/bin/python benchmarks/openmmlab_step.py

As a script and not as a module: kdops is then the one installed in that environment, not the work tree's.

Random weights and images, the published config otherwise. Two things are measured: the whole step with mmengine's
optimizer wrapper, and the distillation part of it, connectors and losses forward and backward on the step's own maps.
Agreement comes first: the losses of all variants on one batch must be equal to 1e-5. What the output file holds of
other shapes stays in it.
"""

from __future__ import annotations

import argparse
import copy
import os
from pathlib import Path
from typing import Any, Callable

import memory
import mmyolo
import table
import timing
import torch
from kdops.integrations.mmrazor import fuse, give_back, take_over
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import set_random_seed

CONFIG = "rtmdet/distillation/kd_tiny_rtmdet_s_neck_300e_coco.py"
STOCK, TAKEN_OVER, FUSED, STUDENT = "MMRazor", "kdops, names taken over", "kdops, fused", "student alone"


def load_config() -> Config:
    """The published config; its teacher's weights do not affect the time and are not downloaded."""
    cfg = Config.fromfile(os.path.join(os.path.dirname(mmyolo.__file__), ".mim", "configs", CONFIG))
    cfg.model.teacher_ckpt = None
    return cfg


def build(variant: str, cfg: Config, device: str) -> torch.nn.Module:
    """The algorithm with the given implementation of its losses; weights from a fixed seed."""
    set_random_seed(0)
    if variant == TAKEN_OVER:
        take_over()
    model_cfg = fuse(cfg)[0].model if variant == FUSED else cfg.model
    with DefaultScope.overwrite_default_scope("mmyolo"):
        model = MODELS.build(copy.deepcopy(model_cfg))
    give_back()
    if variant == STUDENT:
        model = model.architecture
    model.to(device).train()
    return model


def random_batch(images: int, size: int) -> dict[str, Any]:
    """Random images, three boxes on each, as MMYOLO's collate function gives them."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(0, 256, (images, 3, size, size), generator=generator, dtype=torch.uint8)
    corner = torch.rand(images * 3, 2, generator=generator) * size * 0.5
    extent = torch.rand(images * 3, 2, generator=generator) * size * 0.4 + 8
    image = torch.arange(images).repeat_interleave(3)[:, None].float()
    boxes = torch.cat([image, torch.zeros_like(image), corner, corner + extent], dim=1)
    meta = dict(batch_input_shape=(size, size), img_shape=(size, size))
    return dict(inputs=inputs, data_samples=dict(bboxes_labels=boxes, img_metas=[meta] * images))


def stepper(model: torch.nn.Module, cfg: Config, data: dict[str, Any]) -> Callable[[], Any]:
    """One training step; the learning rate is 0, so that every repetition computes the same."""
    optim_wrapper = build_optim_wrapper(model, copy.deepcopy(cfg.optim_wrapper))
    for group in optim_wrapper.optimizer.param_groups:
        group["lr"] = 0.0
    return lambda: model.train_step(data, optim_wrapper)


def part(model: torch.nn.Module) -> Callable[[], Any]:
    """Connectors and losses, forward and backward, on the maps that the last step recorded."""
    maps = []
    for recorder in model.distiller.student_recorders.recorders.values():
        recorder._data_buffer = [feature.detach().requires_grad_() for feature in recorder.data_buffer]
        maps += recorder.data_buffer
    wanted = [*maps, *model.distiller.connectors.parameters()]

    def run() -> tuple[torch.Tensor, ...]:
        total = sum(model.distiller.compute_distill_losses().values())
        return torch.autograd.grad(total, wanted)

    return run


def check_agreement(losses: dict[str, dict[str, torch.Tensor]]) -> None:
    for variant in (TAKEN_OVER, FUSED):
        found = losses[variant]
        for name, value in losses[STOCK].items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=f"{variant}: {name}")


def measure(images: int, size: int, seconds: float, device: str) -> list[table.Row]:
    cfg, data = load_config(), random_batch(images, size)
    models = {variant: build(variant, cfg, device) for variant in (STOCK, TAKEN_OVER, FUSED, STUDENT)}
    steps = {variant: stepper(model, cfg, data) for variant, model in models.items()}
    check_agreement({variant: step() for variant, step in steps.items()})
    measured = {timing.STEP: steps}
    peaks = {(timing.STEP, variant): memory.peak_above_inputs(step, device) for variant, step in steps.items()}
    times = {timing.STEP: timing.calls(steps, seconds, device)}
    parts = {variant: part(model) for variant, model in models.items() if variant != STUDENT}
    peaks.update({(timing.PART, variant): memory.peak_above_inputs(run, device) for variant, run in parts.items()})
    times[timing.PART] = timing.calls(parts, seconds / 3, device)
    measured[timing.PART] = parts
    shape = f"{images}x3x{size}x{size}"
    return [
        table.stamp(device) | {
            "op": "RTMDet-tiny <- RTMDet-s", "provider": variant, "mode": mode, "shape": shape, "dtype": "float32",
            "p20_us": f"{times[mode][variant].p20:.0f}", "p50_us": f"{times[mode][variant].p50:.0f}",
            "p80_us": f"{times[mode][variant].p80:.0f}", "peak_bytes": str(peaks[mode, variant]),
        }
        for mode, variants in measured.items() for variant in variants
    ]


def other_shapes(path: Path, shape: str) -> list[table.Row]:
    return [row for row in table.read(path) if row["shape"] != shape] if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--size", type=int, default=640)
    parser.add_argument("--seconds", type=float, default=120.0, help="for the steps; a third of it for the parts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=table.RESULTS / "openmmlab_step.csv")
    arguments = parser.parse_args()
    MMLogger.get_current_instance().setLevel("ERROR")
    rows = measure(arguments.images, arguments.size, arguments.seconds, arguments.device)
    table.write(arguments.output, other_shapes(arguments.output, rows[0]["shape"]) + rows)
    for row in rows:
        print(f"{row['mode']:18} {row['provider']:24} {float(row['p50_us']) / 1e3:9.1f} ms "
              f"{int(row['peak_bytes']) / 2**20:9.1f} MiB")


if __name__ == "__main__":
    main()
