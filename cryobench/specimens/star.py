"""STAR files as RELION reads and writes them: blocks of columns.

Read line by line, as RELION does: a CIF parser would take a micrograph named ``data_7/x.mrc`` for a new
block. What particles are in those columns is in :mod:`cryobench.specimens.particle_star`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from cryobench.errors import BadFileError, CryobenchError
from cryobench.specimens.files import atomic_write, existing_file

Blocks = dict[str, dict[str, list[str]]]

# a quoted value, in which the other quote and blanks may stand, or a plain one
_TOKEN = re.compile(r"""'([^']*)'(?=\s|$)|"([^"]*)"(?=\s|$)|(\S+)""")


def read_star(path: str | Path) -> Blocks:
    """Blocks by name (without ``data_``), each with its columns by label (without ``_``), as strings.

    A single value (no ``loop_``) is a column of length one. Raises BadFileError, with the number of the
    line, for files that are not STAR, rows of the wrong length, repeated blocks or labels; and for
    cryoSPARC's .cs files, which pyem converts; CryobenchError where the file cannot be opened.
    """
    path = existing_file(path)
    with path.open("rb") as raw:
        head = raw.read(4096)
    if head.startswith(b"\x93NUMPY") or path.suffix == ".cs":
        raise BadFileError(
            f"{path} is a cryoSPARC file; convert it with pyem (csparc2star.py IN.cs OUT.star) and give OUT.star"
        )
    if b"\0" in head:
        raise BadFileError(f"{path} is not a STAR file (it is binary); give a .star file of RELION 3.0 or newer")
    # names in any encoding come through unchanged
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        blocks = _parse(path, lines)
    if not blocks:
        raise BadFileError(f"{path} is not a STAR file (no line starts with data_)")
    return blocks


def _parse(path: Path, lines: Iterable[str]) -> Blocks:
    blocks: Blocks = {}
    block: dict[str, list[str]] | None = None
    columns: list[list[str]] = []  # of the loop that the line is in
    in_loop = False
    for number, line in enumerate(lines, 1):
        words = _split(line)
        if not words or words[0].startswith("#"):
            continue
        first = words[0]
        # values may look like keywords: a line of several words in a loop is a row, once labels are over
        begun = bool(columns) and bool(columns[0])
        alone = len(words) == 1 or words[1].startswith("#")
        is_row = bool(columns) and not alone and (begun or not first.startswith("_"))
        if first.startswith("data_") and not is_row:
            if first[5:] in blocks:
                raise BadFileError(f"{path}, line {number}: a second block {first}; keep one of them")
            block = blocks[first[5:]] = {}
            columns, in_loop = [], False
        elif block is None:
            raise BadFileError(f"{path} is not a STAR file (line {number} comes before any data_ line)")
        elif first == "loop_" and not is_row:
            columns, in_loop = [], True
        elif first.startswith("_") and not is_row and not begun:
            if first[1:] in block:
                raise BadFileError(f"{path}, line {number}: a second column {first}; keep one of them")
            if in_loop:
                columns.append([])
                block[first[1:]] = columns[-1]
            elif len(words) > 1:
                block[first[1:]] = [words[1]]
            else:
                raise BadFileError(f"{path}, line {number}: {first} has no value")
        else:
            words = _without_comment(words, len(columns))
            if len(words) != len(columns):
                raise BadFileError(
                    f"{path}, line {number}: {len(words)} values for {len(columns)} columns; "
                    "the file may be truncated, write it again"
                )
            for column, word in zip(columns, words, strict=True):
                column.append(word)
    return blocks


def _split(line: str) -> list[str]:
    if "'" not in line and '"' not in line:
        return line.split()
    return [next(group for group in match.groups() if group is not None) for match in _TOKEN.finditer(line)]


def _without_comment(words: list[str], n: int) -> list[str]:
    return words[:n] if len(words) > n and words[n].startswith("#") else words


def write_star(path: str | Path, blocks: Mapping[str, Mapping[str, Sequence[object]]]) -> None:
    """Writes blocks of columns as RELION 3.1 does, atomically; floats with six decimals.

    Raises CryobenchError for columns of unequal length, or a value that STAR cannot hold.
    """
    lines = []
    for name, columns in blocks.items():
        if len({len(column) for column in columns.values()}) > 1:
            raise CryobenchError(f"{path}: the columns of data_{name} have unequal lengths")
        lines += ["", "# version 30001", "", f"data_{name}", "", "loop_"]
        lines += [f"_{label} #{i}" for i, label in enumerate(columns, 1)]
        lines += [" ".join(row) for row in zip(*([_text(v) for v in c] for c in columns.values()), strict=True)]
        lines += [""]
    with atomic_write(path) as file:
        file.write("\n".join([*lines, ""]).encode("utf-8", "surrogateescape"))


def _text(value: object) -> str:
    text = f"{value:.6f}" if isinstance(value, float) else str(value)
    if text and not re.search(r"\s", text) and text[0] not in "\"'#":
        return text
    quote = '"' if '"' not in text else "'"
    if quote in text or "\n" in text or "\r" in text:
        raise CryobenchError(f"a STAR file cannot hold the value {text!r}; rename it")
    return f"{quote}{text}{quote}"
