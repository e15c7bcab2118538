# RTMDet-l taught by RTMDet-x: 280 epochs with distillation on strong mosaic, 20 without either.
_base_ = "mmdet::rtmdet/rtmdet_l_8xb32-300e_coco.py"
custom_imports = dict(imports=["kdops.integrations.mmdet"])

teacher_checkpoint = (
    "https://download.openmmlab.com/mmdetection/v3.0/rtmdet/rtmdet_x_8xb32-300e_coco/"
    "rtmdet_x_8xb32-300e_coco_20220715_230555-cc79b9ae.pth"
)

model = dict(
    _delete_=True,
    type="KDOpsDistilledDetector",
    student=_base_.model,
    teacher="mmdet::rtmdet/rtmdet_x_8xb32-300e_coco.py",
    teacher_checkpoint=teacher_checkpoint,
    taps=[
        dict(
            student=f"neck.out_convs.{level}.conv",
            loss=dict(type="kdops.CWDLoss", norm="batch"),
            align=(256, 320),
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
