"""The Lightning callback on a few real steps, against the plain loop with the same Distiller."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_networks import LAYERS, Detector, images, pair, targets
from torch import Tensor, nn
from torchvision_import import skip_where_torchvision_is_broken

skip_where_torchvision_is_broken()
pytest.importorskip("lightning", reason="needs Lightning: pip install lightning")
from kdops.integrations.pytorch.lightning import DistillationCallback  # noqa: E402
from lightning.pytorch import LightningModule, Trainer  # noqa: E402
from lightning.pytorch.callbacks import Callback, ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402

from kdops import CWDLoss, MGDLoss  # noqa: E402
from kdops.distill import (  # noqa: E402
    Distiller,
    LinearWeight,
    ProgressiveDistillation,
    Stage,
    StopDistillation,
    Tap,
    TeacherOptions,
    student_checkpoint,
)

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*The number of training batches"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory"),
]
BATCHES = [(images(seed=i), targets(seed=i)) for i in range(4)]
SETTINGS = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "log_every_n_steps": 1,
}


class Module(LightningModule):
    """A user's training code: it knows nothing of distillation."""

    def __init__(self, model: nn.Module, as_dict: bool = False) -> None:
        super().__init__()
        self.model = model
        self.as_dict = as_dict

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.model(*batch)["loss_box"]
        return {"loss": loss, "other": 1} if self.as_dict else loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)]


def _distiller(student: nn.Module, teacher: nn.Module, **options: Any) -> Distiller:
    torch.manual_seed(7)
    taps = [Tap(layer, loss=CWDLoss(norm="batch"), align=(6, 10)) for layer in LAYERS]
    return Distiller(student, teacher, taps, **options)


def _fit(module: LightningModule, *callbacks: Callback, ckpt: Path | None = None, **settings: Any) -> Trainer:
    settings = {"logger": False, "enable_checkpointing": False, "max_epochs": 2, **SETTINGS, **settings}
    trainer = Trainer(callbacks=list(callbacks), **settings)
    trainer.fit(module, torch.utils.data.DataLoader(BATCHES, batch_size=None), ckpt_path=ckpt)
    return trainer


