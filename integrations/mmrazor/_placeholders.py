"""Makes MMRazor importable on a PyTorch that lacks the quantization names it imports.

MMRazor 1.0.0 imports its quantization packages together with everything else, and those use names that PyTorch
has removed. Distillation needs none of them.
"""
from __future__ import annotations

import importlib
import logging
import sys
import types
from typing import Any, NoReturn

from mmengine.logging import print_log

# What each package exports: `from package import *` takes these names.
EXPORTS = {
    "mmrazor.structures.quantization": (
        "BackendConfigs", "QConfigHandler", "QSchemeHandler",
        "get_native_backend_config", "get_native_backend_config_dict",
        "get_academic_backend_config", "get_academic_backend_config_dict",
        "get_openvino_backend_config", "get_openvino_backend_config_dict",
        "get_tensorrt_backend_config", "get_tensorrt_backend_config_dict",
    ),
    "mmrazor.models.quantizers": (
        "BaseQuantizer", "AcademicQuantizer", "TorchNativeQuantizer", "TensorRTQuantizer", "OpenVINOQuantizer",
    ),
    "mmrazor.models.fake_quants": (
        "BaseFakeQuantize", "LearnableFakeQuantize", "register_torch_fake_quants",
        "enable_val", "enable_param_learning", "enable_static_estimate",
    ),
    "mmrazor.models.observers": (
        "BaseObserver", "LSQObserver", "LSQPerChannelObserver", "register_torch_observers",
    ),
}
# MMRazor's loops call these when they are imported, for the names of what was registered.
CALLED_ON_IMPORT = ("register_torch_fake_quants", "register_torch_observers")
# Names that a config may use as `type=`.
REGISTERED = (
    "AcademicQuantizer", "TorchNativeQuantizer", "TensorRTQuantizer", "OpenVINOQuantizer",
    "LearnableFakeQuantize", "LSQObserver", "LSQPerChannelObserver",
)


def import_mmrazor() -> bool:
    """Import mmrazor.models and mmrazor.engine, with placeholders for quantization if only that fails.

    Returns:
        True if placeholders were needed, False if MMRazor imported as it is.

    Raises:
        ImportError, AttributeError: MMRazor's own, when its import fails anywhere else.
    """
    try:
        importlib.import_module("mmrazor.models")
    except (ImportError, AttributeError) as error:
        # AttributeError: a dropped name is often reached as torch.ao.quantization.<name>.
        if not _raised_in_quantization(error):
            raise
        reason = f"{type(error).__name__}: {error}"
    else:
        importlib.import_module("mmrazor.engine")
        return False
    for package in EXPORTS:
        sys.modules[package] = _placeholder_module(package, reason)
    importlib.import_module("mmrazor.models")
    importlib.import_module("mmrazor.engine")
    _register_placeholders()
    print_log(
        "kdops: MMRazor's quantization packages do not import on this PyTorch "
        f"({reason}); they are replaced by placeholders that raise on use. Distillation is not affected.",
        logger="current", level=logging.WARNING)
    return True


def _raised_in_quantization(error: BaseException) -> bool:
    traceback = error.__traceback__
    while traceback is not None:
        module = traceback.tb_frame.f_globals.get("__name__", "")
        if any(module == package or module.startswith(package + ".") for package in EXPORTS):
            return True
        traceback = traceback.tb_next
    return False


class _RaisesOnUse(type):
    """Metaclass of the placeholders: calling one, or reading an attribute of it, raises."""

    def __call__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse(cls)

    def __getattr__(cls, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        _refuse(cls)

    def __getitem__(cls, key: Any) -> NoReturn:
        _refuse(cls)


def _refuse(placeholder: type) -> NoReturn:
    raise RuntimeError(
        f"{placeholder.__module__}.{placeholder.__qualname__} is a placeholder: MMRazor's quantization does not import "
        f"on this PyTorch ({placeholder.__doc__}). Use the PyTorch release that MMRazor was made for to quantize."
    )


def _placeholder_module(package: str, reason: str) -> types.ModuleType:
    module = types.ModuleType(package, f"Placeholder for {package}.")
    module.__path__ = []
    module.__all__ = list(EXPORTS[package])
    for name in EXPORTS[package]:
        placeholder = _RaisesOnUse(name, (), {"__module__": package, "__doc__": reason})
        setattr(module, name, _registers_nothing if name in CALLED_ON_IMPORT else placeholder)
    return module


def _registers_nothing() -> list[str]:
    return []


def _register_placeholders() -> None:
    from mmrazor.registry import MODELS

    for name in REGISTERED:
        package = next(package for package, names in EXPORTS.items() if name in names)
        MODELS.register_module(name=name, module=getattr(sys.modules[package], name), force=True)
