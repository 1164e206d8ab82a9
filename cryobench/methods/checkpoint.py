"""Checkpoints that survive being killed at any moment: the file is the old one or the new one, never half of it."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from cryobench.errors import BadFileError


def write_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values, atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())  # or a power cut could leave the new name on an empty file
    partial.replace(path)


def read_checkpoint(path: str | Path, key: str, device: torch.device) -> dict[str, Any] | None:
    """The state written with ``state["key"] == key``, or None where there is no file; BadFileError for any other."""
    if not Path(path).exists():
        return None
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        found = state["key"]
    except (RuntimeError, OSError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise BadFileError(f"{path}: not a checkpoint that can be read; delete it to start over") from error
    if found != key:
        raise BadFileError(f"{path}: checkpoint of a fit with other settings; delete it to start over")
    return state
