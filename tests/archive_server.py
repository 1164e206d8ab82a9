"""A local server that misbehaves in every way the archives' servers have been seen to, and downloads from it."""

import gzip
import hashlib
import random
import subprocess
import sys
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cryobench.errors import CryobenchError
from cryobench.specimens.fetch import fetch, read_lock
from cryobench.specimens.manifest import Entry, Licence, RemoteFile

PLAIN = random.Random(0).randbytes(400_000)
BODY = gzip.compress(PLAIN, mtime=0)
OTHER = gzip.compress(PLAIN[::-1], mtime=0)
HALF = len(BODY) // 2
SHA = hashlib.sha256(BODY).hexdigest()
NAME = "EMD-1/emd_1.map.gz"
#: a file that nothing but the protocol can protect: no checksum published, no gzip around it
BARE = {"sha256": None, "path": "EMD-1/1abc.cif"}
Reply = Callable[[BaseHTTPRequestHandler], None]


class Server(ThreadingHTTPServer):
    """Answers each request to a path with the next of its replies; the last one stays."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies: dict[str, list[Reply]] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.guards: list[str | None] = []  # the If-Range of each request
        self.sent = 0

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is part of the tests."""

    def url(self, path: str = "a") -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{path}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = self.path[1:]
        self.server.asked.append((path, self.headers.get("Range")))
        self.server.guards.append(self.headers.get("If-Range"))
        replies = self.server.replies[path]
        (replies.pop(0) if len(replies) > 1 else replies[0])(self)

    def log_message(self, *_: Any) -> None:
        pass


def honest(
    body: bytes = BODY,
    *,
    etag: str | None = '"one"',
    modified: str | None = None,
    stop: int | None = None,
    length: int | None = None,
    shift: int = 0,
    ranges: bool = True,
    if_range: bool = True,
    extra: bytes = b"",
    silent: bool = False,
    gap: float = 0.0,
) -> Reply:
    """A server's answer by the book, except where an argument says otherwise.

    stop: bytes of the file after which the connection is cut. length: a lie about the file's length.
    shift: a lie about where the range starts. if_range=False: goes on without comparing validators.
    extra: bytes sent after the promised range. silent: tells no length at all.
    Compresses on the way where the client allows it.
    """

    def reply(handler: BaseHTTPRequestHandler) -> None:
        wanted = handler.headers.get("Range") if ranges else None
        validator = handler.headers.get("If-Range")
        if wanted and if_range and validator not in (None, etag, modified):
            wanted = None
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        total = len(body) if length is None else length
        if wanted and start >= len(body):
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{len(body)}")
            return handler.end_headers()
        if "gzip" in handler.headers.get("Accept-Encoding", ""):
            return status(200, Content_Encoding="gzip")(handler)
        handler.send_response(206 if wanted else 200)
        if wanted:
            handler.send_header("Content-Range", f"bytes {start + shift}-{total - 1}/{'*' if silent else total}")
        if not silent:
            handler.send_header("Content-Length", str(total - start + len(extra)))
        if etag:
            handler.send_header("ETag", etag)
        if modified:
            handler.send_header("Last-Modified", modified)
        handler.end_headers()
        payload = body[start:stop] + extra
        handler.server.sent += len(payload)
        for first in range(0, len(payload), 50_000):
            handler.wfile.write(payload[first : first + 50_000])
            time.sleep(gap)

    return reply


def status(code: int, **headers: str) -> Reply:
    def reply(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()

    return reply


def entry(server: Server, *mirrors: str, **fields: Any) -> Entry:
    urls = tuple(server.url(path) for path in mirrors)
    file = RemoteFile(**{"path": NAME, "url": server.url(), "mirrors": urls, "sha256": SHA, **fields})
    return Entry("EMD-1", "map", "A map", (), (file,), Licence("CC0", True, ""), ())


def get(tmp_path: Path, wanted: Entry, waits: list[float], **options: Any) -> Path:
    (path,) = fetch(wanted, tmp_path, progress=False, sleep=waits.append, **options)
    return path


def refused(tmp_path: Path, wanted: Entry, waits: list[float], match: str) -> None:
    """The download fails with one line, and no wrong file is in place."""
    with pytest.raises(CryobenchError, match=match) as caught:
        get(tmp_path, wanted, waits)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / NAME).exists()
    assert read_lock(tmp_path) == {}


def leftovers(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "EMD-1").iterdir() if not path.name.startswith(".")}


SCRIPT = """
import resource, signal, sys
from pathlib import Path
from cryobench.errors import CryobenchError
from cryobench.specimens.fetch import fetch
from cryobench.specimens.manifest import Entry, Licence, RemoteFile
folder, name, url, sha256, limit = sys.argv[1:]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in a shell's background
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    file = RemoteFile(name, url, sha256=sha256)
    fetch(Entry("EMD-1", "map", "", (), (file,), Licence("", True, ""), ()), Path(folder), progress=False)
except CryobenchError as error:
    print("CryobenchError", error)
"""


def elsewhere(server: Server, tmp_path: Path, limit: int = 10**9) -> "subprocess.Popen[str]":
    """The same download in a process of its own; limit: the largest file it can write."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), NAME, server.url(), SHA, str(limit)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
