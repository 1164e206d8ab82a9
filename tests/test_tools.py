"""new-method makes files that pass; doctor tells what there is."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
    assert main(["doctor", "--json"]) in (0, 1)
    rows = {r["what"]: r for r in json.loads(capsys.readouterr().out)}
    for name in ("torch", "numpy", "gemmi", "mrcfile"):
        assert rows[name]["state"] == "ok"
    assert rows["device"]["remark"]
    assert rows["cache"]["remark"]


def test_chapters_that_name_methods_depend_on_them():
    from cryobench.bench.keys import notebook_code
    from cryobench.paths import project_root

    folder = project_root() / "notebooks"
    assert "cryobench.methods.bayes" in notebook_code(folder / "limit.ipynb")
    assert "cryobench.methods.bayes" not in notebook_code(folder / "image-formation.ipynb")
