"""The counters of kernels against counters.csv, and the checker itself."""

import re
import warnings

import pytest

from . import counters, mode, sheet
from .sheet import Row, Step

STEP = Step("triton", "cwd-batch", "40x40", "bf16", "channels_last", 90)
COUNTERS = dict.fromkeys(sheet.LIMITS, 1000.0)
#: Sectors read in a step that reviews have counted by hand.
REVIEWED = {"cwd_sums": 33_816, "cwd_gradient": 45_360}


def rows(compiler="triton 3.8.0", kernel="cwd_sums", **changes):
    return [Row(STEP, kernel, compiler, {**COUNTERS, **changes})]


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_no_counter_has_become_worse(backend):
    reason = counters.missing(backend)
    if reason:
        pytest.skip(reason)
    found = sheet.compare(sheet.read(), counters.counted(backend, 90, quick=True))
    if found.compilers:
        warnings.warn(counters.warning(found), stacklevel=1)
    if found.failures:
        pytest.fail(counters.failure(found), pytrace=False)


def test_what_is_stored_spills_nothing_and_keeps_what_was_reached():
    stored = sheet.read()
    assert {row.step.architecture for row in stored} == set(sheet.ARCHITECTURES)
    assert [f"{row.step} {row.kernel}" for row in stored if row.counters["local_bytes"]] == []
    for kernel, sectors in REVIEWED.items():
        (row,) = (row for row in stored if row.key == (STEP, kernel))
        assert row.counters["read_sectors"] <= sectors


@pytest.mark.parametrize("name", sheet.LIMITS)
def test_each_counter_fails_beyond_its_limit(name):
    limit = sheet.LIMITS[name]
    for changed in (1060.0, 1040.0, 960.0, 940.0):
        found = sheet.compare(rows(), rows(**{name: changed}))
        worse = changed > 1000 if limit.more_is_worse else changed < 1000
        fails = worse and (limit.below == 0 or abs(changed - 1000) >= 1000 * limit.below)
        assert [(x.counter, x.old, x.new) for x in found.failures] == [(name, 1000, changed)] * fails
        assert len(found.all) == 1 and not found.reports


def test_what_was_nothing_may_not_become_something():
    (spill,) = sheet.compare(rows(local_bytes=0.0), rows(local_bytes=8.0)).failures
    assert (spill.counter, spill.old, spill.new) == ("local_bytes", 0, 8)


def test_a_failure_names_kernel_step_counter_old_and_new():
    found = sheet.compare(rows(read_sectors=33816.0), rows(read_sectors=35845.0))
    text = re.sub(" +", " ", counters.failure(found))
    assert "triton cwd-batch 40x40 bf16 channels_last sm_90\n ! cwd_sums read_sectors 33,816 -> 35,845 (+6.0%)" in text
    assert "1 counters are worse" in text and "--write" in text


def test_another_compiler_reports_and_does_not_fail():
    found = sheet.compare(rows(), rows("triton 3.9.0", read_sectors=1060.0, local_bytes=1008.0))
    assert not found.failures and {x.counter for x in found.reports} == {"read_sectors", "local_bytes"}
    text = counters.warning(found)
    assert "rows of triton 3.8.0 compared with triton 3.9.0" in text and "read_sectors" in text and "2 are" in text
    assert sheet.compare(rows(), rows("triton 3.9.0")).compilers


def test_a_new_kernel_fails_and_one_that_is_gone_does_not():
    both = [*rows(), *rows(kernel="cwd_more")]
    (more,) = sheet.compare(rows(), both).failures
    assert (more.kernel, more.counter, more.old, more.new) == ("cwd_more", "launches", None, 1000)
    found = sheet.compare(both, rows())
    assert not found.failures and [(x.kernel, x.new) for x in found.others] == [("cwd_more", None)]
    assert sheet.compare(rows(), both[1:]).failures
    (report,) = sheet.compare(rows(), [*rows("triton 3.9.0"), *rows("triton 3.9.0", "cwd_more")]).reports
    assert report.kernel == "cwd_more"


def test_steps_that_were_not_counted_are_left_out():
    other = [Row(STEP._replace(shape="20x20"), "cwd_sums", "triton 3.8.0", COUNTERS)]
    assert not sheet.compare([*rows(), *other], rows()).all


def test_what_architectures_are_only_compiled_for_has_no_counts(tmp_path):
    registers = [Row(STEP, "cwd_sums", "nvcc 13.0.88", {"registers": 64.0, "local_bytes": 0.0})]
    sheet.write([*registers, *rows(kernel="cwd_more", instructions=12.25)], tmp_path / "rows.csv")
    more, only = sheet.read(tmp_path / "rows.csv")
    assert (only, only.counters) == (registers[0], registers[0].counters)
    assert more.counters == {**COUNTERS, "instructions": 12.25}
    assert [row.kernel for row in sheet.totals([more])] == ["all"] and not sheet.totals([only])


def test_the_report_shows_kernels_and_steps():
    old, new = [*rows(), *rows(kernel="cwd_more")], rows(read_sectors=900.0)
    text, failed = counters.report(old, new, "")
    lines = [re.sub(" +", " ", line).strip() for line in text.splitlines()]
    assert not failed and "cwd_sums read_sectors 1,000 -> 900 (-10.0%)" in lines
    assert "all read_sectors 2,000 -> 900 (-55.0%)" in lines and "cwd_more launches 1,000 -> none (-100.0%)" in lines
    assert counters.report(rows(), rows(launches=1001.0), "")[1]
    assert "cwd_sums" not in counters.report(old, new, "cwd_more")[0]


@pytest.fixture
def counting(monkeypatch):
    monkeypatch.setattr(mode.options, "count", True)


def recounted(step):
    """Rows of what has been launched since the test began, as if by the compiler of the stored ones."""
    from . import count

    compiler = next(row.compiler for row in sheet.read() if row.step == step)
    elements = 2 * 64 * 40 * 40
    for entry, pairs in count.by_entry().items():
        yield Row(step, entry, compiler, count.counted([result for _, result in pairs], elements))


@pytest.mark.ptx
def test_tiles_that_use_half_of_each_sector_fail(counting, monkeypatch):
    from kdops._triton import plan

    from . import count

    step = STEP._replace(architecture=mode.architecture)
    monkeypatch.setattr(plan, "_fitting", lambda *_: 8)  # channels of a tile
    plan._groups.cache_clear()
    count.run_on_triton(step)
    plan._groups.cache_clear()
    failures = {(x.kernel, x.counter) for x in sheet.compare(sheet.read(), recounted(step)).failures}
    assert {("cwd_moments", "read_sectors"), ("cwd_sums", "read_sectors")} <= failures


@pytest.mark.ptx
def test_a_load_that_is_done_twice_fails(counting):
    from . import count, memory
    from .interpreter import Module

    step = STEP._replace(architecture=mode.architecture)
    with memory.held():
        count.run_on_triton(step)
        at = next(i for i, launch in enumerate(mode.launches) if launch[1] == "cwd_sums")
        module, entry, grid, block, values, where = mode.launches[at]
        twice = re.sub(r"(?m)^(.*ld\.global\.v4.*)$", r"\1\n\1", module.text)
        assert twice != module.text
        launched = Module(twice).launch(entry, grid, block, values, memory.allocations(), options=mode.options, **where)
        mode.results[at] = launched
    found = sheet.compare(sheet.read(), recounted(step))
    assert ("cwd_sums", "read_sectors") in {(x.kernel, x.counter) for x in found.failures}
