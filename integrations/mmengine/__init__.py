"""What the MMRazor and the MMDetection integrations share: the parts of mmengine's runner that distillation touches."""
from .checkpoints import KDOpsStudentCheckpointHook
from .stop import StopHook

__all__ = ["KDOpsStudentCheckpointHook", "StopHook"]
