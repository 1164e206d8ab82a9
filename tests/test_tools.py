"""new-method makes files that pass; doctor tells what there is."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cryobench.bench import doctor
from cryobench.cli import main

ROOT = Path(__file__).parents[1]


@pytest.fixture
def copy(tmp_path):
    """A copy of the project that may be changed."""
    for name in ("cryobench", "tests", "tables", "notebooks", "data", "book"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "_build"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def run(copy: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(copy), "CRYOBENCH_CACHE": str(copy / "cache")}
    return subprocess.run([sys.executable, *arguments], cwd=copy, env=environment, capture_output=True, text=True)


def test_training_rate():
    command = ["tools/training_rate.py", "zhang2024", "sr3-post", "batch_size=4", "post_widths=[8, 16]"]
    done = run(ROOT, *command, "--profile", "smoke", "--device", "cpu", "--steps", "2", "60")
    assert done.returncode == 0, done.stderr
    assert "ms a step of 4 images" in done.stdout
    assert "on cpu" in done.stdout
    assert "unknown of the peak" in done.stdout


def test_a_study_measures_each_row_once_and_again_with_other_code(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    import study

    file = tmp_path / "rows.json"
    row = {"n": 3, "seed": 0, "key": "old code"}
    assert not study.known(file, row)
    study.add(file, row, {"gain": 1.0})
    study.add(file, {**row, "seed": 1}, {"gain": 2.0})
    assert study.known(file, row)
    assert not study.known(file, {**row, "key": "new code"})
    study.add(file, {**row, "key": "new code"}, {"gain": 3.0})
    kept = json.loads(file.read_text())["rows"]
    assert [(r["seed"], r["key"], r["gain"]) for r in kept] == [(1, "old code", 2.0), (0, "new code", 3.0)]


def test_rows_of_the_em3d_study_stay_below_the_limit():
    rows = json.loads((ROOT / "results" / "shipped" / "em3d.json").read_text())["rows"]
    fits = [row for row in rows if row["part"] != "start"]
    assert len(fits) > 20
    assert len(rows) > len(fits)
    for row in fits:
        low, high = row["gain"]["ci95"]
        assert low < row["gain"]["mean"] < high
        assert row["gain"]["mean"] < row["known_volume"]["mean"] < row["limit"]["mean"] + 0.05, row["key"]
        assert row["fit_seconds"] > 0
        assert row["machine"]["device"]


def test_rows_beside_relion_are_of_one_stack():
    rows = json.loads((ROOT / "results" / "shipped" / "relion.json").read_text())["rows"]
    assert [row["program"] for row in rows] == ["em3d", "RELION, initial", "RELION, refined"]
    stack = ("specimen", "n", "size", "snr", "symmetry", "seed")
    assert len({tuple(row[name] for name in stack) for row in rows}) == 1
    ours, first, refined = rows
    for row in rows:
        assert len(row["fsc"]) == row["size"] // 2 + 1
        assert row["fsc"][1] > 0.99  # each is the particle
        assert row["gain"]["ci95"][0] < row["gain"]["mean"] < row["gain"]["ci95"][1]
    assert refined["gain"]["mean"] > first["gain"]["mean"]
    assert refined["processor_seconds"] > first["processor_seconds"]
    assert ours["gain"]["mean"] > refined["gain"]["ci95"][1]  # what the chapter says


def test_a_new_method_passes_its_test_conformance_and_a_run(copy):
    made = run(copy, "-m", "cryobench", "new-method", "my-shrink")
    assert made.returncode == 0, made.stderr
    assert len(made.stdout.split()) == 3
    tests = run(
        copy,
        "-m",
        "pytest",
        "-q",
        "tests/test_my_shrink.py",
        "tests/test_conformance.py",
        "-k",
        "my_shrink or my-shrink",
    )
    assert tests.returncode == 0, tests.stdout
    done = run(
        copy,
        "-m",
        "cryobench",
        "run",
        "zhang2024",
        "--profile",
        "smoke",
        "--specimen",
        "channel",
        "--method",
        "my-shrink",
    )
    assert done.returncode == 0, done.stderr
    table = run(copy, "-m", "cryobench", "table", "zhang2024", "--profile", "smoke")
    assert "my-shrink" in table.stdout


@pytest.mark.parametrize("name", ["Bad Name", "bm3d", "class", "../x", ""])
def test_names_that_cannot_be_are_refused(name, capsys):
    assert main(["new-method", name]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_doctor_finds_what_the_package_needs(capsys):
    code = main(["doctor", "--json"])
    rows = {r["what"]: r for r in json.loads(capsys.readouterr().out)}
    assert code == any(r["state"] == "missing" for r in rows.values())
    for name in ("torch", "numpy", "gemmi", "mrcfile"):
        assert rows[name]["state"] == "ok"
    assert rows["device"]["remark"]
    assert rows["cache"]["remark"]


def test_doctor_fails_where_something_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "FREE_GB", 10**9)
    assert main(["doctor"]) == 1
    assert "1000000000 are needed" in capsys.readouterr().out


def test_chapters_that_name_methods_depend_on_them():
    from cryobench.bench.keys import notebook_code
    from cryobench.paths import project_root

    folder = project_root() / "notebooks"
    assert "cryobench.methods.bayes" in notebook_code(folder / "limit.ipynb")
    assert "cryobench.methods.bayes" not in notebook_code(folder / "image-formation.ipynb")
