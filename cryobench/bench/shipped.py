"""What is committed of runs: records, their notebooks without figures, and the weights of trained methods."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cryobench.bench import records
from cryobench.bench.experiment import Cell, Experiment
from cryobench.bench.notebooks import parameters_of, without_origin
from cryobench.bench.plan import notebook_of, state_of
from cryobench.bench.tables import table_names
from cryobench.errors import BadFileError, CryobenchError
from cryobench.methods.learned import Learned
from cryobench.methods.registry import all_methods
from cryobench.paths import project_root
from cryobench.specimens.catalog import available

NOT_KEPT = "(shown where the notebook was run; not kept in this copy)"


def ship(
    results: Path,
    target: Path,
    profile: str,
    say: Callable[[str], None],
    specimens: Sequence[str] = (),
    check: bool = True,
) -> tuple[int, int]:
    """Copy finished records and their stripped notebooks to TARGET/<table>/<profile>; returns how many, and not.

    check: refuse what a reader could not make again: a record of uncommitted code, of unknown or of other code than
    today's. ``say`` hears why of each.
    """
    copied = refused = 0
    for path, record in _finished(results, profile):
        if specimens and record["specimen"] not in specimens:
            continue
        try:
            if check:
                _refuse(path, record, results)
            page = path.with_suffix(".ipynb")
            if not page.exists():
                raise CryobenchError("its executed notebook is missing")
            text = json.dumps(stripped(json.loads(page.read_text())), indent=1) + "\n"
            for private in (project_root(), results.resolve(), Path.home()):
                if f"{private}/" in text + json.dumps(record):
                    raise CryobenchError(f"it names a folder of this machine, {private}")
        except CryobenchError as error:
            say(f"not shipped: {path}: {error}")
            refused += 1
            continue
        copy = target / record["table"] / profile / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.with_suffix(".ipynb").write_text(text)
        records.write_record(copy, record)
        copied += 1
    return copied, refused


def stripped(notebook: dict[str, Any]) -> dict[str, Any]:
    """An executed notebook with the text it printed, and a line for each figure and table; no trace of its machine."""
    notebook = without_origin(notebook)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = [_stripped(o) for o in cell["outputs"] if o.get("name") != "stderr"]
    return notebook


def _stripped(output: dict[str, Any]) -> dict[str, Any]:
    data = output.get("data", {})
    if not data or set(data) == {"text/plain"}:
        return output
    return {"output_type": "display_data", "metadata": {}, "data": {"text/plain": NOT_KEPT}}


def ship_weights(results: Path, target: Path, profile: str) -> list[Path]:
    """Copy what trained methods learned to TARGET/METHOD-PROFILE.safetensors and .json; returns the new files.

    Of each method the run that its notebook's own parameters name, seed 0, where the cache still has its fit.
    Those of networks are kept in half precision.
    """
    from safetensors.torch import load_file, save_file

    made = []
    for _, record in _finished(results, profile):
        method = all_methods().get(record["method"])
        own = parameters_of(notebook_of(record["method"])) if method and method.trained else {}
        wanted = (own.get("table"), own.get("specimen"), 0)
        if not method or (record["table"], record["specimen"], record["seed"]) != wanted:
            continue
        cell = Cell(record["table"], record["specimen"], record["method"], profile)
        fit = Experiment(cell, record["provenance"]["device_class"]).fit_folder
        if not (fit / "weights.json").exists():
            continue
        target.mkdir(parents=True, exist_ok=True)
        path = target / f"{cell.method}-{profile}.safetensors"
        tensors = load_file(fit / "weights.safetensors")
        if issubclass(method, Learned):
            tensors = {k: _halved(v) for k, v in tensors.items()}
        save_file(tensors, path)
        head = json.loads((fit / "weights.json").read_text())
        simulation = record["provenance"]["data"]["simulation"]
        head["origin"] = {**simulation, **{k: record[k] for k in ("table", "specimen")}, "profile": profile}
        path.with_suffix(".json").write_text(json.dumps(head, indent=1) + "\n")
        made.append(path)
    return made


def _halved(tensor: Tensor) -> Tensor:
    """In half precision where that can hold it."""
    half = tensor.half()
    return half if tensor.dtype == torch.float32 and bool(half.isfinite().all()) else tensor


def _finished(results: Path, profile: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    for table in table_names():
        for path in sorted((results / table / profile).glob("*.json")):
            try:
                record = records.read_record(path)
            except BadFileError:
                continue
            if record["status"] == "done":
                yield path, record


def _refuse(path: Path, record: dict[str, Any], results: Path) -> None:
    made = record["provenance"]
    if made["commit"] == "unknown":
        raise CryobenchError("the commit of its code is unknown: set CRYOBENCH_COMMIT where there is no git")
    if made["dirty"]:
        raise CryobenchError("made with uncommitted changes: commit them and run it again")
    if available(record["specimen"]) and record["method"] in all_methods():
        cell = Cell(record["table"], record["specimen"], record["method"], record["profile"], record["seed"])
        state = state_of(cell, results)
        if state.state != "done":
            raise CryobenchError(f"out of date ({state.why}): run it again")
