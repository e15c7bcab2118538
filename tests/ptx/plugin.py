"""pytest's --ptx: the tests of kernels again, their kernels run as PTX."""

from __future__ import annotations

from typing import Any

import pytest

from . import mode


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kernels run as PTX")
    group.addoption("--ptx", type=int, metavar="ARCHITECTURE", help="run only tests of kernels, as PTX for 80, 90, 100")
    group.addoption("--ptx-seed", type=int, default=0, help="warps and lanes in a random order; 0: in order")
    group.addoption("--ptx-quantum", type=int, default=0, help="most instructions between two switches of warps")
    group.addoption("--ptx-perturb", action="store_true", help="approximate instructions off within their bounds")
    group.addoption("--ptx-cases", type=int, default=0, help="most cases of a test function, spread evenly; 0: all")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "kernels: launches kernels, so that --ptx runs it too")
    config.addinivalue_line("markers", "ptx: needs --ptx")
    if config.getoption("ptx"):
        changes = {name: config.getoption(f"ptx_{name}") for name in ("seed", "quantum", "perturb")}
        mode.start(config.getoption("ptx"), changes)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    interpreted = mode.architecture is not None
    kept = [item for item in items if _runs(item, interpreted)]
    kept = _spread(kept, config.getoption("ptx_cases")) if interpreted else kept
    chosen = set(map(id, kept))
    config.hook.pytest_deselected(items=[i for i in items if id(i) not in chosen])
    items[:] = kept


def _runs(item: pytest.Item, interpreted: bool) -> bool:
    needs_ptx = item.get_closest_marker("ptx") is not None
    return needs_ptx or item.get_closest_marker("kernels") is not None if interpreted else not needs_ptx


def _spread(items: list[Any], most: int) -> list[Any]:
    """Of the cases of each test function `most`, from the first to the last; 0: all."""
    functions: dict[Any, list] = {}
    for item in items:
        functions.setdefault((item.path, getattr(item, "originalname", item.name)), []).append(item)
    chosen = []
    for cases in functions.values():
        count = min(most or len(cases), len(cases))
        chosen += [cases[i * (len(cases) - 1) // max(1, count - 1)] for i in range(count)]
    return chosen


def pytest_runtest_setup(item: pytest.Item) -> None:
    mode.forget()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if mode.architecture is not None:
        counts = ", ".join(f"{count:,} {name}" for name, count in mode.totals.items())
        terminalreporter.write_line(f"as PTX for sm_{mode.architecture}: {counts or 'no launches'}")
