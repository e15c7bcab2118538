# RTMDet-tiny taught by RTMDet-s: 280 epochs with distillation on strong mosaic, 20 without either.
_base_ = "mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py"
custom_imports = dict(imports=["kdops.integrations.mmdet"])

teacher_checkpoint = (
    "https://download.openmmlab.com/mmdetection/v3.0/rtmdet/rtmdet_s_8xb32-300e_coco/"
    "rtmdet_s_8xb32-300e_coco_20220905_161602-387a891e.pth"
)

model = dict(
    _delete_=True,
    type="KDOpsDistilledDetector",
    student=_base_.model,
    teacher="mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py",
    teacher_checkpoint=teacher_checkpoint,
    taps=[
        dict(
            student=f"neck.out_convs.{level}.conv",
            loss=dict(type="kdops.CWDLoss", norm="batch"),
            align=(96, 128),
            name=f"fpn{level}",
        )
        for level in range(3)
    ],
)

custom_hooks = [
    *_base_.custom_hooks,
    dict(type="KDOpsDistillHook"),
    dict(type="KDOpsStopHook", stop_epoch=_base_.max_epochs - _base_.stage2_num_epochs),
    dict(type="KDOpsStudentCheckpointHook"),
]
