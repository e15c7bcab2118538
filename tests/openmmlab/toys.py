"""A small student and teacher under MMRazor's algorithm and mmengine's Runner, for tests of hooks."""
from __future__ import annotations

import torch
from mmengine.config import ConfigDict
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS
from mmengine.runner import Runner
from torch import nn


@MODELS.register_module()
class ToyDetector(BaseModel):
    """Two convolutions and a head; counts its forwards."""

    def __init__(self, width: int, drop: float = 0.0):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.Dropout(drop))
        self.neck = nn.Conv2d(width, width, 1)
        self.head = nn.Conv2d(width, 1, 1)
        self.calls = 0

    def extract_feat(self, inputs):
        self.calls += 1
        return self.neck(self.backbone(inputs))

    def forward(self, inputs, data_samples=None, mode="tensor"):
        out = self.head(self.extract_feat(inputs))
        if mode == "loss":
            return dict(loss_task=(out - data_samples.view(-1, 1, 1, 1)).square().mean())
        return list(out) if mode == "predict" else out


@MODELS.register_module()
class NoisyDetector(ToyDetector):
    """Draws what MMRazor's deliveries can hand from one detector to another."""

    def draw(self):
        self.drawn = float(torch.rand(()))
        return self.drawn

    def extract_feat(self, inputs):
        self.used = self.draw()
        return super().extract_feat(inputs) + self.used


@DATASETS.register_module()
class ToyDataset(torch.utils.data.Dataset):
    metainfo = dict(classes=("thing",))

    def __len__(self):
        return 8

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return dict(inputs=torch.rand(3, 8, 8, generator=generator), data_samples=torch.tensor(float(index % 3)))


@METRICS.register_module()
class ToyMetric(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.extend(float(sample.mean()) for sample in data_samples)

    def compute_metrics(self, results):
        return dict(mean=sum(results) / len(results))


LOADER = dict(
    dataset=dict(type="ToyDataset"), sampler=dict(type="DefaultSampler", shuffle=False), batch_size=4, num_workers=0,
    collate_fn=dict(type="default_collate"))

# For comparisons: Adam divides by small gradients, and so magnifies a rounding.
SGD = dict(optimizer=dict(type="SGD", lr=0.1))


def algorithm(**overrides):
    """MMRazor's SingleTeacherDistill of the toys, with RTMDet's pattern of connectors and loss."""
    norm = dict(type="BN", affine=False, track_running_stats=False)
    record = dict(feat=dict(type="ModuleOutputs", source="neck"))
    return dict(
        type="mmrazor.FpnTeacherDistill",
        _scope_="mmrazor",
        architecture=dict(type="mmengine.ToyDetector", width=4),
        teacher=dict(type="mmengine.ToyDetector", width=6, drop=0.5),
        distiller=dict(
            type="ConfigurableDistiller",
            student_recorders=record,
            teacher_recorders=record,
            connectors=dict(
                feat_s=dict(type="ConvModuleConnector", in_channel=4, out_channel=6, bias=False, norm_cfg=norm,
                            act_cfg=None),
                feat_t=dict(type="NormConnector", in_channels=6, norm_cfg=norm)),
            distill_losses=dict(loss_feat=dict(type="ChannelWiseDivergence")),
            loss_forward_mappings=dict(loss_feat=dict(
                preds_S=dict(from_student=True, recorder="feat", connector="feat_s"),
                preds_T=dict(from_student=False, recorder="feat", connector="feat_t")))),
        **overrides)


def taps(width=6, **options):
    loss = dict(type="kdops.CWDLoss", norm="batch")
    return [dict(student="neck", loss=loss, align=(4, width), name="feat", **options)]


def detector(**options):
    """KDOpsDistilledDetector of the toys."""
    if "stages" not in options:
        options = dict(teacher=dict(type="mmengine.ToyDetector", width=6, drop=0.5), taps=taps(), **options)
    return dict(type="mmdet.KDOpsDistilledDetector", student=dict(type="mmengine.ToyDetector", width=4), **options)


def runner(work_dir, hooks, model=None, epochs=4, ema=True, **options) -> Runner:
    """A Runner of mmengine on the toys; 2 iterations an epoch."""
    if ema:
        hooks = [dict(type="EMAHook", ema_type="ExponentialMovingAverage", update_buffers=True, priority=49), *hooks]
    options.setdefault("train_cfg", dict(by_epoch=True, max_epochs=epochs))
    options.setdefault("optim_wrapper", dict(optimizer=dict(type="AdamW", lr=0.01)))
    options.setdefault("log_level", "ERROR")
    model = ConfigDict(model or algorithm())
    options["cfg"] = dict(options.get("cfg", {}), model=model)
    return Runner(
        model=model, work_dir=str(work_dir), train_dataloader=LOADER, custom_hooks=hooks,
        default_hooks=dict(
            logger=dict(type="LoggerHook", interval=1), checkpoint=dict(type="CheckpointHook", interval=1)),
        randomness=dict(seed=0), experiment_name=str(work_dir).replace("/", "_"), **options)
