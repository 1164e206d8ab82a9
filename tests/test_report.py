"""Tables of forged records: pairs, ranks, the limit, and what each form shows."""

import csv
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cryobench.bench import comparison, records
from cryobench.bench.report import measured, table_rows, table_text
from cryobench.bench.tables import load_table
from cryobench.errors import CryobenchError

RNG = np.random.default_rng(0)
#: how hard each of 64 images is, for every method
HARD = RNG.gamma(9, 1 / 9, 64)


def record(method: str, mse: np.ndarray, seed: int = 0, images: str = "these", **fit: Any) -> dict[str, Any]:
    """A record of zhang2024 with these fair errors (n,)."""
    scores = {"mse": mse, "psnr": -10 * np.log10(mse), "ssim": 1 - mse, "psnr_fit": 1 - 10 * np.log10(mse)}
    statistic = {"mean": 0.0, "std": None, "n": len(mse), "ci95": [None, None]}
    legacy = {"mse": mse + 0.1, "psnr": -10 * np.log10(mse + 0.1), "ssim": 0 * mse}
    machine = dict.fromkeys("commit dirty package_version key code_hash notebook_hash python torch numpy".split(), "")
    simulation = {"size": 64, "pixel_size": 4.0, "snr": 0.1, "noise": "white", "ctf": False}
    return {
        "schema": records.VERSION,
        "table": "zhang2024",
        "specimen": "channel",
        "method": method,
        "seed": seed,
        "profile": "quick",
        "status": "done",
        "error": None,
        "config": {},
        "supervision": "sigma",
        "metrics": {"fair": dict.fromkeys(scores, statistic)},
        "per_image": {
            convention: {k: records.pack(v) for k, v in values.items()}
            for convention, values in (("fair", scores), ("legacy-zhang2024", legacy))
        },
        "spectral": {},
        "invention": {"noise_energy": 0.0123},
        "cost": {"fit_seconds": 1.0, "denoise_images_per_s": 2000.0, "peak_memory_mb": 1.0, "parameters": 7},
        "fit": fit,
        "provenance": machine
        | {"code": {}, "device": "a machine", "device_class": "cpu", "threads": 1, "utc": ""}
        | {"data_hash": f"{images} {seed}", "data": {"simulation": simulation, "n_test": len(mse)}},
    }


def write(folder: Path, *made: dict[str, Any]) -> Path:
    for r in made:
        path = records.record_path(folder, r["table"], r["profile"], r["specimen"], r["method"], r["seed"])
        records.write_record(path, r)
    return folder


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {r["method"]: r for r in table_rows(load_table("zhang2024"), "quick", folder)["channel"]}


def noise(spread: float = 0.05) -> np.ndarray:
    return RNG.gamma(spread**-2, spread**2, HARD.size)


def test_ranks_are_shared_where_the_paired_interval_holds_zero() -> None:
    hard = 0.01 * HARD
    found = {
        "ksvd": [record("ksvd", hard * 1.3 * noise())],
        "bm3d": [record("bm3d", hard * noise())],
        "cwf": [record("cwf", hard * noise())],
        "noisy": [record("noisy", hard * 0.1)],
        "sr3": [],
        "gan": [record("gan", hard * 0.01, images="others")],
    }
    # the tie is one: each of the pair is within its interval of the other, while both differ from K-SVD
    gap = comparison.difference(found["bm3d"], found["cwf"])
    assert gap["ci95"][0] < 0 < gap["ci95"][1]
    assert comparison.ranks(found) == {"ksvd": 3, "bm3d": 1, "cwf": 1}
    # 1.3 times the error is 1.1 dB, told apart by pairs only: the images differ by more among themselves
    assert (
        abs(np.median(found_psnr(found["ksvd"])) - np.median(found_psnr(found["bm3d"])))
        < found_psnr(found["bm3d"]).std()
    )


def found_psnr(found: list[dict[str, Any]]) -> np.ndarray:
    return comparison.values(found, "fair", "psnr")[0]


def test_only_the_same_images_are_paired() -> None:
    a = [record("bm3d", HARD, seed) for seed in (0, 1, 2)]
    b = [record("ksvd", 2 * HARD, 2), record("ksvd", 4 * HARD, 1, images="others"), record("ksvd", 8 * HARD, 5)]
    x, y = comparison.together(a, b, "mse")
    assert len(x) == len(y) == 1
    assert y[0] == pytest.approx(2 * x[0])
    assert comparison.difference(a, b[1:]) is None
    assert comparison.excess(a, b[1:]) is None
    assert comparison.beats_limit(a, b[1:]) is None


def test_excess_is_the_ratio_of_mean_errors(tmp_path: Path) -> None:
    method, limit = 0.02 * HARD * noise(), 0.01 * HARD
    rows = rows_of(write(tmp_path, record("bm3d", method), record("bayes", limit)))
    row = rows["bm3d"]
    assert row["excess_db"] == pytest.approx(10 * math.log10(method.mean() / limit.mean()), abs=1e-6)
    assert row["excess_db_low"] < 10 * math.log10(2) < row["excess_db_high"]
    # paired: far narrower than what the images' own spread gives to either mean
    assert row["excess_db_high"] - row["excess_db_low"] < 0.2 * (row["psnr_high"] - row["psnr_low"])
    assert rows["bayes"]["excess_db"] == 0
    assert rows["bayes"]["rank"] is None
    assert rows["ksvd"]["excess_db"] is None
    assert row["beats_limit_db"] is None


