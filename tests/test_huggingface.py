"""The Hugging Face Trainer that distils, on a few real steps of RT-DETR, against the plain loop."""

from __future__ import annotations

import copy
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_networks import LAYERS as SMALL_LAYERS
from distill_networks import Detector
from torch import Tensor, nn
from torchvision_import import skip_where_torchvision_is_broken

skip_where_torchvision_is_broken()
pytest.importorskip("transformers", reason="needs transformers: pip install transformers accelerate timm")
pytest.importorskip("accelerate", reason="needs accelerate: pip install accelerate")
if not importlib.import_module("transformers").is_torch_available():
    pytest.skip("this transformers needs a newer PyTorch", allow_module_level=True)
from kdops.integrations.pytorch.huggingface import (  # noqa: E402
    DistillationMixin,
    DistillationTrainer,
    without_labels,
)
from transformers import (  # noqa: E402
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrResNetConfig,
    Trainer,
    TrainingArguments,
)
from transformers.utils.import_utils import check_torch_load_is_safe  # noqa: E402

from kdops import CWDLoss  # noqa: E402
from kdops.distill import Distiller, ProgressiveDistillation, Stage, StopDistillation, Tap, TeacherOptions  # noqa: E402

LAYERS = [f"model.encoder_input_proj.{i}" for i in range(3)]
WIDTHS = (8, 12)


def _loads_checkpoints() -> bool:
    try:
        check_torch_load_is_safe()
    except ValueError:
        return False
    return True


resumes = pytest.mark.skipif(not _loads_checkpoints(), reason="transformers resumes no run with a PyTorch this old")


def _detector(width: int, classes: int = 3) -> RTDetrForObjectDetection:
    """RT-DETR in miniature. Without denoising queries, whose noise is random."""
    backbone = RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 12, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = RTDetrConfig(
        backbone_config=backbone,
        encoder_in_channels=[8, 12, 16],
        encoder_hidden_dim=width,
        encoder_ffn_dim=16,
        encoder_attention_heads=2,
        d_model=width,
        num_queries=8,
        decoder_in_channels=[width] * 3,
        decoder_ffn_dim=16,
        decoder_layers=1,
        decoder_attention_heads=2,
        num_denoising=0,
        num_labels=classes,
    )
    return RTDetrForObjectDetection(config)


def _networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return _detector(WIDTHS[0]), _detector(WIDTHS[1], classes=2)


class Data(torch.utils.data.Dataset):
    """Eight random images with one box each."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        labels = {"class_labels": torch.tensor([2]), "boxes": torch.rand(1, 4, generator=generator) * 0.3 + 0.2}
        return {"pixel_values": torch.rand(3, 64, 64, generator=generator), "labels": labels}


class Collate:
    """Makes batches and remembers them, for the plain loop to go over the same ones."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        images = torch.stack([item["pixel_values"] for item in items])
        batch = {"pixel_values": images, "labels": [item["labels"] for item in items]}
        self.seen.append(copy.deepcopy(batch))
        return batch


class Small(Detector):
    """A module that is no model of transformers. Their Trainer (5.23) does not load RT-DETR's own checkpoints back."""

    def forward(self, pixel_values: Tensor, labels: list[dict[str, Tensor]] | None = None) -> dict[str, Tensor]:
        if labels is None:
            return {"logits": super().forward(pixel_values)}
        return {"loss": super().forward(pixel_values, torch.cat([entry["boxes"] for entry in labels]))["loss_box"]}


def _small_networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return Small(WIDTHS[0]), Small(WIDTHS[1], drop=True)


def _distiller(student: nn.Module, teacher: nn.Module, **options: Any) -> Distiller:
    torch.manual_seed(7)
    layers = SMALL_LAYERS if isinstance(student, Small) else LAYERS
    taps = [Tap(layer, loss=CWDLoss(norm="batch"), align=WIDTHS) for layer in layers]
    return Distiller(student, teacher, taps, run_teacher=without_labels, **options)


def _trainer(
    student: nn.Module,
    distiller: Any,
    folder: Path,
    kind: type = DistillationTrainer,
    more: Any = None,
    **settings: Any,
) -> Trainer:
    settings = {
        "use_cpu": True,
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        "learning_rate": 0.01,
        "lr_scheduler_type": "linear",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        **settings,
    }
    arguments = TrainingArguments(output_dir=str(folder), **settings)
    return kind(student, arguments, train_dataset=Data(), data_collator=Collate(), distiller=distiller, **(more or {}))


