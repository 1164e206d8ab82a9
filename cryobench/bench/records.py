"""A record: one JSON object per run, with the number and its birth certificate."""

from __future__ import annotations

import base64
import json
import os
import platform
import subprocess
import zlib
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import fastjsonschema
import numpy as np

from cryobench import __version__
from cryobench.errors import BadFileError
from cryobench.paths import project_root, shipped_dir

VERSION = 1
#: how many images of a run are kept beside its record
SAMPLES = 6
_STATISTIC = {
    "type": "object",
    "properties": {
        "mean": {"type": ["number", "null"]},
        "std": {"type": ["number", "null"]},
        "n": {"type": "integer"},
        "ci95": {"type": "array", "items": {"type": ["number", "null"]}, "minItems": 2, "maxItems": 2},
    },
    "required": ["mean", "std", "n", "ci95"],
}
_PROVENANCE = (
    "commit dirty package_version key code_hash code data_hash data notebook_hash python torch numpy device "
    "device_class threads utc"
).split()
_OBJECT: dict[str, Any] = {"type": "object"}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "schema": {"const": VERSION},
        "table": {"type": "string"},
        "specimen": {"type": "string"},
        "method": {"type": "string"},
        "seed": {"type": "integer"},
        "profile": {"type": "string"},
        "status": {"enum": ["done", "failed"]},
        "error": {"type": ["string", "null"]},
        "config": _OBJECT,
        "supervision": {"type": "string"},
        "metrics": {"type": "object", "additionalProperties": {"type": "object", "additionalProperties": _STATISTIC}},
        "per_image": _OBJECT,
        "spectral": _OBJECT,
        "invention": _OBJECT,
        "cost": {
            "type": "object",
            "required": ["fit_seconds", "denoise_images_per_s", "peak_memory_mb", "parameters"],
        },
        "fit": _OBJECT,
        "provenance": {"type": "object", "required": _PROVENANCE},
    },
    "required": "schema table specimen method seed profile status error provenance".split(),
    "additionalProperties": False,
    "if": {"properties": {"status": {"const": "done"}}},
    "then": {"required": "config supervision metrics per_image spectral invention cost".split()},
}


@cache
def _validator() -> Callable[[Any], Any]:
    return fastjsonschema.compile(SCHEMA)


def record_path(results: Path, table: str, profile: str, specimen: str, method: str, seed: int) -> Path:
    return results / table / profile / f"{specimen}__{method}__s{seed}.json"


def shipped_records(table: str, profile: str) -> list[Path]:
    """Files of the committed records of a table. The smoke profile has none: it is there to test what runs here."""
    return [] if profile == "smoke" else sorted((shipped_dir() / table / profile).glob("*.json"))


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Validate and write atomically: a killed run leaves the old record or the new one, never half of it."""
    _validator()(record)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        partial.write_text(json.dumps(record, indent=1) + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_samples(path: Path, stacks: dict[str, np.ndarray]) -> None:
    """A few images (n, h, w) of a run, float16, beside its record: RECORD.npz. Written before the record is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.{os.getpid()}.part.npz")
    small: dict[str, Any] = {k: v.astype(np.float16) for k, v in stacks.items()}
    np.savez_compressed(partial, **small)
    partial.replace(path.with_suffix(".npz"))


def read_samples(path: Path) -> dict[str, np.ndarray]:
    """What :func:`write_samples` wrote beside a record; empty where there is nothing."""
    if not path.with_suffix(".npz").exists():
        return {}
    with np.load(path.with_suffix(".npz")) as file:
        return {k: file[k].astype(np.float32) for k in file.files}


def read_record(path: Path) -> dict[str, Any]:
    """Read and validate. Raises BadFileError for anything that is not a record."""
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        _validator()(record)
    except (OSError, ValueError, fastjsonschema.JsonSchemaException) as error:
        raise BadFileError(f"{path}: not a record of this version ({str(error).splitlines()[0]}); delete it") from error
    return record


def pack(values: np.ndarray) -> str:
    """float32 values as compressed base64 text."""
    return base64.b64encode(zlib.compress(np.ascontiguousarray(values, dtype="<f4").tobytes(), 9)).decode()


def unpack(text: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype="<f4")


def result_of(record: dict[str, Any]) -> dict[str, Any]:
    """The part of a record that an identical run reproduces on the same machine: all but times and memory."""
    part = {k: v for k, v in record.items() if k not in ("cost", "fit", "provenance")}
    keep = ("key", "code_hash", "data_hash", "notebook_hash", "data")
    return {**part, "provenance": {k: record["provenance"].get(k) for k in keep}}


@cache
def _git(*arguments: str) -> str | None:
    """What git says of the project; None where there is no git or no repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=project_root(), capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _code() -> dict[str, Any]:
    """Commit, and whether the code differs from it. A copy without git says by $CRYOBENCH_COMMIT what it is of, with
    ``-dirty`` behind it where it is not quite that; so does one in a repository that does not know that commit."""
    named, _, changed = os.environ.get("CRYOBENCH_COMMIT", "").partition("-")
    commit = _git("rev-parse", "HEAD")
    if commit is None or (named and _git("cat-file", "-t", named) != "commit"):
        return {"commit": named or "unknown", "dirty": bool(changed) or not named}
    return {
        "commit": commit,
        "dirty": _git("status", "--porcelain", "--", "cryobench", "notebooks", "tables", "data") != "",
    }


def machine(device: str) -> dict[str, Any]:
    """Where and when a run took place: the part of its provenance that is not its input."""
    import torch

    gpu = device.startswith("cuda")
    return {
        **_code(),
        "package_version": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "device": torch.cuda.get_device_name(device) if gpu else _cpu_name(),
        "device_class": "cuda" if gpu else "cpu",
        "threads": torch.get_num_threads(),
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@cache
def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
