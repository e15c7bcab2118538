# MTPD: Mask R-CNN R-50 taught by Cascade Mask R-CNN R-50-DCN, then X-101-DCN.
# Each stage is a full 1x schedule, which KDOpsDistillHook restarts.
_base_ = "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"
custom_imports = dict(imports=["kdops.integrations.mmdet"])

teacher_checkpoints = [
    (
        "https://download.openmmlab.com/mmdetection/v2.0/dcn/cascade_mask_rcnn_r50_fpn_dconv_c3-c5_1x_coco/"
        "cascade_mask_rcnn_r50_fpn_dconv_c3-c5_1x_coco_20200202-42e767a2.pth"
    ),
    (
        "https://download.openmmlab.com/mmdetection/v2.0/dcn/cascade_mask_rcnn_x101_32x4d_fpn_dconv_c3-c5_1x_coco/"
        "cascade_mask_rcnn_x101_32x4d_fpn_dconv_c3-c5_1x_coco-e75f90c8.pth"
    ),
]

student = _base_.model

taps = [
    dict(
        student=f"neck[{level}]",
        loss=dict(type="kdops.MGDLoss", student_channels=256, teacher_channels=256, alpha_mgd=5e-7, lambda_mgd=0.45),
        name=f"mgd_p{level + 2}",
    )
    for level in range(4)
]

model = dict(
    _delete_=True,
    type="KDOpsDistilledDetector",
    student=student,
    stages=[
        dict(
            teacher="mmdet::dcn/cascade-mask-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py",
            teacher_checkpoint=teacher_checkpoints[0],
            taps=taps,
            epochs=12,
        ),
        dict(
            teacher="mmdet::dcn/cascade-mask-rcnn_x101-32x4d-dconv-c3-c5_fpn_1x_coco.py",
            teacher_checkpoint=teacher_checkpoints[1],
            taps=taps,
            epochs=12,
        ),
    ],
)

train_cfg = dict(max_epochs=24)
optim_wrapper = dict(clip_grad=dict(max_norm=35, norm_type=2))
custom_hooks = [dict(type="KDOpsDistillHook"), dict(type="KDOpsStudentCheckpointHook")]
