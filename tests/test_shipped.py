"""Committed records: they fill what was not run here, marked, and only what was made of committed code is shipped."""

import csv
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_report import HARD, noise, record, rows_of, write

from cryobench import paths
from cryobench.bench import book, records
from cryobench.bench.book import _runs, build_book
from cryobench.bench.experiment import Cell
from cryobench.bench.notebooks import without_origin
from cryobench.bench.plan import path_of, state_of, state_shown
from cryobench.bench.report import load_records, table_text
from cryobench.bench.runner import run_cells
from cryobench.bench.shipped import NOT_KEPT, _halved, ship, ship_weights, stripped
from cryobench.bench.tables import load_table
from cryobench.cli import main
from cryobench.errors import CryobenchError
from cryobench.methods import unet
from cryobench.paths import project_root

ELSEWHERE = {"device": "a cluster", "commit": "0123456789abcdef", "utc": "2026-11-20T10:00:00+00:00", "dirty": False}
PAIRS = 0.01 * HARD


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "shipped"
    folder.mkdir()
    monkeypatch.setenv("CRYOBENCH_SHIPPED", str(folder))
    return folder


def elsewhere(method: str, *given: Any, **changes: Any) -> dict[str, Any]:
    made = record(method, *given) | changes
    made["provenance"] |= ELSEWHERE
    return made


def test_committed_records_fill_what_was_not_run_here(tmp_path: Path, shipped: Path) -> None:
    own = write(tmp_path / "own", record("bm3d", 2 * PAIRS * noise()), record("cwf", PAIRS) | {"status": "failed"})
    write(shipped, elsewhere("bm3d", 4 * PAIRS), elsewhere("bm3d", 2 * PAIRS * noise(), 1), elsewhere("cwf", PAIRS))
    write(shipped, elsewhere("bayes", PAIRS), elsewhere("bayes", PAIRS, 1), elsewhere("ksvd", PAIRS, profile="smoke"))
    rows = rows_of(own)
    # its own record of seed 0, the committed one of seed 1; the limit is committed, and of the same images
    assert (rows["bm3d"]["seeds"], rows["bm3d"]["shipped"]) == ("0 1", "1")
    assert rows["bm3d"]["excess_db"] == pytest.approx(3.0, abs=0.2)
    assert rows["bm3d"]["limit_seeds"] == 2
    assert (rows["cwf"]["shipped"], rows["bayes"]["shipped"], rows["ksvd"]["shipped"]) == ("0", "0 1", None)
    # forged records are of other code than today's
    assert {rows[m]["state"] for m in ("bm3d", "cwf", "bayes")} == {"stale"}
    spec = load_table("zhang2024")
    assert len(load_records(spec, "quick", own)) == 6
    assert load_records(spec, "smoke", own) == []
    assert load_records(spec, "smoke", shipped / "nothing") == []


def test_committed_records_are_marked_in_every_form(tmp_path: Path, shipped: Path) -> None:
    own = write(tmp_path / "own", record("bm3d", 2 * PAIRS))
    unmarked = table_text("zhang2024", "quick", own)
    assert "*" not in unmarked
    write(shipped, elsewhere("ksvd", PAIRS), elsewhere("cwf", PAIRS))
    note = "*: committed record, made elsewhere (a cluster, commit 012345678, 2026-11-20); not run on this machine"
    text = table_text("zhang2024", "quick", own)
    assert f"\n{note}\n" in text
    assert [line.split()[0] for line in text.splitlines() if line.split()[:1] and "*" in line.split()[0]] == [
        "ksvd*", "cwf*", "*:"
    ]  # fmt: skip
    assert "on a machine" in text  # of the own record, not of the others
    page = table_text("zhang2024", "quick", own, "html", runs="runs")
    assert f'<p class="cryobench-note">{note}</p>' in page
    assert re_link("ksvd") + "ksvd*</a>" in page
    assert re_link("bm3d") + "bm3d</a>" in page
    latex = table_text("zhang2024", "quick", own, "latex")
    assert f"% {note}\n" in latex
    assert "ksvd* &" in latex
    parsed = json.loads(table_text("zhang2024", "quick", own, "json"))
    assert parsed["notes"] == [note]
    assert {r["method"]: r["shipped"] for r in parsed["rows"]["channel"] if r["seeds"]} == {
        "bm3d": None, "ksvd": "0", "cwf": "0"
    }  # fmt: skip
    listed = list(csv.DictReader(io.StringIO(table_text("zhang2024", "quick", own, "csv"))))
    assert {r["method"]: r["shipped"] for r in listed if r["seeds"]} == {"bm3d": "", "ksvd": "0", "cwf": "0"}


