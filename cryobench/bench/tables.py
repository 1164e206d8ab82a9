"""A published table as one YAML file: its numbers with their source, and how it is rebuilt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import fastjsonschema
import yaml

from cryobench.errors import CryobenchError
from cryobench.paths import project_root

PROFILES = {
    "smoke": "32 px, seconds: for tests",
    "quick": "64 px, about a minute per method on a 2-core CPU (em3d eight, with its experiments)",
    "full": "128 or 256 px, one GPU, minutes per method and specimen",
}

_SPECIMEN = {
    "type": "object",
    "properties": {
        "dataset": {"type": "string"},
        "stand_in_for": {"type": "string"},
        "simulation": {"type": "object"},
    },
    "required": ["dataset"],
    "additionalProperties": False,
}
_PROFILE = {
    "type": "object",
    "properties": {k: {"type": "integer", "minimum": 1} for k in ("size", "n_train", "n_test")},
    "required": ["size", "n_train", "n_test"],
    "additionalProperties": False,
}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "title": {"type": "string"},
        "paper": {"type": "object"},
        "note": {"type": "string"},
        "contradictions": {},
        "published": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "dataset": {"type": "string"},
                    "method": {"type": "string"},
                    "label": {"type": "string"},
                    "metrics": {"type": "object", "additionalProperties": {"type": "number"}},
                    "source": {"type": "string"},
                    "note": {"type": "string"},
                },
                "required": ["dataset", "method", "label", "metrics", "source"],
                "additionalProperties": False,
            },
        },
        "specimens": {"type": "object", "additionalProperties": _SPECIMEN},
        "methods": {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
        "simulation": {"type": "object"},
        "conventions": {"type": "array", "items": {"type": "string"}, "minItems": 1},
        "profiles": {"type": "object", "additionalProperties": _PROFILE, "required": list(PROFILES)},
    },
    "required": "name title paper published specimens methods simulation conventions profiles".split(),
    "additionalProperties": False,
}


@dataclass(frozen=True)
class TableSpec:
    """One table: ``published`` rows; ``specimens`` by name (dataset they stand for, own simulation
    settings); ``simulation`` settings; ``profiles`` with image size and numbers of particles."""

    name: str
    title: str
    paper: dict[str, Any]
    published: list[dict[str, Any]]
    specimens: dict[str, dict[str, Any]]
    methods: list[str]
    simulation: dict[str, Any]
    conventions: list[str]
    profiles: dict[str, dict[str, int]]
    note: str = ""
    contradictions: Any = None

    def dataset(self, specimen: str) -> str:
        """The published data set beside which a specimen's numbers are shown ('' for the user's own)."""
        return str(self.specimens.get(specimen, {}).get("dataset", ""))

    def stands_in(self, specimen: str) -> str:
        """What a built-in specimen stands in for ('' if it is the paper's own or the user's)."""
        return str(self.specimens.get(specimen, {}).get("stand_in_for", ""))

    def published_row(self, specimen: str, method: str) -> dict[str, Any] | None:
        """The paper's row for a method; rows whose data set is not told apart count for every specimen."""
        for row in self.published:
            if row["method"] == method and row["dataset"] in (self.dataset(specimen), "any"):
                return row
        return None


def table_names() -> list[str]:
    return sorted(p.stem for p in (project_root() / "tables").glob("*.yml"))


@cache
def _validator() -> Callable[[Any], Any]:
    return fastjsonschema.compile(SCHEMA)


def load_table(name: str) -> TableSpec:
    """Read tables/NAME.yml, or the YAML file of that path. Raises CryobenchError if missing or not valid."""
    path = Path(name) if name.endswith((".yml", ".yaml")) else project_root() / "tables" / f"{name}.yml"
    if not path.is_file():
        raise CryobenchError(f"no table {name!r}; there are: {', '.join(table_names())}")
    try:
        content = yaml.safe_load(path.read_text())
        _validator()(content)
    except yaml.YAMLError as error:
        raise CryobenchError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    except fastjsonschema.JsonSchemaException as error:
        raise CryobenchError(f"{path}: {str(error).removeprefix('data.')}") from error
    return TableSpec(**content)