def test_a_method_below_the_limit_is_called_out(tmp_path: Path) -> None:
    folder = write(tmp_path, record("bm3d", 0.008 * HARD * noise()), record("bayes", 0.01 * HARD))
    row = rows_of(folder)["bm3d"]
    assert row["beats_limit_db"] == pytest.approx(-10 * math.log10(0.8), abs=0.1)
    line = f"zhang2024 channel bm3d beats the Bayes limit by {row['beats_limit_db']:.2f} dB: a bug in one of the two"
    assert f"\nWARNING: {line}\n" in table_text("zhang2024", "quick", folder)
    assert f"WARNING: {line}</p>" in table_text("zhang2024", "quick", folder, "html")
    assert f"% WARNING: {line}\n" in table_text("zhang2024", "quick", folder, "latex")
    assert json.loads(table_text("zhang2024", "quick", folder, "json"))["warnings"] == [line]
    listed = list(csv.DictReader(io.StringIO(table_text("zhang2024", "quick", folder, "csv"))))
    assert [r["method"] for r in listed if r["beats_limit_db"]] == ["bm3d"]


def test_the_check_of_the_limit_allows_for_chance_and_for_its_own_error(tmp_path: Path) -> None:
    limit = 0.01 * HARD
    assert comparison.beats_limit([record("bm3d", limit * noise(0.2))], [record("bayes", limit)]) is None
    close = [record("bm3d", 0.99 * limit * noise(0.001))]
    assert comparison.beats_limit(close, [record("bayes", limit)]) == pytest.approx(0.0436, abs=0.005)
    assert comparison.beats_limit(close, [record("bayes", limit, mc_error=0.001)]) is not None
    assert comparison.beats_limit(close, [record("bayes", limit, mc_error=0.02)]) is None
    # several seeds: every one of them must obey, so that their images count, not only their three means
    seeds = range(3)
    low = [record("bm3d", 0.97 * limit * (1 + 0.02 * s) * noise(0.01), s) for s in seeds]
    assert comparison.excess(low, [record("bayes", limit, s) for s in seeds])["ci95"][1] > 0
    assert comparison.beats_limit(low, [record("bayes", limit, s) for s in seeds]) is not None
    # other images: no verdict, and the table says so
    folder = write(tmp_path, record("bm3d", limit), record("bayes", 2 * limit, images="others"))
    text = table_text("zhang2024", "quick", folder)
    assert "WARNING: zhang2024 channel: not on the images of the bayes row, so not compared with it: bm3d" in text
    assert "beats" not in text


def test_a_comparison_on_some_of_the_seeds_is_called_out(tmp_path: Path) -> None:
    """The columns then speak of other images: PSNR of both seeds, dB above the limit of the shared one."""
    limit = 0.01 * HARD
    folder = write(
        tmp_path,
        *(record("bayes", limit, seed) for seed in (0, 1, 5)),
        record("bm3d", 2 * limit, 0),
        record("bm3d", 64 * limit, 2),
        record("ksvd", 2 * limit, 1),
        record("cwf", 2 * limit, 1, images="others"),
        *(record("gaussian", 2 * limit, seed) for seed in (0, 1)),
    )
    rows = rows_of(folder)
    assert rows["bm3d"]["excess_db"] == pytest.approx(10 * math.log10(2))
    assert {m: r["limit_seeds"] for m, r in rows.items() if r["seeds"]} == {
        "bayes": 3, "bm3d": 1, "ksvd": 1, "cwf": 0, "gaussian": 2
    }  # fmt: skip
    assert json.loads(table_text("zhang2024", "quick", folder, "json"))["warnings"] == [
        "zhang2024 channel: not on the images of the bayes row, so not compared with it: cwf",
        "zhang2024 channel bm3d compared with the limit on 1 of 2 seeds",
    ]


def test_several_seeds_widen_the_interval_to_new_fits(tmp_path: Path) -> None:
    levels = (0.01, 0.012, 0.015)
    one = rows_of(write(tmp_path / "one", record("bm3d", levels[0] * HARD)))["bm3d"]
    made = [record("bm3d", level * HARD, seed) for seed, level in enumerate(levels)]
    three = rows_of(write(tmp_path / "three", *made))["bm3d"]
    means = [found_psnr([r]).mean() for r in made]
    assert three["psnr"] == pytest.approx(np.mean(means))
    # Student's t of three means
    assert three["psnr_high"] - three["psnr"] == pytest.approx(4.3027 * np.std(means, ddof=1) / 3**0.5, rel=1e-4)
    assert three["psnr_high"] - three["psnr_low"] > 2 * (one["psnr_high"] - one["psnr_low"])
    assert (one["seeds"], one["n"], three["seeds"], three["n"]) == ("0", 64, "0 1 2", 192)


