"""The list of archive entries (data/manifest.yml): where each file is, its checksum, licence and facts."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from cryobench.errors import CryobenchError
from cryobench.paths import project_root


@dataclass(frozen=True)
class RemoteFile:
    """One file of an entry.

    path is relative to the data folder. size (bytes) and sha256 (lower-case hex) are None where nobody
    published them; ``of`` says whether they describe the file as served or after gunzip ('unpacked').
    """

    path: str
    url: str
    mirrors: tuple[str, ...] = ()
    size: int | None = None
    sha256: str | None = None
    of: str = "served"


@dataclass(frozen=True)
class Fact:
    """Something known about an entry; status is 'confirmed' (its source states it) or 'unconfirmed'."""

    fact: str
    value: str | int | float
    source: str
    status: str


@dataclass(frozen=True)
class Licence:
    """Licence of an archive's data, and whether it was read there."""

    name: str
    confirmed: bool
    note: str


@dataclass(frozen=True)
class Entry:
    """One archive entry; kind is map, model, particles, micrographs or movies.

    directory is the address of a folder of files whose list is unknown: fetch cannot download it.
    used_by names the tables (papers) that use the entry.
    """

    id: str
    kind: str
    title: str
    used_by: tuple[str, ...]
    files: tuple[RemoteFile, ...]
    licence: Licence
    facts: tuple[Fact, ...]
    directory: str | None = None

    @property
    def unconfirmed(self) -> tuple[Fact, ...]:
        """The facts to check with the archive before relying on them."""
        return tuple(fact for fact in self.facts if fact.status == "unconfirmed")


#: what a field has to be: a test and its words. (No jsonschema: importing it takes seconds where Jupyter is.)
Rule = tuple[Callable[[Any], object], str]


def _matches(pattern: str, words: str) -> Rule:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value), words


def _one_of(*values: str) -> Rule:
    return lambda value: value in values, f"one of {', '.join(values)}"


def _list_of(rule: Rule) -> Rule:
    test, words = rule
    return lambda value: isinstance(value, list) and all(test(item) for item in value), f"a list, each {words}"


def _or_null(rule: Rule) -> Rule:
    return lambda value: value is None or rule[0](value), f"{rule[1]} or null"


_TEXT = _matches(r"(?s).+", "a text")
_URL = _matches(r"https?://\S+", "an http(s) address")
_TABLE: Rule = (lambda value: isinstance(value, dict), "a table")
_TRUTH: Rule = (lambda value: isinstance(value, bool), "true or false")
_VALUE: Rule = (lambda value: _TEXT[0](value) or type(value) in (int, float), "a number or a text")
_BYTES: Rule = (lambda value: type(value) is int and value > 0, "a positive whole number of bytes")

_TOP = {"licences": _TABLE, "entries": _list_of(_TABLE)}
_LICENCE = {"name": _TEXT, "confirmed": _TRUTH, "note": _TEXT}
_STATUS = _one_of("confirmed", "unconfirmed")
_FACT = {"fact": _TEXT, "value": _VALUE, "source": _TEXT, "status": _STATUS}
_FILE = {
    "path": _TEXT,
    "url": _URL,
    "mirrors": _list_of(_URL),
    "size": _or_null(_BYTES),
    "sha256": _or_null(_matches("[0-9a-f]{64}", "64 lower-case hex digits (in quotes if all are 0-9)")),
    "of": _one_of("served", "unpacked"),
}
_ENTRY = {
    "id": _matches(r"EMD-\d{4,5}|EMPIAR-\d{5}|PDB-\d[0-9A-Z]{3}", "EMD-1234, EMPIAR-12345 or PDB-1ABC"),
    "kind": _one_of("map", "model", "particles", "micrographs", "movies"),
    "title": _TEXT,
    "used_by": _list_of(_TEXT),
    "licence": _TEXT,
    "directory": _URL,
    "files": _list_of(_TABLE),
    "facts": _list_of(_TABLE),
}


