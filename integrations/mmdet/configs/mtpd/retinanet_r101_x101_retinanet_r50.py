# MTPD: RetinaNet R-50 taught by RetinaNet R-101, then X-101.
# Each stage is a full 1x schedule, which KDOpsDistillHook restarts.
_base_ = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"
custom_imports = dict(imports=["kdops.integrations.mmdet"])

teacher_checkpoints = [
    (
        "https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_r101_fpn_2x_coco/"
        "retinanet_r101_fpn_2x_coco_20200131-5560aee8.pth"
    ),
    (
        "https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_x101_64x4d_fpn_1x_coco/"
        "retinanet_x101_64x4d_fpn_1x_coco_20200130-366f5af1.pth"
    ),
]

student = _base_.model
student.neck.init_cfg = dict(type="Pretrained", prefix="neck.", checkpoint=teacher_checkpoints[0])
student.bbox_head.init_cfg = dict(type="Pretrained", prefix="bbox_head.", checkpoint=teacher_checkpoints[0])

taps = [
    dict(
        student=f"neck[{level}]",
        loss=dict(type="kdops.MGDLoss", student_channels=256, teacher_channels=256, alpha_mgd=2e-5, lambda_mgd=0.65),
        name=f"mgd_p{level + 3}",
    )
    for level in range(5)
]

model = dict(
    _delete_=True,
    type="KDOpsDistilledDetector",
    student=student,
    stages=[
        dict(
            teacher="mmdet::retinanet/retinanet_r101_fpn_2x_coco.py",
            teacher_checkpoint=teacher_checkpoints[0],
            taps=taps,
            epochs=12,
        ),
        dict(
            teacher="mmdet::retinanet/retinanet_x101-64x4d_fpn_1x_coco.py",
            teacher_checkpoint=teacher_checkpoints[1],
            taps=taps,
            epochs=12,
        ),
    ],
)

train_cfg = dict(max_epochs=24)
optim_wrapper = dict(clip_grad=dict(max_norm=35, norm_type=2))
custom_hooks = [dict(type="KDOpsDistillHook"), dict(type="KDOpsStudentCheckpointHook")]