def _plain_loop(
    student: nn.Module, distiller: Distiller, batches: list[dict[str, Any]], accumulate: int, loss_of: Any
) -> list[float]:
    """What the Trainer must amount to; returns the sums of the terms, batch by batch."""
    student.train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    distiller.bind(optimizer)
    steps = len(batches) // accumulate
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    totals = []
    for number, batch in enumerate(batches):
        if number % 4 == 0:
            distiller.set_epoch(number // 4)
        loss = loss_of(student, batch)
        added = distiller.loss()
        totals.append(added.total.item())
        ((loss + added) / accumulate).backward()
        if (number + 1) % accumulate == 0:
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            distiller.step()
    return totals


def _state(*modules: nn.Module) -> list[Tensor]:
    return [value.clone() for module in modules for value in module.state_dict().values()]


def _assert_same(left: list[Tensor], right: list[Tensor], **tolerance: float) -> None:
    assert len(left) == len(right) > 0
    for a, b in zip(left, right):
        torch.testing.assert_close(a, b, **(tolerance or {"rtol": 0, "atol": 0}))


def _own_loss(student: nn.Module, batch: dict[str, Any]) -> Tensor:
    return student(**batch).loss


def _loss_of_logits(student: nn.Module, batch: dict[str, Any]) -> Tensor:
    return student(pixel_values=batch["pixel_values"]).logits.square().mean()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("function", [False, True])
def test_a_run_equals_the_plain_loop(function, accumulate, tmp_path):
    student, teacher = _networks()
    twin, before = copy.deepcopy(student), _state(teacher)
    reference = _distiller(twin, copy.deepcopy(teacher), stop=StopDistillation(step=6 // accumulate))
    start = _state(reference.taps)
    distiller = _distiller(student, teacher, stop=StopDistillation(step=6 // accumulate))
    # A loss function of the user's is asked to return its share of all accumulated batches.
    more = {"compute_loss_func": lambda out, labels, num_items_in_batch: out.logits.square().mean() / accumulate}
    trainer = _trainer(
        student, distiller, tmp_path, more=more if function else None, gradient_accumulation_steps=accumulate
    )
    trainer.train()
    loss_of = _loss_of_logits if function else _own_loss
    totals = _plain_loop(twin, reference, trainer.data_collator.seen, accumulate, loss_of)
    _assert_same(_state(student, distiller), _state(twin, reference), rtol=1e-5, atol=1e-6)
    assert distiller.stopped and distiller.teacher is None
    assert distiller.progress == (8 // accumulate, 1)
    assert not any(torch.equal(a, b) for a, b in zip(start, _state(distiller.taps))), (
        "the align layers were not trained"
    )
    _assert_same(_state(teacher), before)
    name = "distill/" + "+".join(LAYERS)
    logged = [entry[name] for entry in trainer.state.log_history if name in entry]
    means = torch.tensor(totals).view(-1, accumulate).mean(1).tolist()
    assert logged == pytest.approx(means[: 6 // accumulate], rel=1e-4)
    assert totals[6:] == [0.0, 0.0]


def test_checkpoint_holds_the_student_and_no_teacher(tmp_path):
    student, teacher = _networks()
    distiller = _distiller(student, teacher)
    _trainer(student, distiller, tmp_path, save_strategy="epoch", num_train_epochs=1, optim="adamw_torch").train()
    folder = tmp_path / "checkpoint-4"
    loaded, report = RTDetrForObjectDetection.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    _assert_same(_state(loaded), _state(student))
    state = torch.load(folder / "distiller.pt", weights_only=True)
    assert list(state) == ["_extra_state", *(f"taps.align.{i}.weight" for i in range(3))]
    optimizer = torch.load(folder / "optimizer.pt", weights_only=True)
    count = sum(p.requires_grad for p in student.parameters()) + 3
    assert len(optimizer["state"]) == count, "the align layers must be in the optimizer"


def _made(kind: str, student: nn.Module, teacher: nn.Module) -> Any:
    if kind == "progressive":
        torch.manual_seed(7)
        taps = [Tap(SMALL_LAYERS[0], loss=CWDLoss(), align=WIDTHS)]
        stages = [Stage(copy.deepcopy(teacher), taps, steps=3), Stage(lambda: copy.deepcopy(teacher), taps)]
        return ProgressiveDistillation(student, stages, run_teacher=without_labels)
    return _distiller(student, teacher, stop=StopDistillation(**{kind: 1 if kind == "epoch" else 7}))


@resumes
@pytest.mark.parametrize("kind", ["epoch", "step", "progressive"])
def test_a_resumed_run_equals_one_without_a_break(kind, tmp_path):
    student, teacher = _small_networks()
    resumed = copy.deepcopy(student)
    whole = _made(kind, student, teacher)
    _trainer(student, whole, tmp_path, save_strategy="steps", save_steps=6, max_steps=8, optim="adamw_torch").train()
    again = _made(kind, resumed, copy.deepcopy(teacher))
    trainer = _trainer(resumed, again, tmp_path, save_strategy="steps", save_steps=6, max_steps=8, optim="adamw_torch")
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    _assert_same(_state(resumed, again), _state(student, whole))
    assert again.progress == whole.progress == (8, 1)
    assert again.stopped == whole.stopped == (kind != "progressive")


@resumes
def test_last_checkpoint_is_found_and_one_without_distillation_is_refused(tmp_path):
    student, teacher = _small_networks()
    first = _distiller(student, teacher)
    _trainer(student, first, tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    distiller = _distiller(student, teacher)
    trainer = _trainer(student, distiller, tmp_path, max_steps=3)
    trainer.train(resume_from_checkpoint=True)
    assert distiller.progress[0] == 3
    (tmp_path / "checkpoint-2" / "distiller.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold distiller\.pt, got none in .*checkpoint-2"):
        _trainer(student, _distiller(student, teacher), tmp_path, max_steps=3).train(resume_from_checkpoint=True)


def test_teacher_and_align_layers_follow_mixed_precision(tmp_path):
    student, teacher = _networks()
    seen: list[torch.dtype] = []
    for layer in LAYERS:
        teacher.get_submodule(layer)[0].register_forward_hook(lambda _m, _args, out: seen.append(out.dtype))
    distiller = _distiller(student, teacher)
    trainer = _trainer(student, distiller, tmp_path, bf16=True, max_steps=2)
    trainer.train()
    assert set(seen) == {torch.bfloat16} and len(seen) == 2 * len(LAYERS)
    assert all(p.dtype == torch.float32 for p in (*student.parameters(), *distiller.parameters()))
    assert trainer.state.log_history[0]["distill/" + "+".join(LAYERS)] > 0


@pytest.mark.parametrize("settings", [{}, {"bf16": True}])
def test_prepared_teacher_gives_the_losses_of_the_given_one(settings, tmp_path):
    logs = {}
    for options in (None, TeacherOptions(compile=False)):
        student, teacher = _networks()
        distiller = _distiller(student, teacher, teacher_options=options)
        trainer = _trainer(student, distiller, tmp_path / str(options is None), max_steps=3, **settings)
        trainer.train()
        name = "distill/" + "+".join(LAYERS)
        logs[options] = [entry[name] for entry in trainer.state.log_history if name in entry]
        assert (distiller.teacher is teacher) == (options is None)
    plain, prepared = logs.values()
    assert len(plain) == 3 and prepared == pytest.approx(plain, rel=1e-2 if settings else 1e-5)
    assert distiller.teacher_report.differences


def test_evaluation_and_a_users_own_trainer(tmp_path):
    class Mine(Trainer):
        def compute_loss(
            self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
        ) -> Any:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            return (loss * 0, outputs) if return_outputs else loss * 0

    class Distilled(DistillationMixin, Mine):
        pass

    student, teacher = _networks()
    distiller = _distiller(student, teacher)
    more = {"eval_dataset": Data()}
    trainer = _trainer(
        student,
        distiller,
        tmp_path,
        Distilled,
        more,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        prediction_loss_only=True,
    )
    trainer.train()
    history = trainer.state.log_history
    name = "distill/" + "+".join(LAYERS)
    trained = [entry for entry in history if "loss" in entry]
    assert len(trained) == 3
    for entry in trained:
        assert entry["loss"] == pytest.approx(entry[name], abs=2e-4), "the user's own loss is 0 here"
    assert [entry["eval_loss"] for entry in history if "eval_loss" in entry] == [0.0] * 3


def test_misuse_is_refused_in_words(tmp_path):
    student, teacher = _networks()
    with pytest.raises(
        TypeError, match="DistillationTrainer: distiller must be a Distiller.*got RTDetrForObjectDetection"
    ):
        _trainer(student, teacher, tmp_path)
    other = _trainer(_detector(8), _distiller(student, teacher), tmp_path)
    with pytest.raises(ValueError, match="student must be the Trainer's model or a part of it, got a RTDetrFor"):
        other.train()
    trainer = _trainer(student, _distiller(student, teacher), tmp_path)
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match="must not be replicated by DataParallel, got 2 GPUs"):
        trainer.train()


def test_state_of_the_trainer_is_plain(tmp_path):
    student, teacher = _small_networks()
    _trainer(student, _distiller(student, teacher), tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    history = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert all(isinstance(value, (int, float)) for entry in history for value in entry.values())
    assert sum(any(key.startswith("distill/") for key in entry) for entry in history) == 2
