"""Opening files that exist and writing files that are whole or absent."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from cryobench.errors import BadFileError, CryobenchError


def existing_file(path: str | Path) -> Path:
    """The path itself if it is a readable, regular, non-empty file; otherwise an error of one line."""
    path = Path(path)
    try:
        if path.is_dir():
            raise CryobenchError(f"{path} is a folder; give a file in it")
        if not path.exists():
            raise CryobenchError(f"{path} does not exist; check the name and the folder")
        if not path.is_file():
            raise CryobenchError(f"{path} is not a regular file; copy its data to one first")
        with path.open("rb") as file:
            if not file.read(1):
                raise BadFileError(f"{path} is empty; copy or download it again")
    except (OSError, ValueError) as error:  # no permission, a name too long, a NUL in it
        raise CryobenchError(f"{path} cannot be read: {_reason(error)}") from error
    return path


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file that appears under its name only when it was written completely.

    The data go to a temporary file in the same folder, are flushed to the disk and renamed. After any
    failure, the old file (or none) is in place and the temporary one is gone.
    Raises CryobenchError where the folder is missing or not writable.
    """
    target = Path(path).resolve()  # a symbolic link keeps pointing to the file it points to
    if target.exists() and not target.is_file():
        raise CryobenchError(f"{path} is not a regular file, so it is not replaced; give another output name")
    if not target.parent.is_dir():
        raise CryobenchError(f"the folder {target.parent} does not exist; make it first")
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name[:100]}.", suffix=".part", dir=target.parent)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp makes files for the owner alone
        os.replace(temporary, target)
        temporary = None
    except OSError as error:
        raise CryobenchError(f"{path} cannot be written: {_reason(error)}") from error
    finally:
        if temporary is not None:
            os.unlink(temporary)


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()
