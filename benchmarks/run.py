"""Measures all workloads of a set and writes one CSV, its tables and its plots: ``python -m benchmarks.run``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import agreement, first_call, host, memory, providers, report, shapes, table, timing, training_step
from kdops import testing
from kdops.testing import Case, as_list

READ_READ_WRITE, COPY = "read-read-write", "copy"
#: Mode of the rows of a provider that exceeds its error budget: they have its errors and no time.
DISAGREES = "disagrees"
#: Below this many microseconds of a read-read-write pass, events alone would time the host.
GRAPH_BELOW = 100.0
COPY_ELEMENTS = {"cpu": 2**25, "cuda": 2**28}


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.step:
        return _run_step(device, options)
    name = "full" if options.full else "quick"
    cases = [c for c in shapes.workloads(name, device) if options.only in shapes.key(c)]
    if not cases:
        raise SystemExit(f"benchmarks: no workload of the {name} set for {device} contains {options.only!r}")
    path = _path(device, name, options)
    rows: list[table.Row] = []
    stamp = table.stamp(device)
    rows += _stamped(stamp, _copy_row(device, options.seconds))
    for i, case in enumerate(progress := tqdm(cases, unit="workload")):
        progress.set_description(shapes.key(case))
        everything = name == "full" or device == "cuda" or i == 0
        rows += _stamped(stamp, workload_rows(case, providers.names(case, everything), device, options.seconds))
        table.write(path, rows)
    if not options.only:
        rows += _stamped(stamp, _host_rows(device, options.seconds), _first_call_rows(device))
        table.write(path, rows)
    _print_tables(report.write(path))
    wrong = [r for r in rows if r["mode"] == DISAGREES]
    for row in wrong:
        print(f"{row['provider']} disagrees with the fp64 oracle on {row['shape']} {row['dtype']}: no time is reported")
    return 1 if any(r["provider"] not in providers.BASELINES for r in wrong) else 0


def _run_step(device: str, options: argparse.Namespace) -> int:
    path = _path(device, "step", options)
    table.write(path, _stamped(table.stamp(device), _step_rows(device, options.seconds)))
    _print_tables(report.write(path))
    return 0


def _print_tables(text: str) -> None:
    """The report without the details of each workload."""
    print(text.split("\n### ")[0])


def _path(device: str, name: str, options: argparse.Namespace) -> Path:
    folder = options.output or ("runs/benchmarks" if options.only else table.RESULTS)
    return Path(folder) / f"{_slug(device)}_{name}.csv"


def workload_rows(case: Case, names: list[str], device: str, seconds: float) -> Iterator[table.Row]:
    """All rows of one workload: each provider is checked, then those that agree are timed together."""
    torch._dynamo.reset()  # a fresh limit of recompilations for this workload's shapes
    student, teacher = case.inputs(device)
    oracle = agreement.Oracle(case, student, teacher)
    about: dict[str, table.Row] = {}
    runs: dict[str, providers.Provider] = {}
    for name in tqdm(names, desc="check", leave=False, unit="provider"):
        run = providers.build(name, case)
        errors = oracle.errors(name, run, student, teacher)
        about[name] = {**_describe(case, name), **_error_columns(errors)}
        if errors.agree:
            runs[name] = run
        else:
            yield {**about[name], "mode": DISAGREES}
    del oracle
    steps = {name: timing.Step(lambda run=run: run(student, teacher), student) for name, run in runs.items()}
    reader = timing.Step(_read_read_write(student, teacher))
    samples = timing.interleaved({READ_READ_WRITE: reader, **steps}, seconds, device)
    about[READ_READ_WRITE] = _describe(case, READ_READ_WRITE)
    for name, modes in samples.items():
        for mode, values in modes.items():
            row = {**about[name], "mode": mode, **_time_columns(timing.quantiles(values))}
            if mode == timing.BOTH:
                row["peak_bytes"] = str(memory.peak_above_inputs(steps[name], device))
            yield row
    if device == "cuda" and timing.quantiles(samples[READ_READ_WRITE][timing.PASS]).p50 < GRAPH_BELOW:
        for name in runs.keys() - {providers.MAX_AUTOTUNE}:  # which captures graphs itself
            for mode, columns in _graph_columns(case, runs[name]):
                yield {**about[name], "mode": mode, **columns}


def _copy_row(device: str, seconds: float) -> Iterator[table.Row]:
    """One plain copy of a large tensor: the bandwidth that this run's device gives."""
    source = torch.ones(COPY_ELEMENTS[device], device=device)
    target = torch.empty_like(source)
    step = timing.Step(lambda: target.copy_(source))
    samples = timing.interleaved({COPY: step}, min(seconds, 2.0), device)
    size = {"shape": str(source.numel()), "dtype": "float32", "layout": "dense"}
    times = _time_columns(timing.quantiles(samples[COPY][timing.PASS]))
    yield {"op": COPY, "provider": COPY, "mode": timing.PASS, **size, **times}


