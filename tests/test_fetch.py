"""Downloads against a local server that misbehaves in every way the archives' servers have been seen to."""

import gzip
import hashlib
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cryobench.errors import CryobenchError
from cryobench.specimens import download
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


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()


@pytest.fixture
def waits() -> list[float]:
    return []


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


def test_plain_download_and_its_record(server: Server, tmp_path: Path, waits: list[float]) -> None:
    server.replies["a"] = [honest()]
    path = get(tmp_path, entry(server), waits)
    assert path == tmp_path / NAME
    assert path.read_bytes() == BODY
    assert leftovers(tmp_path) == {"emd_1.map.gz"}
    record = json.loads((tmp_path / "lock.json").read_text())[NAME]
    assert record.pop("time").endswith("+00:00")
    assert record == {
        "entry": "EMD-1",
        "url": server.url(),
        "etag": '"one"',
        "last_modified": None,
        "size": len(BODY),
        "sha256": SHA,
        "checked": "manifest",
    }
    get(tmp_path, entry(server), waits)
    get(tmp_path, entry(server), waits, verify=True)
    assert len(server.asked) == 1
    assert waits == []


def test_cut_connections_are_continued_where_they_stopped(server: Server, tmp_path: Path, waits: list[float]) -> None:
    server.replies["a"] = [honest(stop=100_000), honest(stop=HALF), honest(stop=300_000), honest()]
    assert get(tmp_path, entry(server, sha256=None), waits).read_bytes() == BODY
    assert [asked for _, asked in server.asked] == [None, "bytes=100000-", f"bytes={HALF}-", "bytes=300000-"]
    assert server.sent == len(BODY)  # not a byte twice
    assert len(waits) == 3
    assert all(0.5 <= wait <= 1 for wait in waits)  # every try brought bytes: the waits do not grow


def test_range_of_an_untold_total_is_measured_by_the_first_answer(
    server: Server, tmp_path: Path, waits: list[float]
) -> None:
    server.replies["a"] = [honest(PLAIN, stop=HALF), honest(PLAIN, silent=True, stop=300_000), honest(PLAIN)]
    assert get(tmp_path, entry(server, **BARE), waits).read_bytes() == PLAIN


def test_continued_by_the_next_call(server: Server, tmp_path: Path, waits: list[float]) -> None:
    server.replies["a"] = [honest(stop=HALF), status(503)]
    refused(tmp_path, entry(server), waits, r"503.*given up after 5 retries")
    assert leftovers(tmp_path) == {"emd_1.map.gz.part", "emd_1.map.gz.part.json"}
    assert [round(wait / 2**n, 1) <= 1 for n, wait in enumerate(waits)] == [True] * 5
    assert waits[-1] > waits[0]  # backs off
    server.replies["a"] = [honest()]
    assert get(tmp_path, entry(server), waits).read_bytes() == BODY
    assert server.asked[-1][1] == f"bytes={HALF}-"


def test_last_modified_protects_a_range_too(server: Server, tmp_path: Path, waits: list[float]) -> None:
    old, new = formatdate(1e9, usegmt=True), formatdate(1.1e9, usegmt=True)
    server.replies["a"] = [honest(PLAIN, etag='W/"x"', modified=old, stop=HALF), honest(OTHER, etag=None, modified=new)]
    assert get(tmp_path, entry(server, **BARE), waits).read_bytes() == OTHER
    assert server.guards == [None, old]  # a weak ETag is no guard


@pytest.mark.parametrize("if_range", [True, False])
def test_file_changed_between_attempts(server: Server, tmp_path: Path, waits: list[float], if_range: bool) -> None:
    new = honest(PLAIN[::-1], etag='"two"', if_range=if_range)
    server.replies["a"] = [honest(PLAIN, stop=HALF), new]
    assert get(tmp_path, entry(server, **BARE), waits).read_bytes() == PLAIN[::-1]
    assert server.guards == [None, '"one"'] if if_range else [None, '"one"', None]
    assert read_lock(tmp_path)[BARE["path"]]["etag"] == '"two"'


def test_mixture_without_validators_is_caught_by_the_checksum(
    server: Server, tmp_path: Path, waits: list[float]
) -> None:
    broken = bytes(HALF) + BODY[HALF:]  # first half wrong
    server.replies["a"] = [honest(broken, etag=None, stop=HALF), honest(etag=None)]
    assert get(tmp_path, entry(server), waits).read_bytes() == BODY
    assert [asked for _, asked in server.asked] == [None, f"bytes={HALF}-", None]


def test_no_validator_and_no_checksum_starts_again(server: Server, tmp_path: Path, waits: list[float]) -> None:
    server.replies["a"] = [honest(etag=None, stop=HALF), honest(etag=None)]
    assert get(tmp_path, entry(server, sha256=None), waits).read_bytes() == BODY
    assert [asked for _, asked in server.asked] == [None, None]


