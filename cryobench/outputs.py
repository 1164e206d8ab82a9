"""Where commands write: names that make sense, and no file of the user's in their place."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cryobench.errors import CryobenchError


def output_path(name: str, suffixes: tuple[str, ...] = ()) -> Path:
    """Raises CryobenchError for a suffix that is not among these, if any, and where there is no such folder."""
    path = Path(name)
    if suffixes and path.suffix not in suffixes:
        raise CryobenchError(f"{path}: the output must end in {' or '.join(suffixes)}")
    if not path.absolute().parent.is_dir():
        raise CryobenchError(f"{path}: the folder {path.absolute().parent} does not exist")
    return path


def refuse_clashes(outputs: Iterable[Path], inputs: Iterable[str | Path | None]) -> None:
    """Raises CryobenchError where an output would take the place of an input, or of another output."""
    taken = {Path(path).resolve() for path in inputs if path}
    for path in outputs:
        if path.resolve() in taken:
            raise CryobenchError(f"{path} would replace an input or another output: give it another name")
        taken.add(path.resolve())