def _host_rows(device: str, seconds: float) -> Iterator[table.Row]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a thread pool has nothing to do on so small a map, and its barriers are not host time
    for loss in testing.LOSSES:
        case = shapes.workload(loss, host.SHAPE)
        for (name, mode), quantiles in host.measure(case, device, seconds).items():
            yield {**_describe(case, name), "mode": f"{timing.HOST}, {mode}", **_time_columns(quantiles)}
    torch.set_num_threads(threads)


def _first_call_rows(device: str) -> Iterator[table.Row]:
    case = first_call.CASES[device]
    for name in tqdm((providers.EAGER, providers.COMPILE, providers.KDOPS), desc="first call", unit="provider"):
        for mode, seconds in first_call.measure(name, device).items():
            yield {**_describe(case, name), "mode": mode, "p50_us": f"{seconds * 1e6:.0f}"}


def _step_rows(device: str, seconds: float) -> Iterator[table.Row]:
    case, measured = training_step.measure(device, seconds)
    for name, (quantiles, peak) in measured.items():
        yield {**_describe(case, name), "mode": timing.STEP, **_time_columns(quantiles), "peak_bytes": str(peak)}


def _graph_columns(case: Case, run: providers.Provider) -> Iterator[tuple[str, table.Row]]:
    """Times with a cold cache, then on one input repeatedly."""

    def make(seed: int) -> timing.Step:
        student, teacher = case.inputs("cuda", seed)
        return timing.Step(lambda: run(student, teacher), student)

    inputs = shapes.elements(case) * case.student_dtype.itemsize * 2
    steps = [make(seed) for seed in range(timing.copies_beyond_l2(inputs))]
    yield timing.GRAPH, _time_columns(timing.quantiles(timing.graph(steps)))
    yield timing.WARM_GRAPH, _time_columns(timing.quantiles(timing.graph(steps[:1] * 10)))


def _read_read_write(student: object, teacher: object) -> object:
    """One pass over the same maps with hardly any arithmetic: reads both, writes a third."""
    pairs = [(s.detach(), t, torch.empty_like(s)) for s, t in zip(as_list(student), as_list(teacher))]
    return lambda: [torch.add(s, t, out=d) for s, t, d in pairs]


def _describe(case: Case, provider: str) -> table.Row:
    return {
        "op": case.loss,
        "options": shapes.options_text(case),
        "provider": provider,
        "shape": shapes.shape_text(case),
        "dtype": shapes.dtype_text(case),
        "layout": case.student_layout,
    }


def _time_columns(quantiles: timing.Quantiles) -> table.Row:
    return {f"{name}_us": f"{value:.2f}" for name, value in quantiles._asdict().items()}


def _error_columns(errors: agreement.Errors) -> table.Row:
    return {"value_error": f"{errors.value:.1e}", "gradient_error": f"{errors.gradient:.1e}"}


def _stamped(stamp: table.Row, *rows: Iterator[table.Row]) -> list[table.Row]:
    return [{**row, **stamp} for several in rows for row in several]


def _slug(device: str) -> str:
    return device if device == "cpu" else "-".join(torch.cuda.get_device_name().lower().split())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="the figures of the README, in minutes (the default)")
    which.add_argument("--full", action="store_true", help="all shapes, dtypes and layouts, in hours on a CPU")
    which.add_argument("--step", action="store_true", help="whole training steps of a detector (needs torchvision)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--only", default="", metavar="TEXT", help="only workloads whose name contains TEXT")
    parser.add_argument("--seconds", type=float, default=5.0, help="of timing per workload (default: 5)")
    parser.add_argument("--output", metavar="FOLDER", help="default: benchmarks/results; with --only runs/benchmarks")
    return parser


if __name__ == "__main__":
    sys.exit(main())
