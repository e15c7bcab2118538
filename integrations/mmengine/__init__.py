"""What the MMRazor and the MMDetection integrations share: parts of mmengine's runner that distillation touches."""
from .stop import StopHook

__all__ = ["StopHook"]