def re_link(method: str) -> str:
    return f'<a href="runs/zhang2024/channel__{method}__s0.html" title="the executed notebook">'


def test_status_names_them_and_a_run_does_not_count_them(
    tmp_path: Path, shipped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(shipped, elsewhere("noisy", PAIRS))
    cell = Cell("zhang2024", "channel", "noisy", "quick")
    state = state_shown(cell, tmp_path)
    assert (state.state, state.why[:7]) == ("shipped", "stale: ")
    assert state_of(cell, tmp_path).state == "missing"
    assert state_shown(Cell("zhang2024", "channel", "blank", "quick"), tmp_path).state == "missing"
    choice = ["zhang2024", "--specimen", "channel", "--method", "noisy", "--results", str(tmp_path / "none"), "--json"]
    assert main(["status", *choice]) == 0
    assert json.loads(capsys.readouterr().out)[0]["state"] == "shipped"
    said: list[str] = []
    run_cells([], tmp_path, "cpu", say=said.append)
    assert "0 of 0" in said[0]


def test_stripping_keeps_text_and_nothing_of_the_machine() -> None:
    def code(source: str, *outputs: dict[str, Any], tags: list[str] | None = None) -> dict[str, Any]:
        metadata = {"tags": tags or [], "papermill": {"start_time": "now"}}
        return {"cell_type": "code", "metadata": metadata, "source": source, "outputs": list(outputs), "id": source[:1]}

    def shown(**data: str) -> dict[str, Any]:
        return {
            "output_type": "display_data",
            "metadata": {},
            "data": {k.replace("_", "/"): v for k, v in data.items()},
        }

    stream = {"output_type": "stream", "name": "stdout", "text": "PSNR 20\n"}
    book = {
        "cells": [
            code('seed = 0\nresults = ""', tags=["parameters"]),
            code('seed = 1\nresults = "/disk/me/results"', tags=["injected-parameters"]),
            code("run()", stream, {**stream, "name": "stderr", "text": "/disk/me/lib.py: warning"}),
            code(
                "show()", shown(text_plain="<Figure>", image_png="iVBOR"), shown(text_html="<b>", text_plain="<HTML>")
            ),
            code("3", shown(text_plain="3")),
        ],
        "metadata": {"kernelspec": {"name": "python3"}, "papermill": {"output_path": "/disk/me/results/x.ipynb"}},
    }
    made = stripped(book)
    assert "/disk/me" not in json.dumps(made)
    assert [c["source"] for c in made["cells"]] == ['seed = 1\nresults = ""', "run()", "show()", "3"]
    outputs = [c["outputs"] for c in made["cells"]]
    assert outputs[1] == [stream]
    assert [o["data"] for o in outputs[2]] == [{"text/plain": NOT_KEPT}] * 2
    assert outputs[3][0]["data"] == {"text/plain": "3"}
    assert without_origin(made) == made
    assert set(made["metadata"]) == {"kernelspec"}


@pytest.fixture(scope="module")
def run_here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A method that learns nothing and one that is trained, in smoke; their records say that the code is committed."""
    results = tmp_path_factory.mktemp("here")
    cells = [Cell("zhang2024", "channel", m, "smoke") for m in ("shrink", "ksvd")]
    assert run_cells(cells, results, "cpu", say=lambda line: None) == []
    for cell in cells:
        made = records.read_record(path_of(cell, results))
        made["provenance"] |= {"dirty": False, "commit": "0123456789abcdef"}
        records.write_record(path_of(cell, results), made)
    return results


def changed(run_here: Path, folder: Path, **provenance: Any) -> Path:
    shutil.copytree(run_here, folder)
    path = path_of(Cell("zhang2024", "channel", "shrink", "smoke"), folder)
    made = records.read_record(path)
    made["provenance"] |= provenance
    records.write_record(path, made)
    return folder


def test_only_what_committed_code_makes_is_shipped(run_here: Path, tmp_path: Path) -> None:
    said: list[str] = []
    assert ship(run_here, tmp_path / "out", "smoke", said.append) == (2, 0)
    assert said == []
    copied = sorted(p.name for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert copied == [f"channel__{m}__s0.{end}" for m in ("ksvd", "shrink") for end in ("ipynb", "json")]
    for change, reason in (
        ({"dirty": True}, "uncommitted changes"),
        ({"commit": "unknown"}, "CRYOBENCH_COMMIT"),
        ({"key": "another"}, "out of date"),
        ({"device": f"{project_root()}/x"}, "names a folder of this machine"),
    ):
        folder = changed(run_here, tmp_path / reason, **change)
        assert ship(folder, tmp_path / "b" / reason, "smoke", said.append) == (1, 1)
        assert reason in said.pop()
    folder = tmp_path / "out of date"
    assert ship(folder, tmp_path / "c", "smoke", said.append, check=False) == (2, 0)
    assert ship(folder, tmp_path / "d", "smoke", said.append, ["transporter"]) == (0, 0)
    tool = [sys.executable, str(project_root() / "tools" / "ship_records.py")]
    made = subprocess.run(
        [*tool, str(tmp_path / "uncommitted changes"), "--to", str(tmp_path / "e")], capture_output=True, text=True
    )
    assert made.returncode == 0  # smoke records are not for shipping
    assert "0 records copied" in made.stdout


def test_weights_are_shipped_with_what_they_learned_from(
    run_here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = ship_weights(run_here, tmp_path / "weights", "smoke")
    assert [p.name for p in made] == ["ksvd-smoke.safetensors"]
    head = json.loads(made[0].with_suffix(".json").read_text())
    assert (head["origin"]["specimen"], head["origin"]["size"], head["origin"]["snr"]) == ("channel", 32, 0.1)
    for end in ("json", "safetensors"):
        made[0].with_suffix(f".{end}").rename(tmp_path / "weights" / f"ksvd-quick.{end}")
    from cryobench.methods import apply

    monkeypatch.setattr(apply, "project_root", lambda: tmp_path)
    stack, out = tmp_path / "s.mrcs", tmp_path / "o.mrcs"
    assert main(["simulate", "channel", "-o", str(stack), "-n", "4", "--size", "32"]) == 0
    assert main(["denoise", str(stack), "-m", "ksvd", "--weights", "shipped", "-o", str(out)]) == 0
    assert "shipped weights ksvd-quick: taught on channel at 32 px" in capsys.readouterr().err
    assert out.exists()
    assert main(["denoise", str(stack), "-m", "gaussian", "--weights", "shipped", "-o", str(out)]) == 1
    assert "no weights of gaussian are shipped; there are: ksvd-quick" in capsys.readouterr().err


def test_book_shows_committed_runs_last_and_says_so(
    run_here: Path, tmp_path: Path, shipped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("jupyter_book")
    ship(run_here, tmp_path / "out", "smoke", lambda line: None)
    table = shipped / "zhang2024" / "quick"
    table.mkdir(parents=True)
    for path in (tmp_path / "out" / "zhang2024" / "smoke").iterdir():
        for name in (path.name, path.name.replace("channel", "transporter")):
            target = table / name
            shutil.copyfile(path, target)
            if target.suffix == ".json":
                made = records.read_record(target)
                made |= {"profile": "quick", "specimen": name.split("__")[0]}
                records.write_record(target, made)
    results = tmp_path / "results" / "zhang2024" / "quick"
    results.mkdir(parents=True)
    for path in table.glob("transporter__shrink*"):
        shutil.copyfile(path, results / path.name)
    found = _runs(tmp_path / "results", "quick")
    # a run made here before the committed one of the specimen that the chapter prefers; no run twice
    assert [str(p.relative_to(tmp_path)).split("/")[0] for p in found["shrink"]] == ["results", "shipped"]
    assert [p.name.split("__")[0] for p in found["ksvd"]] == ["channel", "transporter"]
    assert _runs(tmp_path / "results", "smoke") == {}
    # the chapters of no method are not the matter here: a title is enough
    title = {"cell_type": "markdown", "id": "a", "metadata": {}, "source": "# Title"}
    stub = tmp_path / "stub.ipynb"
    stub.write_text(json.dumps({"cells": [title], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    monkeypatch.setattr(book, "_execute_chapters", lambda *given: dict.fromkeys(book._chapters(), stub))
    site = build_book("quick", tmp_path / "results", tmp_path / "book", lambda line: None).parent
    note = "This run was not made on this machine: it is a committed one, of commit 012345678"
    for page, expected in (("shrink", False), ("ksvd", True)):
        text = (site / "methods" / f"{page}.html").read_text()
        assert (note in text) is expected, page
        assert (NOT_KEPT in text) is expected or page == "shrink", page
    assert note in (site / "runs" / "zhang2024" / "channel__shrink__s0.html").read_text()


def test_an_empty_book_is_refused(tmp_path: Path, shipped: Path) -> None:
    with pytest.raises(CryobenchError, match="cryobench run"):
        build_book("quick", tmp_path, tmp_path / "out", lambda line: None)


def test_where_committed_records_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CRYOBENCH_SHIPPED")
    assert paths.shipped_dir() == project_root() / "results" / "shipped"
    assert paths.shipped_dir().is_dir()
    # what is committed is of a form that this version reads, and names no folder of anybody
    for path in paths.shipped_dir().glob("*/*/*.json"):
        made = records.read_record(path)
        assert path.with_suffix(".ipynb").exists(), path
        assert path == path_of(
            Cell(made["table"], made["specimen"], made["method"], made["profile"], made["seed"]), paths.shipped_dir()
        )
        assert not made["provenance"]["dirty"], path


def test_weights_in_half_precision_do_nearly_the_same(tmp_path: Path) -> None:
    method = unet.Method(unet.Method.config_for("smoke"), seed=3)
    method.state = method.fresh().state_dict()
    for weight in method.state.values():  # what starts at zero counts, too
        weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(weight)))
    method.save(tmp_path / "full")
    images = torch.randn(3, 33, 40, generator=torch.Generator().manual_seed(0))
    made = method.denoise(images, 1.0)
    method.state = {k: _halved(v) for k, v in method.state.items()}
    assert {v.dtype for v in method.state.values()} == {torch.float16}
    method.save(tmp_path / "half")
    assert (tmp_path / "half.safetensors").stat().st_size < 0.6 * (tmp_path / "full.safetensors").stat().st_size
    again = unet.Method.load(tmp_path / "half").denoise(images, 1.0)
    assert float((again - made).norm()) < 0.01 * float(made.norm())
    large = torch.tensor([1.0, 1e6])
    assert torch.equal(_halved(large), large), "too large for it"


def test_commit_of_a_copy_without_git_or_in_anothers(monkeypatch: pytest.MonkeyPatch) -> None:
    another: dict[str, str | None] = {"rev-parse": "fff", "status": ""}
    own = {**another, "cat-file": "commit", "status": " M file"}
    for git, given, expected in (
        ({}, "0123abc", {"commit": "0123abc", "dirty": False}),
        ({}, "0123abc-dirty", {"commit": "0123abc", "dirty": True}),
        ({}, "", {"commit": "unknown", "dirty": True}),
        (another, "0123abc", {"commit": "0123abc", "dirty": False}),
        (another, "", {"commit": "fff", "dirty": False}),
        (own, "0123abc", {"commit": "fff", "dirty": True}),  # left over from an earlier run
    ):
        monkeypatch.setattr(records, "_git", lambda verb, *rest, git=git: git.get(verb))
        monkeypatch.setenv("CRYOBENCH_COMMIT", given)
        assert {k: records.machine("cpu")[k] for k in ("commit", "dirty")} == expected
