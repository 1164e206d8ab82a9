"""What the studies in this folder share: a JSON file of rows, each measured once."""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def opened(file: Path) -> Iterator[dict[str, Any]]:
    """What is measured so far, written back afterwards; two processes may take turns."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_suffix(".lock.part").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kept = json.loads(file.read_text()) if file.exists() else {"rows": []}
        yield kept
        partial = file.with_suffix(".part")
        partial.write_text(json.dumps(kept, indent=1) + "\n")
        partial.replace(file)


def known(file: Path, row: dict[str, Any]) -> bool:
    """Whether this row, of this very code and data (its ``key``), is there."""
    with opened(file) as kept:
        return any(old["key"] == row["key"] for old in kept["rows"])


def add(file: Path, row: dict[str, Any], found: dict[str, Any]) -> None:
    """Append the row with what was found, in the place of one that asked the same of other code or data."""
    asked = set(row) - {"key"}
    with opened(file) as kept:
        kept["rows"] = [old for old in kept["rows"] if any(old.get(k) != row[k] for k in asked)] + [row | found]
