"""What a download leaves: the right bytes or one line, a record, and a part to go on from."""

import gzip
import hashlib
import signal
import threading
import time
from pathlib import Path

import pytest
from archive_server import (
    BODY,
    HALF,
    NAME,
    OTHER,
    PLAIN,
    SHA,
    Server,
    elsewhere,
    entry,
    get,
    honest,
    leftovers,
    refused,
)

from cryobench.errors import CryobenchError
from cryobench.specimens import download
from cryobench.specimens.fetch import fetch, read_lock
from cryobench.specimens.manifest import Entry, Licence


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
