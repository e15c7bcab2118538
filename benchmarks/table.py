"""Rows of a results file: their columns, what stamps them, reading and writing."""

from __future__ import annotations

import csv
import importlib.metadata
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

import kdops

COLUMNS = (
    "op", "options", "provider", "mode", "shape", "dtype", "layout",
    "p20_us", "p50_us", "p80_us", "peak_bytes", "value_error", "gradient_error",
    "device", "torch", "triton", "kdops", "date", "commit",
)  # fmt: skip
Row = dict[str, str]
RESULTS = Path(__file__).parent / "results"


def stamp(device: str) -> Row:
    """What every row of a run says about the machine, the versions and the time."""
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "kdops": kdops.__version__,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
    }


def device_name(device: str) -> str:
    """The GPU, or the processor with its threads and instruction set."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU {_processor()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def write(path: Path, rows: list[Row]) -> None:
    """Write all rows to a temporary file beside ``path``, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".csv.part")
    with open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)


def read(path: Path) -> list[Row]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()


def _commit() -> str:
    """The short commit, with ``+`` where tracked files differ from it; empty outside a repository."""
    here = Path(__file__).parent

    def git(*args: str) -> str:
        command = ["git", "-C", str(here), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "..", ":(exclude)results")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""
