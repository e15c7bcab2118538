"""Whether this process runs kernels as PTX (pytest's --ptx), with which options, and what its launches gave."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

from . import build, memory
from .interpreter import Module, Options, Result, checked

#: 80, 90 or 100 where kernels run as PTX.
architecture: int | None = None
options = Options(poisoned=True)
#: Of the launches since the test began, and the launches themselves.
results: list[Result] = []
launches: list[tuple[Module, str, tuple, tuple, bytes, dict[str, Any]]] = []
totals: Counter = Counter()


def start(target: int, changes: dict[str, Any]) -> None:
    """Every launch of this process is interpreted from now on; before anything imports triton."""
    global architecture
    architecture = target
    for name, value in changes.items():
        setattr(options, name, value)
    memory.install()
    # A cache of its own: here the compiler's last stage leaves PTX where others expect machine code.
    os.environ["TRITON_CACHE_DIR"] = str(build.cache_folder() / "triton")
    try:
        import triton  # noqa: F401
    except ImportError:
        return
    from . import driver

    driver.install(target)


def launch(module: Module, entry: str, grid: tuple, block: tuple, parameters: bytes, **where: Any) -> Result:
    """Run an entry on all of PyTorch's memory; raises what is found."""
    launches.append((module, entry, grid, block, parameters, where))
    result = module.launch(entry, grid, block, parameters, memory.allocations(), options=options, **where)
    results.append(result)
    totals["launches"] += 1
    totals["instructions"] += result.steps
    return checked(result)


def forget() -> None:
    """A test begins."""
    results.clear()
    launches.clear()


def replay() -> None:
    """The launches since the test began once more: same kernels, same arguments, whatever the memory holds now."""
    for module, entry, grid, block, parameters, where in list(launches):
        launch(module, entry, grid, block, parameters, **where)