def _check(raw: Any, rules: dict[str, Rule], where: str, optional: tuple[str, ...] = ()) -> None:
    """Refuse unknown, missing and wrong fields with one line that names the field."""
    if not isinstance(raw, dict):
        raise CryobenchError(f"{where}: has to be a table with {', '.join(rules)}")
    for key in [*raw, *rules]:
        if key not in rules:
            raise CryobenchError(f"{where}: unknown field {key!r}; the fields are {', '.join(rules)}")
        if key in raw and not rules[key][0](raw[key]):
            raise CryobenchError(f"{where}: {key} is {str(raw[key])[:60]!r}, but has to be {rules[key][1]}")
        if key not in raw and key not in optional:
            raise CryobenchError(f"{where}: {key} is missing; give {rules[key][1]}")


def load_manifest(path: str | Path | None = None) -> dict[str, Entry]:
    """All entries by id ('EMD-8511', 'EMPIAR-10081', 'PDB-5U6O'), in the file's order.

    path defaults to the manifest of the project. Raises CryobenchError, one line naming the entry and the
    field, for a file that is missing or not as it should be.
    """
    path = Path(path) if path is not None else project_root() / "data" / "manifest.yml"
    try:
        modified = path.stat().st_mtime_ns
    except OSError as error:
        raise CryobenchError(f"{path}: no manifest there; give its path or install cryobench anew") from error
    return dict(_load(path, modified))


@lru_cache(maxsize=4)
def _load(path: Path, modified: int) -> dict[str, Entry]:
    import yaml

    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C one is ten times faster
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CryobenchError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    _check(document, _TOP, str(path))
    licences = {}
    for name, raw in document["licences"].items():
        _check(raw, _LICENCE, f"{path}: licences: {name}")
        licences[name] = Licence(**raw)
    entries: dict[str, Entry] = {}
    owner: dict[str, str] = {}
    for raw in document["entries"]:
        where = f"{path}: {raw.get('id', 'entry without id')}"
        _check(raw, _ENTRY, where, optional=("directory",))
        if raw["id"] in entries:
            raise CryobenchError(f"{where}: listed twice; keep one")
        if raw["licence"] not in licences:
            raise CryobenchError(f"{where}: licence {raw['licence']!r} is not among {', '.join(licences)}")
        if not raw["files"] and "directory" not in raw:
            raise CryobenchError(f"{where}: has neither files nor a directory; give one")
        for fact in raw["facts"]:
            _check(fact, _FACT, f"{where}: a fact")
        for file in raw["files"]:
            _check(file, _FILE, f"{where}: a file", optional=("mirrors", "size", "sha256", "of"))
            _claim(file["path"], raw["id"], owner, where)
        files = (RemoteFile(**{**file, "mirrors": tuple(file.get("mirrors", ()))}) for file in raw["files"])
        changed = {
            "used_by": tuple(raw["used_by"]),
            "licence": licences[raw["licence"]],
            "files": tuple(files),
            "facts": tuple(Fact(**fact) for fact in raw["facts"]),
        }
        entries[raw["id"]] = Entry(**{**raw, **changed})
    return entries


def _claim(path: str, entry: str, owner: dict[str, str], where: str) -> None:
    """Each path stays inside the data folder and belongs to one file."""
    target = PurePosixPath(path)
    if target.is_absolute() or ".." in target.parts or "\\" in path or not target.name:
        raise CryobenchError(f"{where}: path {path!r} leaves the data folder; make it relative")
    if str(target) in owner:
        raise CryobenchError(f"{where}: path {path!r} also belongs to {owner[str(target)]}")
    owner[str(target)] = entry


def find_entry(name: str, manifest: dict[str, Entry] | None = None) -> Entry:
    """The entry of that name, in any case and with or without its prefix: EMD-8511, emd_8511, 8511, 5u6o.

    Raises CryobenchError, with the nearest names, where there is none.
    """
    manifest = load_manifest() if manifest is None else manifest
    wanted = name.strip().upper().replace("_", "-").replace(" ", "-").replace("EMDB-", "EMD-")
    for candidate in (wanted, f"EMD-{wanted}", f"EMPIAR-{wanted}", f"PDB-{wanted}"):
        if candidate in manifest:
            return manifest[candidate]
    near = difflib.get_close_matches(wanted, manifest, 3, 0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise CryobenchError(f"no entry {name!r}: {hint}`cryobench fetch` shows all")
