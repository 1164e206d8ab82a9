"""The list of archive entries (data/manifest.yml): where each file is, its checksum, licence and facts."""

from __future__ import annotations

import difflib
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


_URL = {"type": "string", "pattern": r"^https?://\S+$"}
_TEXT = {"type": "string", "minLength": 1}


def _table(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    """JSON schema of an object with exactly these keys."""
    return {
        "type": "object",
        "properties": {**required, **(optional or {})},
        "required": list(required),
        "additionalProperties": False,
    }


_FILE = _table(
    {"url": _URL, "path": _TEXT},
    {
        "mirrors": {"type": "array", "items": _URL},
        "size": {"type": ["integer", "null"], "minimum": 1},
        "sha256": {"type": ["string", "null"], "pattern": "^[0-9a-f]{64}$"},
        "of": {"enum": ["served", "unpacked"]},
    },
)
_FACT = _table(
    {
        "fact": _TEXT,
        "value": {"type": ["string", "number"]},
        "source": _TEXT,
        "status": {"enum": ["confirmed", "unconfirmed"]},
    }
)
_ENTRY = _table(
    {
        "id": {"type": "string", "pattern": "^(EMD-[0-9]{4,5}|EMPIAR-[0-9]{5}|PDB-[0-9][0-9A-Z]{3})$"},
        "kind": {"enum": ["map", "model", "particles", "micrographs", "movies"]},
        "title": _TEXT,
        "used_by": {"type": "array", "items": _TEXT},
        "licence": _TEXT,
        "files": {"type": "array", "items": _FILE},
        "facts": {"type": "array", "items": _FACT},
    },
    {"directory": _URL},
)
_LICENCE = _table({"name": _TEXT, "confirmed": {"type": "boolean"}, "note": {"type": "string"}})
_SCHEMA = _table(
    {
        "licences": {"type": "object", "additionalProperties": _LICENCE},
        "entries": {"type": "array", "items": _ENTRY},
    }
)


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
    import jsonschema
    import yaml

    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C one is ten times faster
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CryobenchError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    errors = jsonschema.Draft202012Validator(_SCHEMA).iter_errors(document)
    if problem := jsonschema.exceptions.best_match(errors):
        raise CryobenchError(f"{path}: {_place(document, list(problem.absolute_path))}: {problem.message}")

    licences = {name: Licence(**values) for name, values in document["licences"].items()}
    entries: dict[str, Entry] = {}
    owner: dict[str, str] = {}
    for raw in document["entries"]:
        where = f"{path}: {raw['id']}"
        if raw["id"] in entries:
            raise CryobenchError(f"{where}: listed twice; keep one")
        if raw["licence"] not in licences:
            raise CryobenchError(f"{where}: licence {raw['licence']!r} is not among {', '.join(licences)}")
        if not raw["files"] and "directory" not in raw:
            raise CryobenchError(f"{where}: has neither files nor a directory; give one")
        for file in raw["files"]:
            target = PurePosixPath(file["path"])
            if target.is_absolute() or ".." in target.parts or "\\" in file["path"]:
                raise CryobenchError(f"{where}: path {file['path']!r} leaves the data folder")
            if str(target) in owner:
                raise CryobenchError(f"{where}: path {file['path']!r} also belongs to {owner[str(target)]}")
            owner[str(target)] = raw["id"]
        entries[raw["id"]] = Entry(
            id=raw["id"],
            kind=raw["kind"],
            title=raw["title"],
            used_by=tuple(raw["used_by"]),
            files=tuple(RemoteFile(**{**f, "mirrors": tuple(f.get("mirrors", ()))}) for f in raw["files"]),
            licence=licences[raw["licence"]],
            facts=tuple(Fact(**f) for f in raw["facts"]),
            directory=raw.get("directory"),
        )
    return entries


def _place(document: Any, keys: list[Any]) -> str:
    """'EMD-8511: files.0.size' rather than 'entries.0.files.0.size'."""
    if len(keys) > 1 and keys[0] == "entries":
        raw = document["entries"][keys[1]]
        name = raw.get("id", f"entry {keys[1] + 1}") if isinstance(raw, dict) else f"entry {keys[1] + 1}"
        return ": ".join([str(name), ".".join(map(str, keys[2:]))]).removesuffix(": ")
    return ".".join(map(str, keys)) or "top level"


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
    raise CryobenchError(f"no entry {name!r}: {hint}`cryobench list specimens` shows all")