def test_range_ignored(server: Server, tmp_path: Path, waits: list[float]) -> None:
    server.replies["a"] = [honest(stop=HALF), honest(ranges=False)]
    assert get(tmp_path, entry(server), waits).read_bytes() == BODY
    assert server.asked[-1][1] == f"bytes={HALF}-"


def test_range_ignored_and_always_cut_gives_up(server: Server, tmp_path: Path, waits: list[float]) -> None:
    server.replies["a"] = [honest(ranges=False, stop=HALF)]
    refused(tmp_path, entry(server), waits, f"cut after {HALF} of {len(BODY)} bytes .given up")
    assert len(server.asked) == 1 + download.RETRIES  # only the first brought new bytes


@pytest.mark.parametrize("shift", [-1000, 1000])
def test_wrong_content_range_starts_again(server: Server, tmp_path: Path, waits: list[float], shift: int) -> None:
    server.replies["a"] = [honest(PLAIN, stop=HALF), honest(PLAIN, shift=shift)]
    assert get(tmp_path, entry(server, **BARE), waits).read_bytes() == PLAIN
    assert [asked for _, asked in server.asked] == [None, f"bytes={HALF}-", None]


def test_complete_part_of_a_killed_process(server: Server, tmp_path: Path, waits: list[float]) -> None:
    (tmp_path / "EMD-1").mkdir()
    (tmp_path / f"{NAME}.part").write_bytes(BODY)
    server.replies["a"] = [honest()]  # answers 416 to a range past the end
    assert get(tmp_path, entry(server), waits).read_bytes() == BODY
    assert server.sent == 0


def test_part_longer_than_the_file(server: Server, tmp_path: Path, waits: list[float]) -> None:
    server.replies["a"] = [honest(PLAIN, stop=HALF), status(404)]
    with pytest.raises(CryobenchError, match="404"):
        get(tmp_path, entry(server, **BARE), waits)
    (tmp_path / f"{BARE['path']}.part").write_bytes(PLAIN + b"more")
    server.replies["a"] = [honest(PLAIN)]
    assert get(tmp_path, entry(server, **BARE), waits).read_bytes() == PLAIN


def test_more_bytes_than_promised(server: Server, tmp_path: Path, waits: list[float]) -> None:
    server.replies["a"] = [honest(PLAIN, stop=HALF), honest(PLAIN, extra=b"more"), honest(PLAIN)]
    assert get(tmp_path, entry(server, **BARE), waits).read_bytes() == PLAIN


def test_compression_on_the_way_is_neither_wanted_nor_accepted(
    server: Server, tmp_path: Path, waits: list[float]
) -> None:
    server.replies["a"] = [honest(PLAIN)]
    assert get(tmp_path, entry(server, **BARE), waits).read_bytes() == PLAIN
    server.replies["a"] = [status(200, Content_Encoding="gzip")]
    refused(tmp_path / "2", entry(server, **BARE), waits, "Content-Encoding gzip")


@pytest.mark.parametrize(
    ("header", "low", "high"),
    [
        ("7", 7, 7),
        ("86400", download.LONGEST_WAIT, download.LONGEST_WAIT),
        ("date", 25, 31),
        ("past", 0, 0),
        ("soon", 0.5, 1),  # not a time: our own back-off
    ],
)
@pytest.mark.parametrize("code", [429, 503])
def test_retry_after(
    server: Server, tmp_path: Path, waits: list[float], header: str, low: float, high: float, code: int
) -> None:
    dates = {"date": formatdate(time.time() + 30, usegmt=True), "past": formatdate(1e9, usegmt=True)}
    server.replies["a"] = [status(code, Retry_After=dates.get(header, header)), honest()]
    assert get(tmp_path, entry(server), waits).read_bytes() == BODY
    assert len(waits) == 1
    assert low <= waits[0] <= high


def test_missing_file_goes_to_the_mirror_at_once(server: Server, tmp_path: Path, waits: list[float]) -> None:
    server.replies.update(a=[status(404)], b=[honest()])
    assert get(tmp_path, entry(server, "b"), waits).read_bytes() == BODY
    assert [path for path, _ in server.asked] == ["a", "b"]
    assert read_lock(tmp_path)[NAME]["url"] == server.url("b")
    assert waits == []


def test_mirror_continues_what_the_checksum_can_prove(server: Server, tmp_path: Path, waits: list[float]) -> None:
    server.replies.update(a=[honest(stop=HALF), status(404)], b=[honest(etag='"elsewhere"')])
    assert get(tmp_path, entry(server, "b"), waits).read_bytes() == BODY
    assert server.asked[-1] == ("b", f"bytes={HALF}-")


