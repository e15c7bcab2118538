"""kdops in MMDetection 3.x, without MMRazor: `custom_imports = dict(imports=["kdops.integrations.mmdet"])`."""
from kdops.integrations.mmengine import KDOpsStudentCheckpointHook

from .detector import KDOpsDistilledDetector, load_teacher
from .hooks import KDOpsDistillHook, KDOpsStopHook

__all__ = [
    "KDOpsDistillHook",
    "KDOpsDistilledDetector",
    "KDOpsStopHook",
    "KDOpsStudentCheckpointHook",
    "load_teacher",
]