def _plain_loop(student: nn.Module, distiller: Distiller, epochs: int = 2, accumulate: int = 1) -> None:
    """What the callback must amount to."""
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    distiller.bind(optimizer)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for epoch in range(epochs):
        distiller.set_epoch(epoch)
        for number, batch in enumerate(BATCHES):
            loss = student(*batch)["loss_box"] + distiller.loss()
            (loss / accumulate).backward()
            if (number + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
                distiller.step()
        schedule.step()


def _state(*modules: nn.Module) -> list[Tensor]:
    return [value.clone() for module in modules for value in module.state_dict().values()]


def _assert_same(left: list[Tensor], right: list[Tensor]) -> None:
    assert len(left) == len(right) > 0
    for a, b in zip(left, right):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_equals_the_plain_loop(as_dict, accumulate):
    student, teacher = pair()
    twin, untouched = copy.deepcopy(student), _state(teacher)
    weight = LinearWeight(1.0, 0.2, steps=3)
    reference = _distiller(twin, copy.deepcopy(teacher), weight=weight)
    start = _state(reference)
    _plain_loop(twin, reference, accumulate=accumulate)
    distiller = _distiller(student, teacher, weight=weight)
    module = Module(student, as_dict)
    _fit(module, DistillationCallback(distiller), accumulate_grad_batches=accumulate)
    _assert_same(_state(student, distiller), _state(twin, reference))
    assert distiller.progress == (8 // accumulate, 1)
    assert not any(torch.equal(a, b) for a, b in zip(start, _state(distiller))), "the align layers were not trained"
    _assert_same(_state(teacher), untouched)
    assert "training_step" not in module.__dict__, "the module's own training_step must be back"


def test_prepared_teacher_leaves_a_run_and_the_given_teacher_as_they_are():
    student, teacher = pair()
    twin, untouched = copy.deepcopy(student), [*_state(teacher), *(p.requires_grad for p in teacher.parameters())]
    reference = _distiller(twin, copy.deepcopy(teacher))
    _plain_loop(twin, reference)
    distiller = _distiller(student, teacher, teacher_options=TeacherOptions(compile=False))
    _fit(Module(student, False), DistillationCallback(distiller))
    assert distiller.teacher_report.folded == ["stem.0"]
    for a, b in zip(_state(student, distiller), _state(twin, reference)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip([*_state(teacher), *(p.requires_grad for p in teacher.parameters())], untouched):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_terms_are_logged_beside_the_users_own(tmp_path):
    student, teacher = pair()
    twin = copy.deepcopy(student)
    reference = _distiller(twin, copy.deepcopy(teacher), split_terms=True)
    twin(*BATCHES[0])
    expected = reference.loss()
    logger = CSVLogger(tmp_path, name="", version="")
    distiller = _distiller(student, teacher, split_terms=True)
    _fit(Module(student), DistillationCallback(distiller), logger=logger, max_epochs=1)
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    header, first = (line.split(",") for line in lines[:2])
    logged = dict(zip(header, first))
    for name, term in expected.terms.items():
        assert float(logged[f"distill/{name}"]) == pytest.approx(term.item(), rel=1e-6)
    assert len(expected.terms) == 2
    assert float(logged["distill/total"]) == pytest.approx(expected.total.item(), rel=1e-6)
    assert len(lines) == 1 + len(BATCHES)


def test_checkpoint_holds_no_teacher_and_gives_a_student(tmp_path):
    student, teacher = pair()
    distiller = _distiller(student, teacher)
    trainer = _fit(Module(student), DistillationCallback(distiller), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    content = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert set(content["state_dict"]) == {f"model.{key}" for key in student.state_dict()}
    (state,) = content["callbacks"].values()
    assert list(state["distiller"]) == ["_extra_state", "taps.align.0.weight", "taps.align.1.weight"]
    count = len(list(student.parameters())) + 2
    assert len(content["optimizer_states"][0]["state"]) == count, "the align layers must be in the optimizer"
    done = student_checkpoint(tmp_path / "run.ckpt", tmp_path / "student.pth")
    assert done.layout == "kdops" and done.kept.tensors == len(student.state_dict())
    plain = Detector(6)
    plain.load_state_dict(torch.load(tmp_path / "student.pth")["state_dict"])
    _assert_same(_state(plain), _state(student))


def test_distillation_stops_in_the_middle_of_a_run():
    student, teacher = pair()
    twin = copy.deepcopy(student)
    reference = _distiller(twin, copy.deepcopy(teacher), stop=StopDistillation(epoch=1))
    _plain_loop(twin, reference)
    told = []
    distiller = _distiller(student, teacher, stop=StopDistillation(epoch=1, callback=told.append))
    trainer = _fit(Module(student), DistillationCallback(distiller))
    assert distiller.stopped and distiller.teacher is None and told == [distiller]
    _assert_same(_state(student, distiller), _state(twin, reference))
    optimizer = trainer.optimizers[0]
    assert not any(p in optimizer.state for p in distiller.taps.parameters())
    assert not student._forward_hooks and not student.get_submodule(LAYERS[0])._forward_hooks


def _callback(student: nn.Module, teacher: nn.Module, kind: str) -> DistillationCallback:
    if kind == "progressive":
        torch.manual_seed(7)
        taps = [Tap(LAYERS[0], loss=CWDLoss(), align=(6, 10))]
        stages = [Stage(copy.deepcopy(teacher), taps, steps=3), Stage(lambda: copy.deepcopy(teacher), taps)]
        return DistillationCallback(ProgressiveDistillation(student, stages))
    if kind == "function":
        return DistillationCallback(lambda module: _distiller(module.model, teacher))
    if kind == "unknown widths":
        torch.manual_seed(7)
        return DistillationCallback(Distiller(student, teacher, [Tap(LAYERS[0], loss=CWDLoss(), align=True)]))
    if kind == "mgd":
        torch.manual_seed(7)
        return DistillationCallback(Distiller(student, teacher, [Tap(LAYERS[0], loss=MGDLoss(6, 10))]))
    return DistillationCallback(
        _distiller(student, teacher, stop=StopDistillation(**{kind: 1 if kind == "epoch" else 6}))
    )


@pytest.mark.parametrize("kind", ["epoch", "step", "progressive", "function", "unknown widths", "mgd"])
def test_a_resumed_run_equals_one_without_a_break(kind, tmp_path):
    student, teacher = pair()
    resumed, alike = copy.deepcopy(student), copy.deepcopy(teacher)
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole = _callback(student, teacher, kind)
    torch.manual_seed(11)
    _fit(Module(student), whole, saver, enable_checkpointing=True, max_epochs=3)
    again = _callback(resumed, alike, kind)
    step = 12 if kind == "mgd" else 8  # MGD's masks would be drawn anew
    _fit(Module(resumed), again, ckpt=tmp_path / f"step={step}.ckpt", max_epochs=3)
    _assert_same(_state(resumed, again.distiller), _state(student, whole.distiller))
    assert again.distiller.progress == whole.distiller.progress
    assert again.distiller.stopped == whole.distiller.stopped == (kind in ("epoch", "step"))


def test_skipped_batches_and_validation_leave_nothing_behind():
    class Skipping(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 1 else loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.model(batch[0])

        def val_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(BATCHES[:1], batch_size=None)

    student, teacher = pair()
    distiller = _distiller(student, teacher)
    trainer = _fit(Skipping(student), DistillationCallback(distiller), max_epochs=1)
    assert distiller.progress[0] == trainer.global_step > 0
    with pytest.raises(RuntimeError, match="asked for twice after one forward"):
        distiller.loss()


def test_misuse_is_refused_in_words():
    class Manual(Module):
        automatic_optimization = False

    student, teacher = pair()
    with pytest.raises(RuntimeError, match="must optimize automatically, got automatic_optimization=False"):
        _fit(Manual(student), DistillationCallback(_distiller(student, teacher)))
    module = Module(Detector(6))
    with pytest.raises(
        ValueError, match="student must be a part of the LightningModule.*got a Detector that is no part"
    ):
        _fit(module, DistillationCallback(_distiller(student, teacher)))
    assert "training_step" not in module.__dict__
    with pytest.raises(TypeError, match="distiller must be a Distiller.*got Detector"):
        DistillationCallback(teacher)
    with pytest.raises(TypeError, match="the function must return a Distiller.*got NoneType"):
        _fit(Module(student), DistillationCallback(lambda module: None))


def test_an_error_in_training_gives_the_module_its_step_back():
    class Failing(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise ZeroDivisionError

    student, teacher = pair()
    module = Failing(student)
    with pytest.raises(ZeroDivisionError):
        _fit(module, DistillationCallback(_distiller(student, teacher)))
    assert "training_step" not in module.__dict__


class Plain(nn.Module):
    """A student without statistics over the batch, so that it computes the same on the halves of one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3))
        self.head = nn.Conv2d(width, 4, 1)

    def forward(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"loss_box": (self.head(self.body(images)).mean((2, 3)) - targets).square().mean()}


class Shared(Module):
    """Every process trains on its share of each batch."""

    def train_dataloader(self) -> Any:
        share = slice(self.trainer.global_rank, None, self.trainer.world_size)
        return torch.utils.data.DataLoader([(x[share], y[share]) for x, y in BATCHES], batch_size=None)


class Saver(Callback):
    """Writes the trained parameters in the process that trained them."""

    def __init__(self, distiller: Distiller, path: Path) -> None:
        self.distiller = distiller
        self.path = path

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_rank == 0:
            torch.save(_state(pl_module, self.distiller), self.path)


def test_two_processes_give_the_parameters_of_one(tmp_path):
    torch.manual_seed(0)
    student, teacher = Plain(6), Plain(10)
    for devices, strategy in ((1, "auto"), (2, "ddp_fork")):
        torch.manual_seed(5)
        taps = [Tap("body.2", loss=CWDLoss(), align=(6, 10))]
        module = Shared(copy.deepcopy(student))
        distiller = Distiller(module.model, copy.deepcopy(teacher), taps, stop=StopDistillation(epoch=2))
        trainer = Trainer(
            callbacks=[DistillationCallback(distiller), Saver(distiller, tmp_path / f"{devices}.pt")],
            devices=devices,
            strategy=strategy,
            use_distributed_sampler=False,
            max_epochs=3,
            logger=False,
            enable_checkpointing=False,
            **SETTINGS,
        )
        trainer.fit(module)
    one, two = (torch.load(tmp_path / f"{devices}.pt") for devices in (1, 2))
    assert len(one) == len(two) == len(_state(student)) + 2
    for a, b, start in zip(one, two, _state(student)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert not torch.equal(a, start)