def test_mirror_without_a_checksum_starts_from_zero(server: Server, tmp_path: Path, waits: list[float]) -> None:
    server.replies.update(a=[honest(PLAIN, stop=HALF), status(404)], b=[honest(PLAIN[::-1])])  # the same ETag
    assert get(tmp_path, entry(server, "b", **BARE), waits).read_bytes() == PLAIN[::-1]
    assert server.asked[2:] == [("b", None)]


def test_all_addresses_fail(server: Server, tmp_path: Path, waits: list[float]) -> None:
    server.replies.update(a=[status(404)], b=[status(403)])
    refused(tmp_path, entry(server, "b"), waits, r"EMD-1: no address gave emd_1.map.gz\. .*/a: .*404.*; .*/b: .*403")


def test_nobody_listens(tmp_path: Path, waits: list[float]) -> None:
    gone = Server()
    wanted = entry(gone)
    gone.server_close()
    refused(tmp_path, wanted, waits, "no connection")


def test_length_promised_too_long(server: Server, tmp_path: Path, waits: list[float]) -> None:
    server.replies["a"] = [honest(length=len(BODY) + 10)]
    assert get(tmp_path, entry(server), waits).read_bytes() == BODY  # the checksum says it is whole: 416 ends it
    server.replies["b"] = [honest(length=len(BODY) + 10, ranges=False)]
    refused(tmp_path / "2", entry(server, url=server.url("b")), waits, r"cut after \d+ of \d+ bytes")


@pytest.mark.parametrize("sha256", [SHA, None])
def test_length_promised_too_short(server: Server, tmp_path: Path, waits: list[float], sha256: str | None) -> None:
    server.replies["a"] = [honest(length=len(BODY) - 10)]
    refused(tmp_path, entry(server, sha256=sha256), waits, "not a whole gzip file")
    assert leftovers(tmp_path) == set()


def test_size_of_the_manifest_is_compared_before_the_download(
    server: Server, tmp_path: Path, waits: list[float]
) -> None:
    server.replies["a"] = [honest()]
    refused(tmp_path, entry(server, size=5), waits, f"offers {len(BODY)} bytes where 5 are expected")
    assert leftovers(tmp_path) == set()


def test_wrong_bytes(server: Server, tmp_path: Path, waits: list[float]) -> None:
    server.replies.update(a=[honest(OTHER)], b=[honest(OTHER)])
    refused(tmp_path, entry(server), waits, f"has SHA-256 [0-9a-f]{{64}} where the manifest says {SHA}")
    assert leftovers(tmp_path) == set()
    server.replies["b"] = [honest()]
    assert get(tmp_path, entry(server, "b"), waits).read_bytes() == BODY


@pytest.mark.parametrize("name", [NAME, "EMD-1/1abc.cif"])
def test_web_page_instead_of_a_file(server: Server, tmp_path: Path, waits: list[float], name: str) -> None:
    server.replies["a"] = [honest(b"\n<!DOCTYPE html><html><body>Sorry</body></html>")]
    with pytest.raises(CryobenchError, match="is a web page, not the file"):
        get(tmp_path, entry(server, sha256=None, path=name), waits)
    assert leftovers(tmp_path) == set()


def test_checksum_of_the_unpacked_file(server: Server, tmp_path: Path, waits: list[float]) -> None:
    unpacked = {"of": "unpacked", "sha256": hashlib.sha256(PLAIN).hexdigest(), "size": len(PLAIN)}
    server.replies["a"] = [honest(gzip.compress(PLAIN, 1, mtime=5))]  # packed anew: other bytes, same content
    get(tmp_path, entry(server, **unpacked), waits)
    get(tmp_path, entry(server, **unpacked), waits)
    assert len(server.asked) == 1
    server.replies["a"] = [honest(OTHER)]
    refused(tmp_path / "2", entry(server, **unpacked), waits, "SHA-256")


