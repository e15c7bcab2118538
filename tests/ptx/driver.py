"""A Triton driver that stands in for a GPU: unmodified launches are compiled to PTX and run by the interpreter.

Launches go through Triton's own front door, JITFunction.run: argument binding, specialisation, the comparison of global
values, the limits of the device. Only the last stage of compilation, ptxas, gives way: the PTX is the binary. For
Triton 3.4 to 3.9; what differs between them is met here.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler

from . import mode
from .interpreter import Module, PtxError

#: Bytes of shared memory that a block may have.
_SHARED = {80: 166912, 90: 232448, 100: 232448}
_FORMATS = {
    **{"i1": "B", "u1": "B", "i8": "b", "u8": "B", "i16": "h", "u16": "H", "i32": "i", "u32": "I", "i64": "q"},
    **{"u64": "Q", "fp16": "e", "fp32": "f", "fp64": "d"},
}
#: Triton's own last stage, which `install` takes out.
make_cubin = compiler.CUDABackend.make_cubin


class _Utils:
    """What CompiledKernel asks of a device."""

    def __init__(self, architecture: int) -> None:
        self._architecture = architecture

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
        """Module, function, registers, spills, most threads."""
        loaded = Module(binary.decode())
        unsupported = loaded.entries[name]["unsupported"]
        if unsupported:
            raise PtxError(f"{name} has what the interpreter does not know: {unsupported[:3]}")
        return loaded, (loaded, name), 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, Any]:
        return {"max_shared_mem": _SHARED[self._architecture], "multiprocessor_count": 132, "warpSize": 32}

    def unload_module(self, module: Any) -> None:
        pass


class _Launcher:
    """Called in the place of the C launcher that Triton generates for a kernel's signature."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self._types = [t for t in source.signature.values()]
        self._metadata = metadata
        if getattr(metadata, "global_scratch_size", 0) or getattr(metadata, "num_ctas", 1) > 1:
            raise PtxError(f"{metadata.name}: scratch memory and clusters of Triton are not supported")

    def __call__(self, x: int, y: int, z: int, stream: Any, function: Any, packed: Any, *rest: Any) -> None:
        _, _, _, *arguments = rest  # launch metadata, the hooks before and after
        module, entry = function
        metadata = self._metadata
        parameters = self._parameters(module.entries[entry], arguments)
        cooperative = bool(getattr(metadata, "launch_cooperative_grid", False))
        block = (32 * metadata.num_warps,)
        mode.launch(module, entry, (x, y, z), block, parameters, shared=metadata.shared, cooperative=cooperative)

    def _parameters(self, described: dict[str, Any], arguments: list) -> bytes:
        """The arguments in the entry's layout; what Triton adds at the end (scratch memory) stays 0."""
        out = bytearray(described["parameter_bytes"])
        slots = iter(described["parameters"])
        for kind, value in zip(self._types, arguments):
            if kind == "constexpr":
                continue
            offset, size = next(slots)
            if kind.startswith("*"):
                data = struct.pack("Q", value.data_ptr() if hasattr(value, "data_ptr") else value or 0)
            else:
                data = struct.pack(_FORMATS[kind], value)
            if len(data) > size:
                raise PtxError(f"an argument of type {kind} for a parameter of {size} bytes")
            out[offset : offset + len(data)] = data
        return bytes(out)


class Driver:
    """The device."""

    launcher_cls = _Launcher

    def __init__(self, architecture: int) -> None:
        self._architecture = architecture
        self.utils = _Utils(architecture)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._architecture, 32)

    def get_device_capability(self, device: Any = None) -> tuple[int, int]:
        return divmod(self._architecture, 10)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind

    def is_active(self) -> bool:
        return True


def variants(kernel: Any) -> int:
    """How many forms of a JIT function have been compiled in this process."""
    return len(kernel.device_caches[0][0])


def install(architecture: int) -> None:
    """Every launch of this process from now on."""
    if architecture not in _SHARED:
        raise ValueError(f"architectures that the launch layer knows: {sorted(_SHARED)}, got {architecture}")
    compiler.CUDABackend.make_cubin = lambda self, source, *rest: source.encode()
    triton.runtime.driver.set_active(Driver(architecture))
