"""Tables and plots of a results file, and the README's table: ``python -m benchmarks.report [--readme]``."""

from __future__ import annotations

import argparse
import math
import os
from collections import defaultdict
from pathlib import Path

import torch

from benchmarks import plots, providers, table, timing

BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"
README = Path(__file__).resolve().parent.parent / "README.md"
PASS_PROVIDER = "read-read-write"
#: Maps that the streaming kernels of a GPU move in forward and backward. The lower bound is 3: read both,
#: write the gradient; on a CPU a channel stays in the cache, and the lower bound is the roofline.
MAPS_MOVED = {("cwd_loss", False): 3, ("cwd_loss", True): 7, ("pkd_loss", True): 5}

Key = tuple[str, ...]  # op, options, shape, dtype, layout


class Workload:
    """The rows of one workload by provider and mode."""

    def __init__(self, key: Key) -> None:
        self.op, self.options, self.shape, self.dtype, self.layout = key
        self.rows: dict[tuple[str, str], table.Row] = {}

    def time(self, provider: str, mode: str = timing.BOTH) -> float:
        """The median in microseconds; NaN where it was not measured."""
        row = self.rows.get((provider, mode), {})
        return float(row["p50_us"]) if row.get("p50_us") else math.nan

    def compiled(self) -> float:
        """torch.compile's time in the faster of its modes."""
        times = (self.time(providers.COMPILE), self.time(providers.MAX_AUTOTUNE))
        return min((t for t in times if not math.isnan(t)), default=math.nan)

    def peak_maps(self, provider: str) -> float:
        """Peak memory above the inputs, in student maps: the gradient alone is 1."""
        row = self.rows.get((provider, timing.BOTH), {})
        return float(row["peak_bytes"]) / self.map_bytes if row.get("peak_bytes") else math.nan

    @property
    def map_bytes(self) -> int:
        return elements(self.shape) * getattr(torch, self.dtype).itemsize

    @property
    def providers(self) -> list[str]:
        return [p for p, mode in self.rows if mode == timing.BOTH]

    @property
    def title(self) -> str:
        layout = "" if self.layout == "nchw" else f", {self.layout}"
        return f"{self.op} {self.options}, {self.shape} {self.dtype}{layout}"


def elements(shape: str) -> int:
    """Elements of ``8x128x80x80``, levels joined by ``+``."""
    return sum(math.prod(map(int, level.split("x"))) for level in shape.split("+"))


def workloads(rows: list[table.Row]) -> list[Workload]:
    """The workloads of a results file, in its order, without its rows on host time, first calls and plain copies."""
    found: dict[Key, Workload] = {}
    for row in rows:
        if row["mode"].startswith((timing.HOST, timing.STEP, timing.PART, "first call")) or row["op"] == "copy":
            continue
        key = tuple(row[c] for c in ("op", "options", "shape", "dtype", "layout"))
        found.setdefault(key, Workload(key)).rows[row["provider"], row["mode"]] = row
    return list(found.values())


def write(path: Path) -> str:
    """Write the Markdown and the plots beside a results file; return the Markdown."""
    rows = table.read(path)
    text = markdown(rows)
    _write_text(path.with_suffix(".md"), text)
    plots.write(path, workloads(rows))
    return text


def markdown(rows: list[table.Row]) -> str:
    """All tables of a results file."""
    first = rows[0]
    parts = [
        f"# Results on {first['device']}",
        f"torch {first['torch']}, triton {first['triton'] or 'not installed'}, kdops {first['kdops']}, commit "
        f"{first['commit'] or 'unknown'}, {first['date']}. Generated from the CSV of the same name; ../README.md says "
        "how each figure is measured.",
    ]
    bandwidth, on_cpu = copy_bandwidth(rows), first["device"].startswith("CPU")
    if bandwidth > 0:
        parts.append(f"A plain copy runs at {bandwidth / 1e9:.1f} GB/s.")
    tables = (
        ("Against eager and torch.compile", summary(rows)),
        ("Training steps", _step_table(rows)),
        ("Host time per call", _host_table(rows)),
        ("First call", _first_call_table(rows)),
    )
    for title, text in tables:
        parts += [f"## {title}", text] if text else []
    for workload in workloads(rows):
        parts += [f"### {workload.title}", _providers_table(workload), _model_line(workload, bandwidth, on_cpu)]
    return "\n\n".join(parts) + "\n"


def summary(rows: list[table.Row]) -> str:
    """One line per workload: forward+backward of kdops against the others."""
    lines = []
    for w in workloads(rows):
        kdops = w.time(providers.KDOPS)
        gradient = w.rows.get((providers.KDOPS, timing.BOTH), {}).get("gradient_error", "")
        lines.append((
            f"`{w.op}` {w.options}", w.shape.replace("+", " + "), w.dtype, w.layout,
            _times(w.time(providers.EAGER) / kdops), _times(w.compiled() / kdops),
            _number(kdops / w.time(PASS_PROVIDER, timing.PASS)),
            _number(w.peak_maps(providers.KDOPS)), _number(w.peak_maps(providers.EAGER)), gradient,
        ))  # fmt: skip
    head = (
        "loss", "shape", "dtype", "layout", "faster than eager", "faster than torch.compile", "time in passes",
        "peak memory in maps", "of eager", "gradient error",
    )  # fmt: skip
    return _table(head, lines)


