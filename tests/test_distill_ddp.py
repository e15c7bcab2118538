"""Data-parallel training in real processes: the same parameters as one process on the whole batch."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from distill_networks import LAYERS, Detector, images, targets
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from kdops import CWDLoss, MGDLoss
from kdops.distill import (
    DistilledOutput,
    DistilledStudent,
    Distiller,
    ProgressiveDistillation,
    Stage,
    StopDistillation,
    Tap,
    exclude_from_ddp,
)

STEPS, STOP, RANKS = 6, 4, 2
FORMS = ("wrapper", "accumulation", "own", "student", "static", "progressive", "checkpointing", "compiled")


class _Own(nn.Module):
    """Somebody's own module around student and distiller."""

    def __init__(self, distiller: Distiller) -> None:
        super().__init__()
        self.net, self.inner = distiller.student, nn.ModuleDict({"distiller": distiller})

    def forward(self, x: Tensor, y: Tensor) -> DistilledOutput:
        out = self.net(x, y)
        loss = self.inner["distiller"].loss()
        return DistilledOutput(out, loss.total, loss.terms)


def _network(width: int) -> Detector:
    network = Detector(width)
    network.stem[1] = nn.GroupNorm(2, width)  # no statistics over the batch, which the processes share
    return network


def _model(form: str, seed: int) -> DistilledStudent:
    """The networks are equal everywhere, the align layers only as far as the seed."""
    torch.manual_seed(0)
    student, teacher, other = _network(6), _network(10), _network(10)
    torch.manual_seed(seed)
    shared = nn.Conv2d(6, 10, 1, bias=False)  # one align layer of two taps
    taps = [Tap(layer, loss=CWDLoss(norm=None, tau=2.0), align=shared) for layer in LAYERS]
    # MGD, a loss with parameters of its own; lambda 0, as the processes would draw other masks than one process.
    taps.append(Tap("stage", loss=MGDLoss(6, 10, alpha_mgd=1e-3, lambda_mgd=0.0), name="mgd"))
    if form == "progressive":
        stages = [Stage(teacher, taps, steps=2), Stage(other, taps, steps=STOP - 2)]
        distiller = ProgressiveDistillation(student, stages)
    else:
        distiller = Distiller(student, teacher, taps, stop=StopDistillation(step=STOP))
    return DistilledStudent(distiller)


def _train(
    model: Callable[..., DistilledOutput],
    distiller: Distiller | ProgressiveDistillation,
    parameters: list[Tensor],
    part: slice,
    accumulate: int = 1,
) -> None:
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    distiller.bind(optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = images(8, seed=step)[part], targets(8, seed=step)[part]
        for a, b in zip(x.chunk(accumulate), y.chunk(accumulate)):
            out = model(a, b)
            ((out.student["loss_box"] + out.distill) / accumulate).backward()
        optimizer.step()
        distiller.step()


def _whole_batch(form: str) -> dict[str, Tensor]:
    model = _model(form, seed=100)
    _train(model, model.distiller, list(model.parameters()), slice(None))
    return model.state_dict()


def _call(form: str, model: DistilledStudent) -> Callable[[Tensor, Tensor], DistilledOutput]:
    """The ways to train in parallel: our wrapper, a module of one's own, the student alone."""
    if form == "checkpointing":
        neck = model.student.neck
        neck.forward = functools.partial(checkpoint, neck.forward, use_reentrant=False)
    if form == "compiled":
        model.student.compile(backend="aot_eager")
    if form not in ("own", "student"):
        return DistributedDataParallel(model, static_graph=form == "static")
    if form == "own":
        own = _Own(model.distiller)
        exclude_from_ddp(own)
        return DistributedDataParallel(own)
    student = DistributedDataParallel(model.student)

    def forward(x: Tensor, y: Tensor) -> DistilledOutput:
        out, loss = student(x, y), model.distiller.loss()
        return DistilledOutput(out, loss.total, loss.terms)

    return forward


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    for form in FORMS:
        model = _model(form, seed=100 + rank)
        part = slice(rank * 4, rank * 4 + 4)
        accumulate = 2 if form == "accumulation" else 1
        _train(_call(form, model), model.distiller, list(model.parameters()), part, accumulate)
        torch.save(model.state_dict(), Path(folder, f"{form}-{rank}.pt"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained() -> dict[str, list[dict[str, Tensor]]]:
    """State of every process after each form of training; the processes are started once, as that takes longest."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, (folder,), nprocs=RANKS)
        return {
            form: [torch.load(Path(folder, f"{form}-{rank}.pt"), weights_only=True) for rank in range(RANKS)]
            for form in FORMS
        }


@pytest.mark.parametrize("form", FORMS)
def test_two_processes_give_the_parameters_of_one(trained, form):
    expected, start = _whole_batch(form), _model(form, seed=100).state_dict()
    end = 2 if form == "progressive" else 1
    assert expected["distiller._extra_state"].tolist() == [STEPS, 0, end], "the run goes on behind the stop"
    if form != "progressive":
        assert "distiller.taps.loss.2.generation.0.weight" in expected and "distiller.taps.align.1.weight" in expected
    first, second = trained[form]
    for name, value in expected.items():
        if value.is_floating_point():
            assert not torch.equal(value, start[name]), f"{name} was not trained"
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-5)


def test_parameters_of_the_distiller_are_named_for_ddp_to_ignore():
    model = _model("wrapper", seed=1)
    wanted = [name for name, _ in model.named_parameters() if name.startswith("distiller.")]
    assert len(wanted) == 7
    assert model._ddp_params_and_buffers_to_ignore == wanted
