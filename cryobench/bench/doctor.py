"""What this machine has: device, threads, versions, optional peers, disk; what would fail and how to mend it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from cryobench import __version__
from cryobench.paths import cache_dir, project_root

#: optional programs and packages: what is not possible without them
OPTIONAL = {
    "relion_reconstruct": "reconstruct --engine relion and some tests (Debian: apt install relion)",
    "chromium": "the test of the built book in a browser (Debian: apt install chromium)",
}
OPTIONAL_PACKAGES = {
    "jupyter_book": "the book: pip install 'jupyter-book<2'",
    "jupyterlab": "make lab: pip install jupyterlab",
    "bm3d": "the cross-check of BM3D (non-commercial licence): pip install bm3d",
}
FREE_GB = 5


def examine() -> list[dict[str, Any]]:
    """One row per thing looked at: what, state (ok, absent, missing) and a remark."""
    rows = [
        _row("cryobench", "ok", f"{__version__} in {project_root()}"),
        _row("python", "ok" if sys.version_info >= (3, 11) else "missing", platform.python_version()),
        *_requirements(),
        _device(),
        _row(
            "threads", "ok", f"{os.cpu_count()} cores, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'not set')}"
        ),
        _writable("cache", cache_dir()),
        _writable("working folder", Path.cwd()),
    ]
    for name, use in OPTIONAL.items():
        rows.append(_row(name, "ok" if shutil.which(name) else "absent", use))
    for name, use in OPTIONAL_PACKAGES.items():
        rows.append(_row(name, "ok" if importlib.util.find_spec(name) else "absent", use))
    return rows


def _row(what: str, state: str, remark: str) -> dict[str, Any]:
    return {"what": what, "state": state, "remark": remark}


def _requirements() -> list[dict[str, Any]]:
    rows = []
    try:
        lines = [line for line in requires("cryobench") or [] if "extra ==" not in line]
    except PackageNotFoundError:  # a copy of the repository that is not installed
        lines = tomllib.loads((project_root() / "pyproject.toml").read_text())["project"]["dependencies"]
    for line in lines:
        name = "".join(c if c.isalnum() or c in "-_." else " " for c in line).split()[0]
        try:
            rows.append(_row(name, "ok", version(name)))
        except PackageNotFoundError:
            rows.append(_row(name, "missing", f"pip install '{line}'"))
    return rows


def _device() -> dict[str, Any]:
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return _row(
            "device", "ok", f"{torch.cuda.get_device_name()}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
        )
    if shutil.which("nvidia-smi"):
        return _row(
            "device", "absent", "an NVIDIA GPU is here but torch cannot use it: install the CUDA build of torch"
        )
    return _row("device", "ok", "CPU (no GPU seen by torch)")


def _writable(what: str, folder: Path) -> dict[str, Any]:
    there = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(there).free / 2**30
    if not os.access(there, os.W_OK):
        return _row(what, "missing", f"{there} cannot be written to: set CRYOBENCH_CACHE or change folder")
    state = "ok" if free > FREE_GB else "missing"
    return _row(what, state, f"{folder}, {free:.0f} GiB free" + ("" if state == "ok" else f"; {FREE_GB} are needed"))
