"""The kinds of file that the demo writes, each complete or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from kdops.files import write_atomically


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2, sort_keys=False) + "\n")


def save_checkpoint(path: Path, content: dict) -> None:
    write_atomically(path, lambda temporary: torch.save(content, temporary))
