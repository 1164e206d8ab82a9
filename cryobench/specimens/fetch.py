"""Download the files of an archive entry: verified, placed whole or not at all, recorded in lock.json.

lock.json in the data folder says for each file which address gave it, its size and SHA-256 as measured, its
validators and the time. Where the manifest has no checksum the first download is trusted and recorded; a later
one has to be the same.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import json
import os
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from cryobench.errors import CryobenchError
from cryobench.specimens.download import Refused, discard, download
from cryobench.specimens.manifest import Entry, RemoteFile

LOCK = "lock.json"
BLOCK = 1 << 20


def fetch(
    entry: Entry,
    data_dir: Path,
    progress: bool = True,
    *,
    verify: bool = False,
    sleep: Callable[[float], None] = time.sleep,
) -> list[Path]:
    """Files of ``entry`` under ``data_dir``, downloaded where they are not there yet.

    A file that lock.json knows is taken as it is if its size is right; verify=True hashes it again. Raises
    CryobenchError if a file cannot be had or is not the one expected (nothing wrong is left in place; a partial
    download stays as NAME.part and is continued next time), or if the entry is a folder for other tools.
    """
    data_dir = Path(data_dir)
    try:
        paths = [_fetch_file(file, entry.id, data_dir, progress, verify, sleep) for file in entry.files]
    except OSError as error:  # of the disk: those of the network end in download.py
        raise CryobenchError(f"{entry.id}: {error}; choose a --data-dir that can be written") from error
    if entry.directory:
        raise CryobenchError(
            f"{entry.id} is a folder of many files that cryobench does not download: mirror {entry.directory} with "
            f"Aspera, Globus or `wget -c -m -np -nH --cut-dirs=3 -P {data_dir / entry.id} {entry.directory}`"
        )
    return paths


def read_lock(data_dir: Path) -> dict[str, dict[str, Any]]:
    """What lock.json records, by path relative to ``data_dir``; empty where there is none."""
    path = Path(data_dir) / LOCK
    try:
        lock = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CryobenchError(f"{path}: unreadable ({error}): delete it and fetch again") from error
    if not isinstance(lock, dict) or not all(isinstance(known, dict) for known in lock.values()):
        raise CryobenchError(f"{path}: not a record of downloads: delete it and fetch again")
    return lock


def _fetch_file(
    file: RemoteFile, entry: str, data_dir: Path, progress: bool, verify: bool, sleep: Callable[[float], None]
) -> Path:
    target = data_dir / file.path
    target.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(target.with_name(f".{target.name}.lock"), entry):
        known = read_lock(data_dir).get(file.path, {})
        if target.exists():
            if not verify and _is_recorded(file, target, known):
                return target
            size, digest = _measure(target)
            problem = _problem(file, target, size, digest, known)
            if problem is None:
                if digest != known.get("sha256"):
                    _record(data_dir, file, entry, {"url": None}, size, digest)
                return target
            aside = target.with_name(target.name + ".wrong")
            os.replace(target, aside)
            _say(f"{entry}: {target} {problem}: moved to {aside.name}, downloading it again")
        return _from_network(file, entry, data_dir, known, progress, sleep)


def _from_network(
    file: RemoteFile,
    entry: str,
    data_dir: Path,
    known: dict[str, Any],
    progress: bool,
    sleep: Callable[[float], None],
) -> Path:
    """Try the address and then the mirrors until one gives the right bytes, and put them in place."""
    import requests
    from tqdm import tqdm

    target = data_dir / file.path
    part = target.with_name(target.name + ".part")
    size = file.size if file.of == "served" else None
    checkable = bool(file.sha256 or known.get("sha256"))
    reasons = []
    with requests.Session() as session:
        for url in (file.url, *file.mirrors):
            for _ in range(2):  # a second time, from zero, if the pieces of a resumed file do not fit
                try:
                    label = f"{entry} {target.name}"
                    with tqdm(desc=label, unit="B", unit_scale=True, disable=not progress) as bar:
                        got = download(url, part, size=size, checkable=checkable, bar=bar, session=session, sleep=sleep)
                except Refused as error:
                    reasons.append(f"{url}: {error}")
                    break
                length, digest = _measure(part)
                problem = _problem(file, part, length, digest, known)
                if problem is None:
                    _place(part, target)
                    source = {"url": got.url, "etag": got.etag, "last_modified": got.last_modified}
                    _record(data_dir, file, entry, source, length, digest)
                    return target
                discard(part)
                if not got.resumed:
                    reasons.append(f"{url}: the file {problem}")
                    break
    kept = "; what has arrived is kept and continued" if part.exists() else ""
    raise CryobenchError(f"{entry}: no address gave {target.name}{kept}. {'; '.join(reasons)}")


def _is_recorded(file: RemoteFile, target: Path, known: dict[str, Any]) -> bool:
    """Whether lock.json vouches for the file, as far as its size tells."""
    if not known or target.stat().st_size != known.get("size"):
        return False
    return file.of == "unpacked" or file.sha256 in (None, known.get("sha256"))


def _measure(path: Path) -> tuple[int, str]:
    """Bytes and SHA-256 of a file."""
    with path.open("rb") as stream:
        return _hash(stream)


def _hash(stream: IO[bytes] | gzip.GzipFile) -> tuple[int, str]:
    size, digest = 0, hashlib.sha256()
    while block := stream.read(BLOCK):
        size += len(block)
        digest.update(block)
    return size, digest.hexdigest()


def _problem(file: RemoteFile, path: Path, size: int, digest: str, known: dict[str, Any]) -> str | None:
    """What is wrong with the bytes at ``path`` (of that size and SHA-256), or None."""
    with path.open("rb") as stream:
        head = stream.read(256).lstrip().lower()
    if head.startswith((b"<!doctype html", b"<html")):
        return "is a web page, not the file"
    unpacked = None
    if file.path.endswith(".gz"):
        try:
            with gzip.open(path) as inner:
                unpacked = _hash(inner)  # reads to the end: gzip's own checksum is compared on the way
        except (OSError, EOFError, zlib.error) as error:
            return f"is not a whole gzip file ({error})"
    if file.of == "unpacked":
        if unpacked is None:
            raise CryobenchError(f"{file.path}: the manifest says 'of: unpacked' of a file that is not .gz; mend it")
        size_, digest_ = unpacked
    else:
        size_, digest_ = size, digest
    if file.size is not None and size_ != file.size:
        return f"has {size_} bytes where the manifest says {file.size}"
    if file.sha256 is not None and digest_ != file.sha256:
        return f"has SHA-256 {digest_} where the manifest says {file.sha256}"
    if file.sha256 is None and known.get("sha256", digest) != digest:
        return f"differs from the one got on {known.get('time')}; to accept it, delete {file.path} from {LOCK}"
    return None


def _place(part: Path, target: Path) -> None:
    """Move the whole, verified file to its name so that not even a power cut leaves half of it there."""
    with part.open("rb+") as stream:
        os.fsync(stream.fileno())
    os.replace(part, target)
    _sync_folder(target.parent)
    discard(part)  # the note beside it


def _record(data_dir: Path, file: RemoteFile, entry: str, source: dict[str, Any], size: int, digest: str) -> None:
    """Add a file to lock.json, atomically, also when several processes do so at once."""
    trusted = file.sha256 is None
    if trusted:
        _say(f"{entry}: no published checksum for {file.path}; trusted as it came, SHA-256 {digest} is in {LOCK}")
    with _exclusive(data_dir / f".{LOCK}.lock", LOCK):
        lock = read_lock(data_dir)
        lock[file.path] = {
            "entry": entry,
            **source,
            "size": size,
            "sha256": digest,
            "checked": "first use" if trusted else "manifest",
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        handle, name = tempfile.mkstemp(dir=data_dir, prefix=f".{LOCK}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                json.dump(lock, stream, indent=1, sort_keys=True)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(name, data_dir / LOCK)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        _sync_folder(data_dir)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _exclusive(path: Path, what: str) -> Iterator[None]:
    """Hold a file lock that the system drops when the process dies; the empty file stays (removing it would race)."""
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"{what}: another process is at it, waiting")
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _say(line: str) -> None:
    print(line, file=sys.stderr)