def readme_section(results: Path = table.RESULTS) -> str:
    """What stands between the README's markers: one table per device, from the quick sets in a folder."""
    parts = []
    for path in sorted(results.glob("*_quick.csv")):
        rows = table.read(path)
        parts += [f"On {rows[0]['device']}, torch {rows[0]['torch']} ({rows[0]['date']}):", summary(rows)]
    parts.append(
        "Forward and backward, medians of one interleaved run. torch.compile in the faster of its modes; a pass reads "
        "both maps and writes one; memory is the peak above the inputs in units of one student map, the gradient "
        "included; the gradient's error is relative to fp64."
    )
    return "\n\n".join(parts)


def with_section(text: str, section: str) -> str:
    """A document with what stands between the markers replaced."""
    if (text.count(BEGIN), text.count(END)) != (1, 1):
        raise ValueError(f"with_section: the document must have {BEGIN} and {END} once each")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{section}\n{END}{rest.split(END)[1]}"


def copy_bandwidth(rows: list[table.Row]) -> float:
    """Bytes per second of the run's plain copy (read and written); NaN without one."""
    for row in rows:
        if row["op"] == "copy":
            return 2 * int(row["shape"]) * getattr(torch, row["dtype"]).itemsize / (float(row["p50_us"]) / 1e6)
    return math.nan


def _providers_table(w: Workload) -> str:
    reference = w.time(PASS_PROVIDER, timing.PASS)
    lines = []
    for p in w.providers:
        both = w.rows[p, timing.BOTH]
        lines.append((
            p, _ms(w.time(p, timing.FORWARD)), _ms(w.time(p, timing.BACKWARD)), _ms(w.time(p)),
            f"{_ms(float(both['p20_us']))} to {_ms(float(both['p80_us']))}", _number(w.time(p) / reference),
            _number(w.peak_maps(p)), both["value_error"], both["gradient_error"],
            _ms(w.time(p, timing.GRAPH)), _ms(w.time(p, timing.WARM_GRAPH)),
        ))  # fmt: skip
    lines.append((PASS_PROVIDER, "", "", _ms(reference), "", _number(1.0), *[""] * 5))
    lines += [(p, "no time: disagrees", *[""] * 5, row["value_error"], row["gradient_error"], "", "")
              for (p, mode), row in w.rows.items() if mode == "disagrees"]  # fmt: skip
    head = ("provider", "forward ms", "backward ms", "both ms", "p20 to p80", "in passes", "peak maps",
            "value error", "gradient error", "CUDA graph ms", "warm L2 ms")  # fmt: skip
    width = len(head) if any(mode == timing.GRAPH for _, mode in w.rows) else len(head) - 2
    return _table(head[:width], [line[:width] for line in lines])


def _model_line(w: Workload, bandwidth: float, on_cpu: bool) -> str:
    """Bandwidth by the bytes of the lower bound, and on a GPU the fraction of the streaming kernels' roofline."""
    seconds = w.time(providers.KDOPS) / 1e6
    graph = w.time(providers.KDOPS, timing.GRAPH) / 1e6
    if not math.isnan(graph):
        seconds = graph
    if math.isnan(seconds):
        return "kdops: no time."
    speed = 3 * w.map_bytes / seconds
    text = f"kdops: {speed / 1e9:.1f} GB/s by the floor of 3 maps, {speed / bandwidth:.0%} of the copy bandwidth"
    moved = MAPS_MOVED.get((w.op, "norm=None" not in w.options))
    if moved is not None and not on_cpu:
        text += f", {moved / 3 * speed / bandwidth:.0%} of the roofline at {moved} maps"
    return f"{text} ({'CUDA graph over cold inputs' if not math.isnan(graph) else 'interleaved run'})."


def _step_table(rows: list[table.Row]) -> str:
    lines = [
        (r["shape"], r["mode"], r["provider"], *(f"{float(r[q]) / 1e3:.1f}" for q in ("p20_us", "p50_us", "p80_us")),
         f"{float(r['peak_bytes']) / 2**20:.1f}")
        for r in rows if r["mode"] in (timing.STEP, timing.PART)
    ]  # fmt: skip
    return _table(("images", "of what", "loss", "p20 ms", "p50 ms", "p80 ms", "peak MiB above weights"), lines)


def _host_table(rows: list[table.Row]) -> str:
    lines = [
        (f"`{r['op']}`", r["provider"], r["mode"].split(", ", 1)[1], r["p20_us"], r["p50_us"], r["p80_us"])
        for r in rows if r["mode"].startswith(timing.HOST)
    ]  # fmt: skip
    return _table(("loss", "what", "mode", "p20 us", "p50 us", "p80 us"), lines)


def _first_call_table(rows: list[table.Row]) -> str:
    seconds: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row["mode"].startswith("first call"):
            seconds[row["provider"]].append(f"{float(row['p50_us']) / 1e6:.3f}")
    return _table(("provider", "cold cache s", "warm cache s"), [(p, *s) for p, s in seconds.items()])


def _table(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    if not lines:
        return ""
    rule = ("---",) * len(head)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *lines))


def _times(ratio: float) -> str:
    return "" if math.isnan(ratio) else f"{_number(ratio)}x"


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _ms(microseconds: float) -> str:
    return "" if math.isnan(microseconds) else f"{microseconds / 1e3:.3g}"


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("csv", nargs="*", type=Path, help="default: every CSV of benchmarks/results")
    parser.add_argument("--readme", action="store_true", help="also write the README's tables, from the quick sets")
    options = parser.parse_args(arguments)
    for path in options.csv or sorted(table.RESULTS.glob("*_*.csv")):
        write(path)
    if options.readme:
        _write_text(README, with_section(README.read_text(encoding="utf-8"), readme_section()))


if __name__ == "__main__":
    main()
