"""Notebooks as programs: parameters checked before launch, executed in a process of their own."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from cryobench.errors import CryobenchError

#: notebooks that are executed now, by any thread
RUNNING: set[subprocess.Popen[str]] = set()
#: set when the user stops a run: what fails after that is no result
STOPPING = threading.Event()


class NotebookError(CryobenchError):
    """A cell of the notebook raised; the message is its last line."""


def parameters_of(notebook: Path) -> dict[str, Any]:
    """Names and default values of the cell tagged ``parameters`` (literals only)."""
    try:
        cells = json.loads(notebook.read_text())["cells"]
    except (OSError, ValueError, KeyError) as error:
        raise CryobenchError(f"{notebook}: not a notebook ({error})") from error
    for cell in cells:
        if "parameters" in cell.get("metadata", {}).get("tags", []):
            tree = ast.parse("".join(cell["source"]))
            return {
                node.targets[0].id: ast.literal_eval(node.value)
                for node in tree.body
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
            }
    return {}


def check_parameters(notebook: Path, given: dict[str, Any]) -> None:
    """Refuse a parameter that the notebook does not have, or a value of another type.

    papermill would run on with the default and exit 0.
    """
    known = parameters_of(notebook)
    for name, value in given.items():
        if name not in known:
            raise CryobenchError(f"{notebook.name} has no parameter {name!r}; it has {', '.join(known) or 'none'}")
        if type(value) is not type(known[name]):
            raise CryobenchError(
                f"{notebook.name}: {name} must be {type(known[name]).__name__}, not {type(value).__name__} {value!r}"
            )


def execute(notebook: Path, output: Path, parameters: dict[str, Any], threads: int | None = None) -> None:
    """Run a notebook with parameters; ``output`` appears when it is complete, or with the error in it.

    Raises NotebookError with the last line of the exception if a cell raises.
    """
    check_parameters(notebook, parameters)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f"{output.stem}.{os.getpid()}.part.ipynb")
    # threads that wait for each other asleep, not spinning: beside other work that is many times faster
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "CRYOBENCH_STATIC": "1"}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        json.dump(parameters, file)  # JSON is YAML
        file.flush()
        command = [sys.executable, "-m", "papermill", "--no-progress-bar", "--log-level", "ERROR"]
        command += ["--kernel", "python3", "--parameters_file", file.name, str(notebook), str(partial)]
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
        )
        RUNNING.add(process)
        if STOPPING.is_set():
            process.terminate()  # whoever set it did not see this one
        try:
            _, errors = process.communicate()
        finally:
            process.kill()  # its kernel goes with it; what was learned is in the checkpoint
            RUNNING.discard(process)
    if process.returncode < 0:
        partial.unlink(missing_ok=True)  # stopped by a signal: no result, and what is there of an earlier run stays
    elif partial.exists():
        partial.replace(output)
    if process.returncode:
        lines = [line for line in errors.splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else f"papermill ended with {process.returncode}"
        raise NotebookError(f"{notebook.name}: {reason}")


def without_origin(notebook: dict[str, Any]) -> dict[str, Any]:
    """An executed notebook as one to read: its parameters in their own cell, and nothing of where it was executed."""
    given = next((c for c in notebook["cells"] if "injected-parameters" in c["metadata"].get("tags", [])), None)
    cells = [dict(c) for c in notebook["cells"] if c is not given]
    for cell in cells:
        cell["metadata"] = {k: v for k, v in cell["metadata"].items() if k not in ("papermill", "execution")}
        if given and "parameters" in cell["metadata"].get("tags", []):
            cell["source"] = _merged(cell["source"], given["source"])
    metadata = {k: v for k, v in notebook["metadata"].items() if k in ("kernelspec", "language_info")}
    return {**notebook, "cells": cells, "metadata": metadata}


def _merged(defaults: str | list[str], given: str | list[str]) -> str:
    """The cell of default parameters with the values of the run; where its records went is nobody's business."""
    values = dict(line.split(" = ", 1) for line in "".join(given).splitlines() if " = " in line)
    values.pop("results", None)
    lines = "".join(defaults).splitlines()
    return "\n".join(f"{name} = {values[name]}" if (name := line.split(" = ")[0]) in values else line for line in lines)