def test_first_download_is_trusted_and_said_then_held_to(
    server: Server, tmp_path: Path, waits: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    server.replies["a"] = [honest()]
    path = get(tmp_path, entry(server, sha256=None), waits)
    assert f"no published checksum for {NAME}; trusted as it came, SHA-256 {SHA}" in capsys.readouterr().err
    assert read_lock(tmp_path)[NAME]["checked"] == "first use"
    path.unlink()
    server.replies["a"] = [honest(OTHER)]
    with pytest.raises(CryobenchError, match=r"differs from the one got on .*delete EMD-1/emd_1.map.gz from lock.json"):
        get(tmp_path, entry(server, sha256=None), waits)
    assert not path.exists()


def test_damage_is_found_and_mended(server: Server, tmp_path: Path, waits: list[float]) -> None:
    server.replies["a"] = [honest()]
    path = get(tmp_path, entry(server), waits)
    path.write_bytes(BODY[:-1])
    assert get(tmp_path, entry(server), waits).read_bytes() == BODY  # another size: seen at once
    path.write_bytes(BODY[:-1] + b"x")
    assert get(tmp_path, entry(server), waits, verify=True).read_bytes() == BODY
    assert leftovers(tmp_path) == {"emd_1.map.gz", "emd_1.map.gz.wrong"}


def test_file_put_there_by_hand_is_checked_and_recorded(server: Server, tmp_path: Path, waits: list[float]) -> None:
    (tmp_path / "EMD-1").mkdir()
    (tmp_path / NAME).write_bytes(BODY)
    get(tmp_path, entry(server), waits)
    assert server.asked == []
    assert read_lock(tmp_path)[NAME]["sha256"] == SHA
    assert read_lock(tmp_path)[NAME]["url"] is None


def test_a_checksum_published_later_is_applied(server: Server, tmp_path: Path, waits: list[float]) -> None:
    server.replies["a"] = [honest(OTHER)]
    get(tmp_path, entry(server, sha256=None), waits)
    server.replies["a"] = [honest()]
    assert get(tmp_path, entry(server), waits).read_bytes() == BODY


def test_broken_lock_file(server: Server, tmp_path: Path, waits: list[float]) -> None:
    (tmp_path / "lock.json").write_text("{")
    with pytest.raises(CryobenchError, match=r"lock.json: unreadable .*delete it"):
        get(tmp_path, entry(server), waits)


def test_too_little_room_is_said_before_the_download(
    server: Server, tmp_path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.replies["a"] = [honest()]
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    refused(tmp_path, entry(server), waits, r"0.4 MB to come, 0.0 MB free")
    assert leftovers(tmp_path) == set()


def test_disk_full_for_real(server: Server, tmp_path: Path, waits: list[float]) -> None:
    """A file-size limit of the system stands in for a full disk."""
    server.replies["a"] = [honest()]
    done = elsewhere(server, tmp_path, limit=HALF)
    assert done.wait(30) == 0
    assert done.stdout is not None
    said = done.stdout.read()
    assert said.startswith("CryobenchError")
    assert "cannot be written (File too large)" in said
    assert leftovers(tmp_path) == {"emd_1.map.gz.part", "emd_1.map.gz.part.json"}
    assert get(tmp_path, entry(server), waits).read_bytes() == BODY
    assert server.asked[-1][1] == f"bytes={HALF}-"


def test_interrupted_and_killed_leave_only_the_part(server: Server, tmp_path: Path, waits: list[float]) -> None:
    part = tmp_path / f"{NAME}.part"
    for number in (signal.SIGINT, signal.SIGKILL):
        server.replies["a"] = [honest(gap=1.0)]
        before = part.stat().st_size if part.exists() else 0
        process = elsewhere(server, tmp_path)
        deadline = time.monotonic() + 20
        while (not part.exists() or part.stat().st_size <= before) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(10) != 0
        assert leftovers(tmp_path) == {"emd_1.map.gz.part", "emd_1.map.gz.part.json"}
        assert read_lock(tmp_path) == {}
    kept = part.stat().st_size
    assert 0 < kept < len(BODY)
    server.replies["a"] = [honest()]
    assert get(tmp_path, entry(server), waits).read_bytes() == BODY
    assert server.asked[-1][1] == f"bytes={kept}-"


def test_two_processes_at_once_download_once(server: Server, tmp_path: Path) -> None:
    server.replies["a"] = [honest(gap=0.05)]
    crowd = [elsewhere(server, tmp_path) for _ in range(2)]
    assert [process.communicate(timeout=30)[0] for process in crowd] == ["", ""]
    assert [process.returncode for process in crowd] == [0, 0]
    assert (tmp_path / NAME).read_bytes() == BODY
    assert len(server.asked) == 1


def test_many_files_at_once_are_all_in_the_record(server: Server, tmp_path: Path, waits: list[float]) -> None:
    server.replies["a"] = [honest()]
    crowd = [
        threading.Thread(target=get, args=(tmp_path, entry(server, path=f"EMD-1/{n}.map.gz"), waits)) for n in range(8)
    ]
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join()
    assert set(read_lock(tmp_path)) == {f"EMD-1/{n}.map.gz" for n in range(8)}


def test_folder_entries_say_how_to_get_them(server: Server, tmp_path: Path, waits: list[float]) -> None:
    folder = Entry("EMPIAR-1", "movies", "", (), (), Licence("CC0", True, ""), (), directory="https://example.org/1/")
    with pytest.raises(CryobenchError, match=r"EMPIAR-1 is a folder .*https://example.org/1/ with .*`wget"):
        fetch(folder, tmp_path)


def test_progress_goes_to_stderr(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.replies["a"] = [honest()]
    fetch(entry(server), tmp_path)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "EMD-1 emd_1.map.gz: 100%" in captured.err
    assert "400k/400k" in captured.err
