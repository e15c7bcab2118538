"""Random calls of the public losses, and tests that their judge detects errors."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import fuzz
import pytest
import torch
from backends import OPERATORS, Choice
from exact import norms
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from judge import judge, operators, public, same_bits
from ptx import counters
from random_calls import LOSSES, Call, Level, Values, random_call

from kdops import _extension
from kdops._op import Save

EXAMPLES = {"cwd_loss": 400, "pkd_loss": 400, "mgd_loss": 100, "MGDLoss": 120}
few = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.fixture(autouse=True)
def one_thread():
    """Small maps by the thousand: a second thread would only wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@st.composite
def calls(draw, losses, resize=True):
    return random_call(lambda choices: draw(st.sampled_from(choices)), losses, resize)


def assert_right(call, backend=public):
    note(fuzz.command(call))
    assert [str(m) for m in judge(call, backend)] == []


def of_cpu(loss):
    operator = torch.ops.kdops
    return SimpleNamespace(
        forward=getattr(operator, loss).default, backward=getattr(operator, f"{loss}_backward").default
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_public(loss):
    @settings(few, max_examples=EXAMPLES[loss])
    @given(calls((loss,)))
    def run(call):
        assert_right(call)

    run()


@pytest.mark.parametrize("loss", OPERATORS)
@pytest.mark.parametrize("save", [Save.STATS, Save.GRADS], ids=lambda s: s.name)
def test_operators(loss, save):
    """Both ways to the gradient. fp16's and that of reduction "none" are never the forward's."""

    @settings(few, max_examples=100)
    @given(calls((loss,), resize=False))
    def run(call):
        fits = call.reduction != "none" and all(level.student_dtype in ("float32", "float64") for level in call.levels)
        if save == Save.STATS or fits:
            assert_right(call, operators(of_cpu, save))

    run()


@pytest.mark.parametrize("instruction_set", _extension.extension.instruction_sets()[1:] if _extension.extension else [])
def test_other_instruction_sets(instruction_set):
    @settings(few, max_examples=150)
    @given(calls(OPERATORS))
    def run(call):
        assert_right(call)

    _extension.extension.use_instruction_set(instruction_set)
    try:
        run()
    finally:
        _extension.extension.use_instruction_set(_extension.extension.instruction_sets()[0])


#: Of as many calls as half a minute has room for.
OTHERS = {"cuda90": 300, "triton90": 20, "interpreter": 30}


@pytest.mark.parametrize("backend", OTHERS)
def test_kernels_for_a_gpu(backend, tmp_path):
    """Each in a process of its own."""
    pytest.importorskip("triton")
    reason = None if backend == "interpreter" else counters.missing(backend.rstrip("0123456789"))
    if reason:
        pytest.skip(reason)
    arguments = ["--backend", backend, "--calls", str(OTHERS[backend]), "--seconds", "1000", "--out", str(tmp_path)]
    script = Path(fuzz.__file__)
    environment = {**os.environ, "PYTHONPATH": str(script.parent.parent)}
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and f"{OTHERS[backend]} calls, 0 missed" in done.stdout, done.stdout + done.stderr


def some_calls(count=60):
    pick = random.Random(0).choice
    return [random_call(pick) for _ in range(count)]


def test_a_call_is_rebuilt_bit_for_bit():
    for call in some_calls():
        again = Call.from_json(call.json())
        assert again == call and again.options == call.options
        first, second = call.inputs(), again.inputs()
        for a, b in zip(first.buffers + first.leaves, second.buffers + second.leaves):
            assert a.stride() == b.stride() and same_bits(a, b)


def test_every_call_can_be_made_simple():
    """Nothing but the simplest values is left where everything misses."""

    def refuse(call, inputs, weights):
        raise ValueError("no")

    for call in some_calls(20):
        simple = fuzz.simplest(call, (call.loss, "raised ValueError: no"), Choice(refuse))
        assert len(simple.levels) == 1 and simple.values == Values() and simple.weight == 1.0
        normalised = simple.options.get("norm") is not None
        assert simple.levels[0] == Level(simple.levels[0].shape)
        assert sorted(simple.levels[0].shape) == [1, 1, 1, 2 if normalised else 1]


# ---- the judge detects errors ---------------------------------------------------------------------------------------
CALL = Call(
    "cwd_loss",
    levels=(Level((2, 3, 4, 5)), Level((2, 3, 2, 2), student_dtype="bfloat16")),
    as_list=True,
    options={"norm": "batch", "tau": 2.0, "eps": None, "loss_weight": 1.0, "reduction": "none"},
)


def spoilt(spoil):
    """The public losses, with something done to what they give."""

    def run(call, inputs, weights):
        values, gradients = public(call, inputs, weights)
        spoil(values, gradients, inputs)
        return values, gradients

    return run


def add(what, amount, of_level=0):
    return lambda v, g, i: (v if what == "value" else g)[of_level][0, 1].mul_(1 + amount)


FAULTS = {
    "value_of_a_row": add("value", 2e-5),
    "gradient_of_a_row": add("gradient", 1e-4),
    "gradient_of_a_row_in_bf16": add("gradient", 3e-2, 1),
    "nan": lambda v, g, i: g[0][0, 0].fill_(torch.nan),
    "dtype": lambda v, g, i: g.__setitem__(0, g[0].double()),
    "layout": lambda v, g, i: g.__setitem__(0, g[0].transpose(2, 3).contiguous().transpose(2, 3)),
    "value_dtype": lambda v, g, i: v.__setitem__(0, v[0].double()),
    "input": lambda v, g, i: i.teachers[0][0, 0, 0, 0].mul_(1 + 1e-6),
    "memory_around_an_input": lambda v, g, i: i.buffers[0].view(-1)[:1].neg_(),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(fault):
    assert judge(CALL) == []
    assert judge(CALL, spoilt(FAULTS[fault]))


def test_a_small_channel_is_not_hidden_by_a_large_one():
    """One element of 10^4 makes its channel's gradient smaller than the rounding of the others."""
    options = {"norm": "pkd", "eps": None, "loss_weight": 1.0}

    def spoil(values, gradients, inputs):
        sizes = norms(gradients[0], (1,))
        assert sizes.min() * 1e-3 < 1e-6 * sizes.max()
        gradients[0][:, sizes.argmin()] *= 1.001

    misses = judge(Call("pkd_loss", options=options, values=Values(spike=1e4)), spoilt(spoil))
    assert len(misses) == 1 and "gradient 0 of channel" in misses[0].what


def test_a_campaign_stores_and_repeats_its_misses(tmp_path, capsys):
    def spoil(values, gradients, inputs):
        values[0].mul_(1.01)

    arguments = ["--seconds", "1", "--losses", "pkd_loss", "--simplify", "1", "--out", str(tmp_path)]
    spoils = Choice(spoilt(spoil))
    assert fuzz.main(arguments, spoils) == 1
    lines = [json.loads(line) for line in (tmp_path / "seed0.jsonl").read_text().splitlines()]
    assert lines and all(line["misses"] for line in lines)
    repeat = ["--repeat", json.dumps(lines[0]["simple"])]
    assert "--repeat" in capsys.readouterr().out
    assert fuzz.main(repeat, spoils) == 1
    assert fuzz.main(repeat) == 0
