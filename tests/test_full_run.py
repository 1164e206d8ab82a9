"""tools/full_run.sh: pieces that are stopped and go on, what is packed, and its exit codes."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from cryobench.bench import records
from cryobench.paths import project_root

#: stands for Python with cryobench: its runs last a minute until there were STOPPED of them, then end with CODE
STUB = """#!/usr/bin/env bash
echo "$*" >> "$LOG"
case "$*" in
  *"pip install"*) while [ "$1" != --target ]; do shift; done; mkdir -p "$2" ;;
  *"cryobench run"*) [ "$(grep -c 'cryobench run' "$LOG")" -gt "$STOPPED" ] || exec sleep 60; exit "$CODE" ;;
  *ship_records*) mkdir -p "$WORK/pack/records/zhang2024"; head -c 16000000 /dev/urandom > "$WORK/pack/records/x" ;;
  *status*) printf 'table state why\\na done \\nb missing \\n' ;;
esac
"""


def full_run(tmp_path: Path, **settings: object) -> tuple[int, str, list[str]]:
    """Exit code, output and what Python was called with."""
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    given = {"WORK": tmp_path / "work", "OUT": tmp_path / "out", "PYTHON": stub, "LOG": tmp_path / "log"}
    given |= {"PIECE": 1, "LIMIT": 60, "STOPPED": 0, "CODE": 0, **settings}
    done = subprocess.run(
        ["bash", str(project_root() / "tools" / "full_run.sh")],
        env={**os.environ, **{k: str(v) for k, v in given.items()}},
        capture_output=True,
        text=True,
        timeout=400,
    )
    return done.returncode, done.stdout + done.stderr, Path(given["LOG"]).read_text().splitlines()


def test_a_piece_is_stopped_and_the_next_goes_on(tmp_path: Path) -> None:
    code, said, calls = full_run(tmp_path, STOPPED=2, SEEDS="0,1", METHODS="noisy bm3d", JOBS=3)
    assert code == 0, said
    assert said.count("a piece of 1 s is over") == 2
    runs = [c for c in calls if "cryobench run" in c]
    assert [c.split("--seeds ")[1][0] for c in runs] == ["0", "0", "0", "1"]
    assert "run zhang2024 tang2022 --profile full" in runs[0]
    assert runs[0].endswith("--method noisy bm3d --device cuda --jobs 3")
    assert "1 of 2 cells are done" in said
    assert "b missing" in said
    # in parts that a courier with a limit takes, whole together
    parts = sorted((tmp_path / "out").glob("full-records.tgz.*"))
    assert [p.stat().st_size <= 15 * 2**20 for p in parts] == [True, True]
    whole = tmp_path / "whole.tgz"
    whole.write_bytes(b"".join(p.read_bytes() for p in parts))
    with tarfile.open(whole) as archive:
        assert {n.removeprefix("./") for n in archive.getnames()} >= {"x", "zhang2024"}
    # packages are installed once
    assert sum("pip install" in c for c in calls) == 1
    assert not any("pip install" in c for c in full_run(tmp_path, METHODS="noisy")[2][len(calls) :])


def test_time_is_up(tmp_path: Path) -> None:
    code, said, calls = full_run(tmp_path, STOPPED=99, PIECE=3, LIMIT=9)
    assert code == 3, said
    assert 1 <= sum("cryobench run" in c for c in calls) <= 3
    assert list((tmp_path / "out").glob("full-records.tgz.*"))


def test_failed_cells_do_not_stop_the_other_seeds(tmp_path: Path) -> None:
    code, _, calls = full_run(tmp_path, CODE=1)
    assert code == 1
    assert sum("cryobench run" in c for c in calls) == 3


@pytest.mark.slow
def test_a_run_of_pieces_gives_its_records(tmp_path: Path) -> None:
    (tmp_path / "work" / "site").mkdir(parents=True)
    (tmp_path / "work" / "site" / ".ready").touch()  # everything is installed here
    (tmp_path / "log").touch()
    results = tmp_path / "results"
    code, said, _ = full_run(
        tmp_path, PYTHON=sys.executable, PROFILE="smoke", TABLES="zhang2024", METHODS="ksvd cwf", SEEDS="0", PIECE=40,
        LIMIT=300, SPECIMENS="channel", DEVICE="cpu", RESULTS=results,
    )  # fmt: skip
    assert code == 0, said
    assert "2 of 2 cells are done" in said
    found = sorted((results / "zhang2024" / "smoke").glob("*.json"))
    assert [records.read_record(p)["method"] for p in found] == ["cwf", "ksvd"]
    assert (tmp_path / "out" / "smoke-weights.tgz.aa").exists()
