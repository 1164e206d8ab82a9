"""Chapters of statistics and of the audit: rows beside published numbers, and notebooks that run with few records."""

from pathlib import Path

import numpy as np
import pytest
from test_report import HARD, record, write

from cryobench.bench.chapters import audit_rows
from cryobench.bench.notebooks import execute
from cryobench.bench.tables import load_table
from cryobench.paths import project_root


def test_every_published_row_is_audited_run_or_not(tmp_path: Path) -> None:
    for name, n in (("zhang2024", 16), ("tang2022", 8)):
        rows = audit_rows(load_table(name), "quick", str(tmp_path))
        assert len({(r["dataset"], r["label"]) for r in rows}) == n
        assert all(r["psnr_gap"] is None and r["fair_gap"] is None for r in rows)
        assert {r["state"] for r in rows} <= {"missing", "not built"}


def test_audit_takes_means_over_seeds_under_each_scoring(tmp_path: Path) -> None:
    made = [record("bm3d", level * HARD, seed) for seed, level in enumerate((0.01, 0.02))]
    for r, psnr, legacy in zip(made, (20.0, 24.0), (5.0, 5.5), strict=True):
        known = {"std": None, "n": 64, "ci95": [None, None]}
        r["metrics"] = {
            "fair": {"psnr": {"mean": psnr, **known}, "ssim": {"mean": 0.9, **known}},
            "legacy-zhang2024": {"psnr": {"mean": legacy, **known}, "ssim": {"mean": 0.4, **known}},
            "legacy-zhang2024-clipped": {"psnr": {"mean": None if psnr > 20 else 5.0, **known}},
        }
    rows = audit_rows(load_table("zhang2024"), "quick", str(write(tmp_path, *made)))
    row = next(r for r in rows if r["method"] == "bm3d" and r["specimen"] == "channel")
    assert (row["fair_psnr"], row["fair_gap"]) == (22.0, pytest.approx(4.963 - 22))
    assert (row["psnr_scoring"], row["psnr_ours"]) == ("legacy-zhang2024", 5.25)
    assert row["both"] == ["legacy-zhang2024"]
    # the other data set has no run: its stand-in stands there without one
    other = next(r for r in rows if r["method"] == "bm3d" and r["dataset"] == "EMD-24928")
    assert (other["specimen"], other["psnr_gap"], other["state"]) == ("transporter", None, "missing")


@pytest.mark.parametrize("name", ["statistics", "audit", "tables/zhang2024", "tables/tang2022"])
def test_chapters_run_without_records(name: str, tmp_path: Path) -> None:
    notebook = project_root() / "notebooks" / f"{name}.ipynb"
    execute(notebook, tmp_path / "out.ipynb", {"profile": "smoke", "results": str(tmp_path)})


def test_statistics_runs_on_records(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    made = [
        record(method, level * HARD * rng.gamma(9, 1 / 9, HARD.size), seed) | {"profile": "smoke"}
        for method, level in (("noisy", 0.1), ("bm3d", 0.01), ("ksvd", 0.012))
        for seed in range(3)
    ]
    notebook = project_root() / "notebooks" / "statistics.ipynb"
    execute(notebook, tmp_path / "out.ipynb", {"profile": "smoke", "results": str(write(tmp_path, *made))})
    assert "bm3d and ksvd" in (tmp_path / "out.ipynb").read_text()


def test_statistics_runs_on_equal_methods_and_on_single_images(tmp_path: Path) -> None:
    """No interval of one image, and none to divide by where two methods return the same."""
    made = [record(m, 0.01 * HARD[:16], seed) for m in ("bm3d", "ksvd") for seed in range(3)]
    made += [record(m, 0.01 * HARD[:1], seed, images="one") for m in ("gaussian", "mean") for seed in range(3)]
    folder = write(tmp_path, *(r | {"profile": "smoke"} for r in made))
    notebook = project_root() / "notebooks" / "statistics.ipynb"
    execute(notebook, tmp_path / "out.ipynb", {"profile": "smoke", "results": str(folder)})
    assert "dB between seeds (assumed)" in (tmp_path / "out.ipynb").read_text()
