"""What a table needs, what of it is there, and why a number is out of date."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryobench.bench import records
from cryobench.bench.experiment import Cell, Experiment
from cryobench.bench.keys import digest, notebook_hash
from cryobench.bench.tables import TableSpec
from cryobench.errors import BadFileError, CryobenchError
from cryobench.methods.registry import all_methods, get_method
from cryobench.paths import project_root, shipped_dir
from cryobench.specimens.catalog import available, resolve, specimen_name


@dataclass(frozen=True)
class State:
    """done, stale, failed, missing, or shipped (see :func:`state_shown`); why says what changed or went wrong."""

    cell: Cell
    state: str
    why: str = ""


def notebook_of(method: str) -> Path:
    """The notebook that is a method's chapter; a third-party method brings its own beside its module."""
    path = project_root() / "notebooks" / "methods" / f"{method}.ipynb"
    if not path.exists():
        module = sys.modules[get_method(method).__module__]
        path = Path(str(module.__file__)).with_name(f"{method}.ipynb")
    if not path.exists():
        raise CryobenchError(f"method {method} has no notebook: expected {path}")
    return path


def cells_of(
    spec: TableSpec,
    profile: str,
    specimens: list[str] | None = None,
    methods: list[str] | None = None,
    seeds: list[int] | None = None,
) -> list[Cell]:
    """The cells that can be run here: methods that are built, specimens that are on this machine.

    Named specimens and methods are taken as they are, so that a missing one is an error and not a gap.
    """
    built = all_methods()
    for method in methods or ():
        get_method(method)
    if specimens is None:
        specimens = [s for s in spec.specimens if available(s)]
    for specimen in specimens:
        if not available(specimen):
            resolve(specimen)  # says what is wrong with it
    # a structure file is named in full: the notebook runs in another folder
    specimens = [str(Path(s).resolve()) if Path(s).is_file() else s for s in specimens]
    chosen = methods or [m for m in spec.methods if m in built]
    cells = [Cell(spec.name, s, m, profile, seed) for s in specimens for m in chosen for seed in seeds or [0]]
    return list(dict.fromkeys(cells))


def path_of(cell: Cell, results: Path) -> Path:
    return records.record_path(results, cell.table, cell.profile, specimen_name(cell.specimen), cell.method, cell.seed)


def state_of(cell: Cell, results: Path, device: str = "auto") -> State:
    """Compare a cell's record with what a run would compute now.

    With device "auto" a record made on another kind of device counts: a laptop need not redo a GPU's work.
    """
    path = path_of(cell, results)
    if not path.exists():
        return State(cell, "missing")
    try:
        record = records.read_record(path)
    except BadFileError as error:
        return State(cell, "stale", str(error))
    if record["status"] == "failed":
        return State(cell, "failed", str(record["error"]))
    then = record["provenance"]
    try:
        now = current_inputs(cell, device)
    except CryobenchError as error:
        return State(cell, "stale", str(error))
    if device == "auto":
        now["device_class"] = then["device_class"]
    if digest(now) == then["key"]:
        return State(cell, "done")
    return State(cell, "stale", "; ".join(_changes(record, now)) or "the inputs changed")


def state_shown(cell: Cell, results: Path) -> State:
    """As :func:`state_of`; a cell without a record here is ``shipped`` where a committed one fills its place."""
    own = state_of(cell, results)
    if own.state != "missing" or path_of(cell, shipped_dir()) not in records.shipped_records(cell.table, cell.profile):
        return own
    committed = state_of(cell, shipped_dir())
    return State(cell, "shipped", "" if committed.state == "done" else f"{committed.state}: {committed.why}")


def current_inputs(cell: Cell, device: str = "auto") -> dict[str, Any]:
    """What the key of a run of this cell would be made of now."""
    return {**Experiment(cell, device).inputs(), "notebook_hash": notebook_hash(notebook_of(cell.method))}


def _changes(record: dict[str, Any], now: dict[str, Any]) -> list[str]:
    then, now = record["provenance"], json.loads(json.dumps(now))  # tuples as the lists they are in the record
    found = []
    code = then["code"]
    changed = sorted(k for k in code.keys() | now["code"].keys() if code.get(k) != now["code"].get(k))
    if changed:
        found.append("code of " + ", ".join(m.removeprefix("cryobench.") for m in changed))
    sections = [("config", record["config"], now["config"]), ("data", then["data"], now["data"])]
    sections.append(("simulation", *(d["data"].get("simulation", {}) for d in (then, now))))
    for title, old, new in sections:
        names = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k) and k != "simulation")
        found += [f"{title}: {k} was {old.get(k)}, is {new.get(k)}" for k in names]
    if then["notebook_hash"] != now["notebook_hash"]:
        found.append("code cells of the notebook")
    if then.get("conventions") != now["conventions"]:
        found.append("scoring conventions")
    if then["device_class"] != now["device_class"]:
        found.append(f"device: was {then['device_class']}, is {now['device_class']}")
    return found
