"""kdops in MMRazor: `custom_imports = dict(imports=["kdops.integrations.mmrazor"])`.

Registers the kdops losses, connector, distiller and hooks in MMRazor's registries. Nothing of MMRazor's own is
replaced unless `take_over` is called or `kdops.integrations.mmrazor.stock_names` is imported.
"""
from ._placeholders import import_mmrazor

# First: everything below needs MMRazor, which may need placeholders to import.
import_mmrazor()

from kdops.integrations.mmengine import KDOpsStudentCheckpointHook  # noqa: E402

from .fuse import FuseReport, KDOpsDistiller, fuse  # noqa: E402
from .fuse_hook import KDOpsFuseHook  # noqa: E402
from .hooks import KDOpsStopDistillHook, KDOpsTeacherEvalHook  # noqa: E402
from .losses import KDOpsChannelWiseDivergence, KDOpsMGDConnector, KDOpsMGDLoss, KDOpsPKDLoss  # noqa: E402
from .takeover import give_back, take_over  # noqa: E402

__all__ = [
    "FuseReport",
    "KDOpsChannelWiseDivergence",
    "KDOpsDistiller",
    "KDOpsFuseHook",
    "KDOpsMGDConnector",
    "KDOpsMGDLoss",
    "KDOpsPKDLoss",
    "KDOpsStopDistillHook",
    "KDOpsStudentCheckpointHook",
    "KDOpsTeacherEvalHook",
    "fuse",
    "give_back",
    "take_over",
]
