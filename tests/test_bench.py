"""The bench: keys, records, parameters of notebooks, plan, and runs that survive being killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from cryobench.bench import keys, records
from cryobench.bench.experiment import Cell, Experiment
from cryobench.bench.notebooks import NotebookError, check_parameters, execute, parameters_of
from cryobench.bench.plan import cells_of, path_of, state_of
from cryobench.bench.report import table_rows, table_text
from cryobench.bench.runner import run_cells
from cryobench.bench.tables import load_table, table_names
from cryobench.errors import BadFileError, CryobenchError
from cryobench.paths import project_root


def silent(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Two quick methods of zhang2024, run once in the smoke profile."""
    results = tmp_path_factory.mktemp("results")
    cells = cells_of(load_table("zhang2024"), "smoke", ["channel"], ["noisy", "shrink"])
    assert run_cells(cells, results, "cpu", say=silent) == []
    return cells, results


def test_digest_does_not_depend_on_order_but_on_every_value():
    a = {"x": 1, "y": {"a": [1, 2], "b": None}}
    assert keys.digest(a) == keys.digest({"y": {"b": None, "a": [1, 2]}, "x": 1})
    assert keys.digest(a) != keys.digest({"x": 1, "y": {"a": [2, 1], "b": None}})


def test_code_hash_follows_imports_and_ignores_comments(tmp_path, monkeypatch):
    package = tmp_path / "pack_a"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "one.py").write_text("from pack_a import two\n\n\ndef f():\n    return two.g()\n")
    (package / "two.py").write_text("def g():\n    return 1\n")
    (package / "other.py").write_text("X = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def now():
        keys._read.cache_clear()
        keys._file.cache_clear()
        return keys.code_hashes("pack_a.one")

    before = now()
    assert set(before) == {"pack_a", "pack_a.one", "pack_a.two"}
    (package / "two.py").write_text('"""Why."""\n\n\ndef g():\n    """One."""\n    # a comment\n    return 1\n')
    (package / "other.py").write_text("X = 2\n")
    assert now() == before
    (package / "two.py").write_text("def g():\n    return 2\n")
    after = now()
    assert after["pack_a.two"] != before["pack_a.two"]
    assert after["pack_a.one"] == before["pack_a.one"]


def test_code_hash_is_the_same_under_every_python(tmp_path):
    """Records made with one version count with another. Versions differ in generics, formats and empty fields."""
    path = tmp_path / "some.py"
    path.write_text(
        "class A:\n    x: int = 1\n\ndef f(a, /, *b, c=None, **d) -> str:\n"
        "    return f'{a!r:<{c}} {b}' 'tail' if a else lambda: -1.5\n"
    )
    digest, imports = keys._read(path, "some")
    assert digest == "0bd1070b1c50f3c3cc4ee458cc6da80cf8ccc96f2043b4335192f8de657edf72"
    assert imports == ()
    for change in (("'tail'", "''"), ("None", "0"), ("-1.5", "1.5")):
        path.write_text(path.read_text().replace(*change))
        keys._read.cache_clear()
        assert keys._read(path, "some")[0] != digest
        digest = keys._read(path, "some")[0]


def test_a_method_hash_does_not_depend_on_other_methods():
    names = set(Experiment(Cell("zhang2024", "channel", "shrink", "smoke")).inputs()["code"])
    assert "cryobench.methods.shrink" in names
    assert "cryobench.imaging.projection" in names
    assert not names & {"cryobench.methods.bm3d", "cryobench.cli", "cryobench.plots", "cryobench.bench.report"}


def test_tables_hold_all_published_numbers(shared):
    import csv

    with (shared / "papers" / "published.csv").open() as file:
        rows = [r for r in csv.DictReader(file) if r["paper"].startswith(("Zhang", "Tang"))]
    wanted = {(r["metric"].lower(), float(r["value"])) for r in rows if r["metric"] in ("MSE", "PSNR", "SSIM")}
    have = set()
    for name in ("zhang2024", "tang2022"):
        for row in load_table(name).published:
            have |= {(metric, value) for metric, value in row["metrics"].items()}
    assert wanted == have


def test_table_file_with_a_mistake_is_refused(tmp_path):
    content = yaml.safe_load((project_root() / "tables" / "zhang2024.yml").read_text())
    for change, message in (
        ({"profiles": {"smoke": {"size": 32}}}, "profiles must contain"),
        ({"methds": []}, "methds"),
        ({"published": [{"dataset": "x"}]}, "published.* must contain"),
    ):
        path = tmp_path / "bad.yml"
        path.write_text(yaml.safe_dump({**content, **change}))
        with pytest.raises(CryobenchError, match=message):
            load_table(str(path))
    with pytest.raises(CryobenchError, match="zhang2024"):
        load_table("zhang2042")
    assert {"zhang2024", "tang2022"} <= set(table_names())


def test_packed_values_come_back_exactly():
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    assert (records.unpack(records.pack(values)) == values).all()


def test_parameters_are_checked_before_launch(tmp_path):
    notebook = project_root() / "notebooks" / "methods" / "noisy.ipynb"
    known = parameters_of(notebook)
    assert set(known) == {"table", "specimen", "profile", "seed", "device", "results"}
    check_parameters(notebook, {"seed": 3})
    with pytest.raises(CryobenchError, match="sede"):
        check_parameters(notebook, {"sede": 3})
    with pytest.raises(CryobenchError, match="seed must be int"):
        check_parameters(notebook, {"seed": "3"})
    with pytest.raises(CryobenchError, match="seed"):
        execute(notebook, tmp_path / "out.ipynb", {"seed": 1.5})
    assert list(tmp_path.iterdir()) == []


def test_a_failing_cell_is_reported_with_its_last_line(tmp_path):
    source = {
        "cell_type": "code",
        "id": "a",
        "metadata": {},
        "source": ["1 / 0"],
        "outputs": [],
        "execution_count": None,
    }
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook = tmp_path / "bad.ipynb"
    notebook.write_text(json.dumps({"cells": [source], "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))
    with pytest.raises(NotebookError, match="ZeroDivisionError"):
        execute(notebook, tmp_path / "out.ipynb", {})


def test_records_are_complete_and_skipped_next_time(smoke):
    cells, results = smoke
    for cell in cells:
        record = records.read_record(path_of(cell, results))
        fair = record["metrics"]["fair"]
        values = records.unpack(record["per_image"]["fair"]["psnr"])
        assert len(values) == fair["psnr"]["n"] == 16
        assert values.mean() == pytest.approx(fair["psnr"]["mean"], abs=1e-4)
        low, high = fair["psnr"]["ci95"]
        assert low < fair["psnr"]["mean"] < high
        for field in ("commit", "data_hash", "torch", "device", "threads", "utc", "notebook_hash"):
            assert record["provenance"][field], field
        assert path_of(cell, results).with_suffix(".ipynb").exists()
        assert state_of(cell, results).state == "done"
    stamps = [path_of(c, results).stat().st_mtime_ns for c in cells]
    run_cells(cells, results, "cpu", say=silent)
    assert [path_of(c, results).stat().st_mtime_ns for c in cells] == stamps
    # killed between its record and its end: the notebook is made again
    notebook = path_of(cells[0], results).with_suffix(".ipynb")
    notebook.unlink()
    run_cells(cells, results, "cpu", say=silent)
    assert notebook.exists()
    assert path_of(cells[1], results).stat().st_mtime_ns == stamps[1]


def test_noisy_row_has_the_psnr_that_sigma_implies(smoke):
    cells, results = smoke
    record = records.read_record(path_of(cells[0], results))
    simulation = record["provenance"]["data"]["simulation"]
    experiment = Experiment(cells[0], "cpu")
    assert simulation["snr"] == 0.1
    assert record["metrics"]["fair"]["mse"]["mean"] == pytest.approx(experiment.test.sigma**2, rel=0.03)


def test_status_says_what_changed(smoke, tmp_path):
    cells, results = smoke
    record = records.read_record(path_of(cells[1], results))
    code = {**record["provenance"]["code"], "cryobench.methods.shrink": "other"}
    data = {**record["provenance"]["data"], "n_test": 17}
    record["provenance"] |= {"code": code, "data": data, "key": "other"}
    records.write_record(path_of(cells[1], tmp_path), record)
    state = state_of(cells[1], tmp_path)
    assert state.state == "stale"
    assert "code of methods.shrink" in state.why
    assert "n_test was 17, is 16" in state.why
    path_of(cells[1], tmp_path).write_text("{}")
    assert state_of(cells[1], tmp_path).state == "stale"
    with pytest.raises(BadFileError):
        records.read_record(path_of(cells[1], tmp_path))
    assert state_of(cells[0], tmp_path).state == "missing"


def test_one_failed_run_does_not_stop_the_others(tmp_path):
    bad = tmp_path / "broken.pdb"
    bad.write_text("HEADER    NOTHING\nEND\n")
    spec = load_table("zhang2024")
    cells = cells_of(spec, "smoke", [str(bad), "channel"], ["noisy"])
    failed = run_cells(cells, tmp_path / "results", "cpu", say=silent)
    assert [cell.specimen for cell, _ in failed] == [str(bad)]
    assert "broken.pdb" in failed[0][1]
    assert [state_of(c, tmp_path / "results").state for c in cells] == ["failed", "done"]


def test_table_shows_published_beside_measured(smoke):
    _, results = smoke
    rows = {r["method"]: r for r in table_rows(load_table("zhang2024"), "smoke", results)["channel"]}
    assert rows["bm3d"]["published_psnr"] == 4.963
    assert rows["sr3-post"]["mse"] is None
    assert rows["shrink"]["mse"] < rows["noisy"]["mse"]
    text = table_text("zhang2024", "smoke", results)
    assert "STAND-IN for HCN1 (EMD-8511)" in text
    assert "4.96" in text
    parsed = json.loads(table_text("zhang2024", "smoke", results, "json"))
    assert parsed["rows"]["channel"][0]["method"] == "noisy"
    csv_lines = table_text("zhang2024", "smoke", results, "csv").splitlines()
    assert len({line.count(",") for line in csv_lines}) == 1
    for form in ("html", "latex"):
        assert "4.96" in table_text("zhang2024", "smoke", results, form)


def test_killed_runs_give_the_records_of_an_undisturbed_one(tmp_path):
    """Five kill -9 at random moments, then one run to the end: same results as without."""
    command = [sys.executable, "-m", "cryobench", "run", "zhang2024", "--profile", "smoke", "--specimen", "channel"]
    command += ["--method", "noisy", "lowpass-oracle", "ksvd", "bm3d", "--device", "cpu"]
    methods = ("noisy", "lowpass-oracle", "ksvd", "bm3d")

    def run(name: str, seconds: float | None) -> None:
        environment = {**os.environ, "CRYOBENCH_CACHE": str(tmp_path / f"cache-{name}")}
        process = subprocess.Popen(
            [*command, "--results", str(tmp_path / name)],
            env=environment,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            assert process.wait(seconds) == 0
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            time.sleep(0.2)

    dice = random.Random(1)
    for _ in range(5):
        run("killed", dice.uniform(2, 9))
    run("killed", None)
    run("undisturbed", None)
    for method in methods:
        a, b = (
            records.result_of(
                records.read_record(path_of(Cell("zhang2024", "channel", method, "smoke"), tmp_path / name))
            )
            for name in ("killed", "undisturbed")
        )
        assert a == b, method
    assert not list(Path(tmp_path / "killed").rglob("*.part*"))


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_a_terminated_run_takes_its_notebooks_with_it(tmp_path):
    """SIGTERM to the command alone, as ``timeout`` and batch systems send it, and no kernel is left a moment later."""

    def ours() -> list[str]:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if str(tmp_path).encode() in (folder / "environ").read_bytes():
                    found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
        return found

    def wait(enough, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while not (met := enough()) and time.monotonic() < end:
            time.sleep(0.1)
        return met

    command = [sys.executable, "-m", "cryobench", "run", "zhang2024", "--profile", "smoke", "--specimen", "channel"]
    command += ["--method", "ksvd", "bm3d", "--jobs", "2", "--device", "cpu", "--results", str(tmp_path / "results")]
    process = subprocess.Popen(
        command,
        env={**os.environ, "CRYOBENCH_CACHE": str(tmp_path / "cache")},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert wait(lambda: sum("ipykernel" in line for line in ours()) == 2, 60)
    process.terminate()
    _, said = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "run the same command to go on" in said
    assert wait(lambda: not ours(), 10), ours()
    assert [p.name for p in (tmp_path / "results").rglob("*") if p.suffix == ".json"] == []
