"""Shared by the MMRazor and the MMDetection integrations: hooks for mmengine's Runner."""
from .checkpoints import KDOpsStudentCheckpointHook
from .stop import StopHook

__all__ = ["KDOpsStudentCheckpointHook", "StopHook"]
