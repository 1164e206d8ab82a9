"""Downloads over connections that break, lie and change: ranges, validators, mirrors, lengths."""

import json
import time
from email.utils import formatdate
from pathlib import Path

import pytest
from archive_server import (
    BARE,
    BODY,
    HALF,
    NAME,
    OTHER,
    PLAIN,
    SHA,
    Server,
    entry,
    get,
    honest,
    leftovers,
    refused,
    status,
)

from cryobench.errors import CryobenchError
from cryobench.specimens import download
from cryobench.specimens.fetch import read_lock


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
    assert server.guards == ([None, '"one"'] if if_range else [None, '"one"', None])
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
    known = read_lock(tmp_path)[NAME]
    assert (known["url"], known.get("etag")) == (server.url("b"), None)  # not that of the first


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
