# RetinaNet R-50 taught by RetinaNet X-101 with PKD: weight 10 (one-stage), the first four levels.
_base_ = "mmdet::retinanet/retinanet_r50_fpn_2x_coco.py"
custom_imports = dict(imports=["kdops.integrations.mmdet"])

teacher_checkpoint = (
    "https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_x101_64x4d_fpn_1x_coco/"
    "retinanet_x101_64x4d_fpn_1x_coco_20200130-366f5af1.pth"
)

model = dict(
    _delete_=True,
    type="KDOpsDistilledDetector",
    student=_base_.model,
    teacher="mmdet::retinanet/retinanet_x101-64x4d_fpn_1x_coco.py",
    teacher_checkpoint=teacher_checkpoint,
    taps=[
        dict(student=f"neck[{level}]", loss=dict(type="kdops.PKDLoss", loss_weight=10.0), name=f"pkd_p{level + 3}")
        for level in range(4)
    ],
)

custom_hooks = [dict(type="KDOpsDistillHook"), dict(type="KDOpsStudentCheckpointHook")]
