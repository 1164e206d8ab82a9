"""One file over HTTP into NAME.part, continued where it stopped. Whether the bytes are right is for fetch.py.

NAME.part.json keeps the address and validators (ETag, Last-Modified) of those bytes: a range is asked for with
If-Range (RFC 9110, 13.1.5), so a file that changed on the server starts again instead of becoming a mixture.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryobench import __version__
from cryobench.errors import CryobenchError

if TYPE_CHECKING:
    import requests

RETRIES = 5  # in a row without one new byte
LONGEST_WAIT = 300.0  # seconds; a server may ask for hours
TIMEOUT = (15.0, 60.0)  # seconds to connect, and between two reads
CHUNK = 1 << 16
TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}


class Refused(Exception):
    """This address will not give the file."""


class _Interrupted(Exception):
    """Worth another try at the same address, after ``wait`` seconds where the server said how long."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class Got:
    """Where the bytes of a part came from; resumed: they came in more than one piece."""

    url: str
    etag: str | None
    last_modified: str | None
    resumed: bool


def download(
    url: str,
    part: Path,
    *,
    size: int | None,
    checkable: bool,
    bar: Any,
    session: requests.Session,
    sleep: Callable[[float], None],
) -> Got:
    """Complete ``part`` from ``url``, trying again as long as that brings new bytes.

    size: bytes the file has to have, if known. checkable: its checksum is known, so a part may be continued
    even where no validator protects it. bar: tqdm. Raises Refused where this address will not do,
    CryobenchError where no other would either (disk full). The part stays for the next call.
    """
    most = failures = 0
    while True:
        try:
            resumed = _attempt(url, part, size, checkable, bar, session)
            known = _known(part, url)
            return Got(url, known.get("etag"), known.get("last_modified"), resumed)
        except _Interrupted as error:
            failures = 1 if _length(part) > most else failures + 1
            most = max(most, _length(part))
            if failures > RETRIES:
                raise Refused(f"{error} (given up after {RETRIES} retries)") from error
            backoff = min(60.0, 2.0 ** (failures - 1)) * random.uniform(0.5, 1.0)
            pause = backoff if error.wait is None else error.wait
            bar.set_postfix_str(f"{error}, again in {pause:.0f} s")
            sleep(pause)
            bar.set_postfix_str("")


def discard(part: Path) -> None:
    """Remove a part and what is known of it."""
    part.unlink(missing_ok=True)
    _sidecar(part).unlink(missing_ok=True)


def _attempt(url: str, part: Path, size: int | None, checkable: bool, bar: Any, session: requests.Session) -> bool:
    """One request; True if it continued an earlier one."""
    import requests

    known = _known(part, url)
    validator = known.get("etag") or known.get("last_modified")
    have = _length(part) if validator or checkable else 0
    headers = {"User-Agent": f"cryobench/{__version__}", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if validator:
            headers["If-Range"] = validator
    try:
        response = session.get(url, headers=headers, stream=True, timeout=TIMEOUT)
    except (requests.ConnectionError, requests.Timeout) as error:
        raise _Interrupted(f"no connection ({type(error).__name__})") from error
    except requests.RequestException as error:
        raise Refused(f"{type(error).__name__}: {error}") from error
    with response:
        status, reply = response.status_code, response.headers
        if status in TRY_AGAIN:
            raise _Interrupted(f"the server answered {status} {response.reason}", _retry_after(reply))
        if status == 416 and have:
            if _content_range(reply) == (None, have):
                return True  # the part was complete already
            discard(part)
            raise _Interrupted("the stored part does not fit the file on the server", 0.0)
        if status == 206 and have:
            start, total = _content_range(reply)
            then, now = (known.get("etag"), known.get("total")), (_strong_etag(reply), total)
            changed = any(a and b and a != b for a, b in zip(then, now, strict=True))
            if start != have or changed:
                discard(part)
                raise _Interrupted(f"the server continued at {start}, not {have}, or with another file", 0.0)
            total = total or known.get("total")
        elif status == 200:
            length = reply.get("Content-Length", "")
            have, total = 0, int(length) if length.isdigit() else None
        else:
            raise Refused(f"the server answered {status} {response.reason}")
        if reply.get("Content-Encoding", "identity") != "identity" and not part.name.endswith(".gz.part"):
            raise Refused(f"the server sends it with Content-Encoding {reply['Content-Encoding']}")
        if size is not None and total is not None and total != size:
            raise Refused(f"the server offers {total} bytes where {size} are expected")
        _make_room(part, (total or 0) - have)
        if not have:
            part.write_bytes(b"")  # before the validators change: old bytes never get new validators
            modified = reply.get("Last-Modified")
            known = {"url": url, "total": total, "etag": _strong_etag(reply), "last_modified": modified}
            _sidecar(part).write_text(json.dumps(known))
        bar.reset(total=total)
        bar.update(have)
        _receive(response, part, total, bar)
    got = _length(part)
    if total is not None and got < total:
        raise _cut(got, total)
    if total is not None and got > total:
        discard(part)
        raise _Interrupted(f"the server sent {got} bytes where it promised {total}")
    return have > 0


def _cut(got: int, total: int | None) -> _Interrupted:
    return _Interrupted(f"the connection was cut after {got} of {total or 'unknown'} bytes")


def _receive(response: requests.Response, part: Path, total: int | None, bar: Any) -> None:
    """Append the body as it comes (never decoded: the checksum is of the bytes as served)."""
    from urllib3.exceptions import HTTPError

    stream = response.raw.stream(CHUNK, decode_content=False)
    with part.open("ab") as file:
        while True:
            try:
                chunk = next(stream, None)
            except (HTTPError, OSError) as error:
                raise _cut(file.tell(), total) from error
            if chunk is None:
                return
            try:
                file.write(chunk)
                file.flush()
            except OSError as error:
                raise CryobenchError(_no_room(part, str(error.strerror))) from error
            bar.update(len(chunk))


def _make_room(part: Path, missing: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if missing > free:
        raise CryobenchError(_no_room(part, f"{missing / 1e6:.1f} MB to come, {free / 1e6:.1f} MB free"))


def _no_room(part: Path, why: str) -> str:
    return f"{part}: cannot be written ({why}): free space or choose another --data-dir; what is there is continued"


def _retry_after(headers: Any) -> float | None:
    """Seconds to wait, from a number or an HTTP date, at most LONGEST_WAIT; None if not said."""
    said = headers.get("Retry-After", "").strip()
    if said.isdigit():
        return min(float(said), LONGEST_WAIT)
    try:
        when = parsedate_to_datetime(said)
    except ValueError:
        return None
    seconds = (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return min(max(seconds, 0.0), LONGEST_WAIT)


def _content_range(headers: Any) -> tuple[int | None, int | None]:
    """First byte and total length of 'bytes 5-9/10', 'bytes 5-9/*' or 'bytes */10'; None where not said."""
    found = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(?:(\d+)|\*)", headers.get("Content-Range", "").strip())
    if not found:
        return None, None
    start, total = found.groups()
    return int(start) if start else None, int(total) if total else None


def _strong_etag(headers: Any) -> str | None:
    """The ETag unless it is a weak one, which cannot guard a range."""
    etag = headers.get("ETag")
    return None if etag is None or etag.startswith("W/") else etag


def _length(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _sidecar(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _known(part: Path, url: str) -> dict[str, Any]:
    """What is known of a part that was begun at ``url``: another server's validators mean nothing here."""
    try:
        known = json.loads(_sidecar(part).read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) and known.get("url") == url else {}