def test_stale_numbers_count_only_without_others() -> None:
    found = [record("bm3d", HARD, s) | {"stale": s == 0} for s in (2, 0, 1)]
    assert [r["seed"] for r in measured(found)] == [1, 2]
    assert [r["seed"] for r in measured(found[1:2])] == [0]
    assert measured([record("bm3d", HARD) | {"status": "failed", "stale": False}]) == []


def full_table(folder: Path) -> Path:
    """Every row of the table measured, with numbers as long as they get."""
    made = [record(m, 0.01 * (2 + k) * HARD * noise(0.5)) for k, m in enumerate(load_table("zhang2024").methods[:-1])]
    for r in made:
        r["invention"] |= {
            "snbr_scale_free": 12.345,
            "noise_passed": 0.0117,
            "noise_correlation": 0.25,
            "noise_correlation_null": 0.125,
        }
        r["cost"] |= {"fit_seconds": 480.0, "denoise_images_per_s": 123456.0}
        r["supervision"] = "clean-pairs"
    return write(folder, *made, record("bayes", 0.001 * HARD * noise(0.5)))


def test_the_default_table_fits_a_terminal_and_the_wide_one_has_all(tmp_path: Path) -> None:
    folder = full_table(tmp_path)
    text = table_text("zhang2024", "quick", folder)
    assert max(len(line) for line in text.splitlines()) <= 150
    line = next(line for line in text.splitlines() if line.startswith("bm3d"))
    assert re.search(r"\b4\.96 +0\.425 .*\d+\.\d\d±\d+\.\d\d .* 12\.\d\d +0\.0123 +480 +123456", line)
    for column in ("paper", "legacy", "fair", "fitted", "rank", "SNBR'", "dB above", "energy", "images"):
        assert column in text
    wide = table_text("zhang2024", "quick", folder, wide=True)
    assert "0.250" in wide
    assert "0.0117" in wide
    assert "0.0117" not in text
    assert "e-0" in wide
    assert "correlation" in wide
    # a record without the newer invention scores
    assert "SNBR'" not in "\n".join(
        table_text("zhang2024", "quick", write(tmp_path / "old", record("bm3d", HARD))).splitlines()[:-3]
    )


def test_training_speed_is_shown_where_something_was_trained(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain", record("bm3d", HARD))
    assert "MFU" not in table_text("zhang2024", "quick", plain, wide=True)
    on_cpu = write(tmp_path / "cpu", record("dncnn", HARD, images_per_second=64.0, mfu=None))
    text = table_text("zhang2024", "quick", on_cpu, wide=True)
    assert "MFU" not in text
    assert "training" in text
    made = [record("dncnn", HARD, seed, images_per_second=1000.0 + seed, mfu=0.31 + 0.02 * seed) for seed in (0, 1)]
    folder = write(tmp_path / "gpu", *made, record("bm3d", HARD))
    wide = table_text("zhang2024", "quick", folder, wide=True)
    assert "MFU" in wide
    line = next(line for line in wide.splitlines() if line.startswith("dncnn"))
    assert re.search(r" 1000 +32\.0% ", line)
    assert "MFU" not in table_text("zhang2024", "quick", folder)
    assert rows_of(folder)["dncnn"]["mfu"] == pytest.approx(0.32)
    assert rows_of(folder)["bm3d"]["train_images_per_s"] is None


def test_files_carry_numbers(tmp_path: Path) -> None:
    folder = full_table(tmp_path)
    listed = list(csv.DictReader(io.StringIO(table_text("zhang2024", "quick", folder, "csv"))))
    assert [r["method"] for r in listed] == load_table("zhang2024").methods
    words = {"specimen", "dataset", "stand_in_for", "method", "supervision", "seeds", "state", "shipped"}
    for row in listed:
        numbers = {k: float(v) for k, v in row.items() if k not in words and v}
        for key in ("psnr", "mse", "ssim", "psnr_fit", "excess_db", "legacy_psnr"):
            assert numbers[f"{key}_low"] <= numbers[key] <= numbers[f"{key}_high"]
    parsed = json.loads(table_text("zhang2024", "quick", folder, "json"))["rows"]["channel"]
    assert parsed[4]["psnr_low"] == pytest.approx(float(listed[4]["psnr_low"]))
    assert not any("±" in str(v) for row in parsed for v in row.values())


def test_html_links_runs_and_escapes(tmp_path: Path) -> None:
    folder = write(tmp_path, record("<b>", HARD), record("bm3d", HARD))
    page = table_text("zhang2024", "quick", folder, "html", runs="runs")
    assert '<a href="runs/zhang2024/channel__bm3d__s0.html"' in page
    assert "<b>" not in page
    assert page.count("<th>") == page.split("</tr>")[1].count("<td>")


def test_unknown_conventions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CryobenchError, match="legacy-zhang2024-sigma25"):
        table_text("zhang2024", "quick", tmp_path, convention="legacy-tang2022")
    assert "scored as legacy-zhang2024-clipped," in table_text(
        "zhang2024", "quick", tmp_path, convention="legacy-zhang2024-clipped"
    )
