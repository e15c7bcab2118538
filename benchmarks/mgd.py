"""MGD's training step, forward and backward with all its gradients: ``python -m benchmarks.mgd``.

Writes results/mgd.csv (mgd-GPU.csv on a GPU) and the table beside it. The providers run in turn in one process:

    eager                  the published chain: a mask drawn on the CPU and copied, two convolutions, summed squares
    eager, channels_last   the same with maps and weights in channels_last
    torch.compile          of the eager chain
    convolutions           the six of the generator's step alone (align's three too), the whole map: the lower bound
    kdops                  MGDLoss
    kdops, dense           MGDLoss with all convolutions over the whole map
    kdops, autocast        MGDLoss under torch.autocast, which lets a CPU's convolutions run in half precision
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import memory, table, timing
from kdops import MGDLoss, _first_convolution
from kdops.testing import MGDCase, MGDStep, relative_error

EAGER, CHANNELS_LAST, COMPILE = "eager", "eager, channels_last", "torch.compile"
CONVOLUTIONS, KDOPS, DENSE, AUTOCAST = "convolutions", "kdops", "kdops, dense", "kdops, autocast"
HALF, SINGLE = torch.bfloat16, torch.float32
STAGE = (8, 40, 40)
CASES = {
    "cpu": [
        MGDCase(128, 128, STAGE),
        MGDCase(128, 128, STAGE, layout="channels_last", teacher_layout="channels_last"),
        MGDCase(96, 128, STAGE),
        MGDCase(256, 256, (8, 20, 20)),
        MGDCase(128, 128, STAGE, 0.45),
        MGDCase(128, 128, STAGE, 0.3),
        MGDCase(128, 128, STAGE, 0.2),
        MGDCase(128, 128, STAGE, 0.15, mask_on_channel=True),
        MGDCase(128, 128, STAGE, dtype=HALF),
    ],
    "cuda": [
        MGDCase(256, 256, (n, size, size), dtype=dtype, layout=layout, teacher_layout=layout)
        for n, size in ((32, 80), (32, 40), (8, 80))
        for dtype in (HALF, SINGLE)
        for layout in ("nchw", "channels_last")
    ],
}


class Eager(nn.Module):
    """The published chain with the parameters of an MGDLoss."""

    def __init__(self, module: MGDLoss) -> None:
        super().__init__()
        self.align, self.generation = module.align, module.generation
        self.alpha, self.fraction, self.on_channel = module.alpha_mgd, module.lambda_mgd, module.mask_on_channel

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.align is not None:
            student = self.align(student)
        n, c, h, w = student.shape
        mask = torch.rand((n, c, 1, 1) if self.on_channel else (n, 1, h, w)).to(student.device)
        mask = torch.where(mask > 1 - self.fraction, 0, 1)
        generated = self.generation(torch.mul(student, mask))
        return F.mse_loss(generated, teacher, reduction="sum") / n * self.alpha


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mgd", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="only cases whose name contains TEXT; prints the table"
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="of timing per case (default: 30)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="on a CPU (default: PyTorch's)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[table.Row] = []
    stamp = table.stamp(device)
    path = _path(device)
    for case in (progress := tqdm([c for c in CASES[device] if options.only in str(c)], unit="case")):
        progress.set_description(str(case))
        rows += [{**row, **stamp} for row in case_rows(case, device, options.seconds)]
        if not options.only:
            table.write(path, rows)
            _write(path.with_suffix(".md"), markdown(rows))
    print(markdown(rows))
    return 0


def case_rows(case: MGDCase, device: str, seconds: float) -> Iterator[table.Row]:
    """Errors against fp64, then interleaved times and the peak memory of every provider."""
    torch._dynamo.reset()
    steps = {name: _step(name, case, device) for name in providers(case)}
    samples = timing.interleaved(steps, seconds, device)
    for name, modes in samples.items():
        about = {
            "op": "mgd",
            "options": f"lambda={case.lambda_mgd:g}{' on channels' if case.mask_on_channel else ''}",
            "provider": name,
            "shape": f"{case.size[0]}x{case.student_channels}to{case.teacher_channels}x{case.size[1]}x{case.size[2]}",
            "dtype": str(case.dtype).removeprefix("torch."),
            "layout": case.layout,
        }
        about |= {} if name == CONVOLUTIONS else _errors(name, case, device)
        for mode, values in modes.items():
            times = {f"{k}_us": f"{v:.0f}" for k, v in timing.quantiles(values)._asdict().items()}
            row = {**about, "mode": mode, **times}
            if mode == timing.BOTH or name == DENSE:
                row["peak_bytes"] = str(memory.peak_above_inputs(steps[name], device))
            yield row


def providers(case: MGDCase) -> list[str]:
    """Dense is a provider only if kdops uses the compact path, autocast only if there is something to cast."""
    found = [EAGER, CHANNELS_LAST, COMPILE, CONVOLUTIONS, KDOPS]
    return found + ([AUTOCAST] if case.dtype == HALF else [DENSE] * (not case.mask_on_channel))


def markdown(rows: list[table.Row]) -> str:
    """One table: medians, ratios to the eager chain, peak memory in maps of the teacher's size."""
    lines = [
        f"# MGD\n\n{rows[0]['device']}, PyTorch {rows[0]['torch']}, {rows[0]['date']}, commit {rows[0]['commit']}.",
        "",
    ]
    lines += ["Forward and backward. Peak: above inputs and parameters, all gradients included, in maps.", ""]
    lines += [
        "| shape | dtype, layout | mask | provider | p50 ms | of eager | p20 ms | of eager | peak maps | of eager |"
    ]
    lines += ["| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    eager: table.Row = {}
    for row in rows:
        if row["mode"] not in (timing.BOTH, timing.PASS):
            continue
        if row["provider"] == EAGER:
            eager = row
        peak = row.get("peak_bytes", "")
        times = [f"{int(row[k]) / 1e3:.1f} | {int(row[k]) / int(eager[k]):.2f}" for k in ("p50_us", "p20_us")]
        memory_ = f"{int(peak) / _map_bytes(row):.2f} | {int(peak) / int(eager['peak_bytes']):.2f}" if peak else "|"
        kind = f"{row['dtype']}, {row['layout']}"
        lines.append(
            f"| {row['shape']} | {kind} | {row['options']} | {row['provider']} | {' | '.join(times)} | {memory_} |"
        )
    return "\n".join(lines) + "\n"


def _step(name: str, case: MGDCase, device: str) -> timing.Step:
    data = case.step(device)
    if name == CONVOLUTIONS:
        return timing.Step(_convolutions(data))
    run, student, teacher = _provider(name, data)
    inputs = [student, *data.module.parameters()]
    if name != DENSE:
        return timing.Step(lambda: run(student, teacher), inputs)

    def whole() -> tuple:
        with _dense_only():
            return torch.autograd.grad(run(student, teacher), inputs)

    return timing.Step(whole)


def _provider(name: str, data: MGDStep) -> tuple[Callable, Tensor, Tensor]:
    if name in (KDOPS, DENSE):
        return data.module, data.student, data.teacher
    if name == AUTOCAST:
        cast = torch.autocast(data.student.device.type, dtype=data.student.dtype)
        return cast(data.module.forward), data.student, data.teacher
    if name == CHANNELS_LAST:
        kind = {"memory_format": torch.channels_last}
        data.module.to(**kind)
        student = data.student.detach().contiguous(**kind).requires_grad_()
        return Eager(data.module), student, data.teacher.contiguous(**kind)
    eager = Eager(data.module)
    return torch.compile(eager, dynamic=False) if name == COMPILE else eager, data.student, data.teacher


@contextmanager
def _dense_only() -> Iterator[None]:
    original = _first_convolution.COMPACT_FROM
    _first_convolution.COMPACT_FROM = 2.0  # no mask drops that many positions
    try:
        yield
    finally:
        _first_convolution.COMPACT_FROM = original


def _convolutions(data: MGDStep) -> Callable[[], None]:
    """Forward, input gradient and weight gradient of every convolution, channels_last as in kdops."""
    p = data.module.parameters_of_chain()
    kind = {"memory_format": torch.channels_last}
    student, teacher = (x.detach().contiguous(**kind) for x in (data.student, data.teacher))
    pairs = [(teacher, p.weight1, p.bias1), (teacher, p.weight2, p.bias2)]
    if p.align_weight is not None:
        pairs.insert(0, (student, p.align_weight, p.align_bias))
    pairs = [(x, w.detach(), b.detach()) for x, w, b in pairs]

    def run() -> None:
        for x, w, b in pairs:
            padding = w.shape[-1] // 2
            F.conv2d(x, w, b, padding=padding)
            torch.ops.aten.convolution_backward(
                teacher, x, w, [len(b)], [1, 1], [padding] * 2, [1, 1], False, [0, 0], 1, [True, True, True]
            )

    return run


def _errors(name: str, case: MGDCase, device: str) -> table.Row:
    """With one explicit mask for the kernels; the eager chains draw masks of their own, and are the formula itself."""
    if name not in (KDOPS, DENSE):
        return {}
    data = replace(case, explicit=True).step(device)
    if name == DENSE:
        with _dense_only():
            got = data.run()
    else:
        got = data.run()
    errors = [relative_error(a, b) for a, b in zip(got, data.eager(torch.float64, data.mask).run())]
    return {"value_error": f"{errors[0]:.1e}", "gradient_error": f"{max(errors[1:]):.1e}"}


def _map_bytes(row: table.Row) -> int:
    n, channels, h, w = row["shape"].split("x")
    return int(n) * int(channels.split("to")[1]) * int(h) * int(w) * (2 if row["dtype"] == "bfloat16" else 4)


def _path(device: str) -> Path:
    name = "mgd" if device == "cpu" else "mgd-" + "-".join(torch.cuda.get_device_name().lower().split())
    return table.RESULTS / f"{name}.csv"


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".md.part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())
