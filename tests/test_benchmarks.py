"""The benchmarks measure what they say: agreement first, quantiles, memory, ratios, and the README's table."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # benchmarks/ is not part of the installed package
    sys.path.insert(0, str(ROOT))

from benchmarks import agreement, host, memory, providers, report, run, shapes, table, timing  # noqa: E402
from kdops import testing  # noqa: E402

SMALL = shapes.workload("cwd_loss", (2, 8, 12, 10), (2, 8, 6, 5))


@pytest.mark.parametrize("loss", ["cwd_loss", "pkd_loss"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_the_eager_baseline_is_the_published_function(loss, layout):
    """In fp64 it equals the oracle, for every option of the loss's cases and over levels."""
    for options in testing.LOSSES[loss][1]:
        kinds = (torch.float64, torch.float64, layout, layout)
        case = testing.Case(loss, options, testing.SHAPES["pyramid"], *kinds)
        student, teacher = case.inputs()
        oracle = agreement.Oracle(case, student, teacher)
        errors = oracle.errors(providers.EAGER, providers.build(providers.EAGER, case), student, teacher)
        assert errors.value < 1e-12 and errors.gradient < 1e-12


def test_rows_of_a_workload():
    names = [providers.EAGER, providers.KDOPS, providers.KDOPS_PER_LEVEL]
    rows = list(run.workload_rows(SMALL, names, "cpu", seconds=0.01))
    measured = {(r["provider"], r["mode"]): r for r in rows}
    modes = (timing.FORWARD, timing.BACKWARD, timing.BOTH)
    assert set(measured) == {(n, m) for n in names for m in modes} | {(run.READ_READ_WRITE, timing.PASS)}
    for row in rows:
        assert 0 < float(row["p20_us"]) <= float(row["p50_us"]) <= float(row["p80_us"])
        assert row["shape"] == "2x8x12x10+2x8x6x5" and set(row) <= set(table.COLUMNS)
    one_map = 4 * shapes.elements(SMALL)
    assert one_map <= int(measured[providers.KDOPS, timing.BOTH]["peak_bytes"]) < int(
        measured[providers.EAGER, timing.BOTH]["peak_bytes"]
    )
    assert 0 < float(measured[providers.KDOPS, timing.BOTH]["gradient_error"]) < 1e-5


def test_no_speed_without_agreement(monkeypatch):
    """A correct value with a wrong gradient: its errors are reported, its time is not."""
    fused = providers.build(providers.KDOPS, SMALL)
    build = providers.build

    def wrong(student, teacher):
        value = fused(student, teacher)
        return value + (value - value.detach()) * 1e-3

    monkeypatch.setattr(providers, "build", lambda name, case: wrong if name == providers.KDOPS else build(name, case))
    rows = list(run.workload_rows(SMALL, [providers.EAGER, providers.KDOPS], "cpu", seconds=0.01))
    (row,) = [r for r in rows if r["provider"] == providers.KDOPS]
    assert row["mode"] == run.DISAGREES and "p50_us" not in row
    assert float(row["value_error"]) < 1e-6 and float(row["gradient_error"]) == pytest.approx(1e-3, rel=0.1)
    assert any(r["provider"] == providers.EAGER and r["mode"] == timing.BOTH for r in rows)


def test_peak_memory_counts_what_is_alive_together():
    held = torch.ones(1000)

    def call():
        first = held + 1  # 4000 bytes
        second = torch.cat([first, first])  # 8000 more: the peak
        del first
        return second[:10] * 2

    assert 12000 <= memory.peak_above_inputs(call, "cpu") < 12500


def test_quantiles_are_of_the_samples():
    assert timing.quantiles([i * 1e-6 for i in range(1, 12)]) == pytest.approx((3.0, 6.0, 9.0))


def test_interleaved_times_every_step_and_mode():
    x = torch.ones(4, requires_grad=True)
    steps = {"graph": timing.Step(lambda: (x * 2).sum(), x), "plain": timing.Step(lambda: x.detach() * 2)}
    samples = timing.interleaved(steps, 0.01, "cpu")
    assert set(samples["graph"]) == {timing.FORWARD, timing.BACKWARD, timing.BOTH}
    assert set(samples["plain"]) == {timing.PASS}
    for forward, backward, both in zip(*samples["graph"].values()):
        assert both == pytest.approx(forward + backward)
    assert len(samples["plain"][timing.PASS]) >= timing.FEWEST


def test_host_cost_is_broken_down():
    measured = host.measure(shapes.workload("cwd_loss", host.SHAPE), "cpu", 0.2)
    whole = measured[providers.KDOPS, timing.BOTH].p50
    parts = [q.p50 for (_, mode), q in measured.items() if mode == "below autograd"]
    assert parts and 0 < sum(parts) < whole


def test_ratios_are_those_of_the_csv(tmp_path):
    common = {"op": "cwd_loss", "options": "norm=batch", "shape": "2x3x4x5+1x2x3x4", "dtype": "bfloat16",
              "layout": "nchw", "device": "CPU", "torch": "t", "triton": "", "kdops": "k", "date": "d",
              "commit": "c"}  # fmt: skip
    times = {providers.EAGER: 1000, providers.COMPILE: 300, providers.MAX_AUTOTUNE: 250, providers.KDOPS: 50}
    rows = [
        {**common, "provider": p, "mode": timing.BOTH, "p20_us": str(t), "p50_us": str(t), "p80_us": str(t),
         "peak_bytes": str(288 * 3), "gradient_error": "1e-7", "value_error": "1e-8"}
        for p, t in times.items()
    ]  # fmt: skip
    rows.append({**common, "provider": run.READ_READ_WRITE, "mode": timing.PASS, "p50_us": "20"})
    table.write(tmp_path / "cpu_quick.csv", rows)
    cells = report.summary(table.read(tmp_path / "cpu_quick.csv")).splitlines()[2].split(" | ")
    assert cells[4:9] == ["20.0x", "5.00x", "2.50", "3.00", "3.00"]  # 144 elements of 2 bytes are a map
    report.write(tmp_path / "cpu_quick.csv")
    assert {p.name for p in tmp_path.iterdir()} == {
        "cpu_quick.csv", "cpu_quick.md", "cpu_quick_speed.png", "cpu_quick_memory.png"
    }  # fmt: skip


@pytest.mark.parametrize("path", sorted(table.RESULTS.glob("*_*.csv")), ids=lambda p: p.stem)
def test_results_are_generated_from_their_csv(path):
    assert path.with_suffix(".md").read_text(encoding="utf-8") == report.markdown(table.read(path))


def test_the_readme_shows_the_figures_of_the_csv():
    text = report.README.read_text(encoding="utf-8")
    section = report.readme_section()
    assert "`cwd_loss`" in section and report.with_section(text, section) == text


def test_a_document_without_markers_is_refused():
    with pytest.raises(ValueError, match="figures:begin"):
        report.with_section("no markers", "section")


@pytest.mark.gpu
def test_on_a_gpu():
    case = shapes.workload("cwd_loss", (2, 16, 20, 20), dtype=torch.bfloat16)
    rows = list(run.workload_rows(case, [providers.EAGER, providers.KDOPS], "cuda", seconds=0.05))
    assert (providers.KDOPS, timing.GRAPH) in {(r["provider"], r["mode"]) for r in rows}
    assert not any(r["mode"] == run.DISAGREES for r in rows)
