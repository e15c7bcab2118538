# RetinaNet R-50 taught by RetinaNet R-101 with MGD; neck and head start from the teacher's.
_base_ = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"
custom_imports = dict(imports=["kdops.integrations.mmdet"])

teacher_checkpoint = (
    "https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_r101_fpn_2x_coco/"
    "retinanet_r101_fpn_2x_coco_20200131-5560aee8.pth"
)

student = _base_.model
student.neck.init_cfg = dict(type="Pretrained", prefix="neck.", checkpoint=teacher_checkpoint)
student.bbox_head.init_cfg = dict(type="Pretrained", prefix="bbox_head.", checkpoint=teacher_checkpoint)

model = dict(
    _delete_=True,
    type="KDOpsDistilledDetector",
    student=student,
    teacher="mmdet::retinanet/retinanet_r101_fpn_2x_coco.py",
    teacher_checkpoint=teacher_checkpoint,
    taps=[
        dict(
            student=f"neck[{level}]",
            loss=dict(
                type="kdops.MGDLoss", student_channels=256, teacher_channels=256, alpha_mgd=2e-5, lambda_mgd=0.65
            ),
            name=f"mgd_p{level + 3}",
        )
        for level in range(5)
    ],
)

optim_wrapper = dict(clip_grad=dict(max_norm=35, norm_type=2))
custom_hooks = [dict(type="KDOpsDistillHook"), dict(type="KDOpsStudentCheckpointHook")]
