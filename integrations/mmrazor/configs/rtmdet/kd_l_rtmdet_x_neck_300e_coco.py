# MMYOLO's recipe of RTMDet-l taught by RTMDet-x, on kdops: same values, no normalised maps in memory.
_base_ = "mmyolo::rtmdet/distillation/kd_l_rtmdet_x_neck_300e_coco.py"
custom_imports = dict(imports=["kdops.integrations.mmrazor"])

model = dict(distiller=dict(type="KDOpsDistiller"))
# mmengine hands the scope of an "mmyolo::" base on to the collate function, which takes none.
train_dataloader = dict(collate_fn=dict(_delete_=True, type="yolov5_collate"))

custom_hooks = [
    *_base_.custom_hooks[:-1],  # all but MMRazor's StopDistillHook
    dict(type="mmrazor.KDOpsStopDistillHook", stop_epoch=280),
    dict(type="mmrazor.KDOpsTeacherEvalHook"),
    dict(type="KDOpsStudentCheckpointHook"),
]
find_unused_parameters = False
