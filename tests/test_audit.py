"""The published numbers are those of the papers, and their arithmetic is that of FACTS.md 0.1 and 0.3."""

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cryobench.errors import CryobenchError
from cryobench.metrics import audit
from cryobench.metrics.conventions import CONVENTIONS, score

TABLES = Path(__file__).parents[1] / "tables"


def published(name: str) -> list[dict[str, Any]]:
    return yaml.safe_load((TABLES / f"{name}.yml").read_text())["published"]


@pytest.mark.parametrize(("name", "paper"), [("zhang2024", "Zhang 2024"), ("tang2022", "Tang 2022")])
def test_every_published_number_is_in_the_table_once(name: str, paper: str, shared: Path) -> None:
    with open(shared / "papers" / "published.csv") as file:
        wanted = [
            (row["dataset"].split()[0] if paper.startswith("Zhang") else "any", row["metric"].lower(), row["value"])
            for row in csv.DictReader(file)
            if row["paper"].startswith(paper) and row["metric"] != "training time"
        ]
    found = [(r["dataset"], metric, value) for r in published(name) for metric, value in r["metrics"].items()]
    assert sorted((d, m, float(v)) for d, m, v in wanted) == sorted(found)
    labels = {r["label"].lower() for r in published(name)}
    assert len(labels) == len({r["method"] for r in published(name)}) == {"zhang2024": 8, "tang2022": 8}[name]


# data set, method, printed - implied PSNR, ratio of implied to printed MSE, rms: FACTS.md 0.1
FACTS = """
EMD-8511 bm3d -3.821 2.41 0.364
EMD-8511 ksvd -3.881 2.44 0.368
EMD-8511 cwf 0.273 0.94 0.115
EMD-8511 denoisegan -4.123 2.58 0.057
EMD-8511 robustgan -3.012 2.00 0.057
EMD-8511 noise2noise -2.660 1.84 0.042
EMD-8511 sr3-post -1.614 1.45 0.038
EMD-8511 sr3 1.384 0.73 0.101
EMD-24928 bm3d -3.713 2.35 0.278
EMD-24928 ksvd -3.777 2.39 0.281
EMD-24928 cwf 0.049 0.99 0.172
EMD-24928 denoisegan -4.480 2.81 0.064
EMD-24928 robustgan -5.010 3.17 0.059
EMD-24928 noise2noise -3.777 2.39 0.050
EMD-24928 sr3-post -3.338 2.16 0.046
EMD-24928 sr3 1.296 0.74 0.114
"""


def test_mse_against_psnr_in_zhang() -> None:
    rows = {(r["dataset"], r["method"]): r for r in audit.implied(published("zhang2024"))}
    facts = [line.split() for line in FACTS.split("\n") if line]
    assert len(facts) == len(rows) == 16
    for dataset, method, difference, ratio, rms in facts:
        row = rows[dataset, method]
        assert row["difference"] == pytest.approx(float(difference), abs=1e-3)
        assert row["ratio"] == pytest.approx(float(ratio), abs=6e-3)
        assert row["rms"] == pytest.approx(float(rms), abs=6e-4)
    assert sum(r["jensen_violated"] for r in rows.values()) == 12
    assert not rows["EMD-24928", "cwf"]["jensen_violated"]


def test_a_common_peak_does_not_save_zhang() -> None:
    rows = {(r["dataset"], r["method"]): r for r in audit.common_offset(published("zhang2024"))}
    assert rows["EMD-8511", "bm3d"]["offset"] == pytest.approx(-4.12, abs=0.01)
    assert rows["EMD-8511", "bm3d"]["peak"] == pytest.approx(0.62, abs=0.005)
    assert rows["EMD-24928", "bm3d"]["peak"] == pytest.approx(0.56, abs=0.005)
    assert rows["EMD-8511", "cwf"]["gap"] == pytest.approx(4.4, abs=0.05)
    assert rows["EMD-24928", "cwf"]["gap"] == pytest.approx(5.1, abs=0.05)
    assert rows["EMD-8511", "sr3"]["gap"] == pytest.approx(5.5, abs=0.05)
    assert rows["EMD-24928", "sr3"]["gap"] == pytest.approx(6.3, abs=0.05)
    assert all(r["gap"] >= 0 for r in rows.values())
    assert rows["EMD-8511", "bm3d"]["explained"]
    assert not rows["EMD-8511", "cwf"]["explained"]


def test_columns_of_zhang_rank_differently() -> None:
    conflicts = {
        (r["dataset"], r["better_psnr"], r["better_mse"]): r for r in audit.rank_conflicts(published("zhang2024"))
    }
    row = conflicts["EMD-8511", "sr3", "denoisegan"]
    assert row["mse_ratio"] == pytest.approx(3.1, abs=0.05)
    assert row["psnr_difference"] == pytest.approx(0.57, abs=0.005)
    consistent = [
        {"dataset": "d", "method": m, "label": m, "metrics": {"mse": e, "psnr": -10 * math.log10(e)}}
        for m, e in (("a", 0.1), ("b", 0.02), ("c", 0.3))
    ]
    assert audit.rank_conflicts(consistent) == []
    assert not any(r["jensen_violated"] for r in audit.implied(consistent))
    assert all(r["gap"] < 1e-9 for r in audit.common_offset(consistent))


def test_bm3d_and_ksvd_share_an_error_in_zhang() -> None:
    first, second = audit.compare(published("zhang2024"), "bm3d", "ksvd")
    assert first["mse_ratio"] - 1 == pytest.approx(0.021, abs=5e-4)
    assert second["mse_ratio"] - 1 == pytest.approx(0.027, abs=5e-4)
    assert first["ssim_difference"] == pytest.approx(-0.154)
    assert second["ssim_difference"] == pytest.approx(-0.231)
    cwf = audit.compare(published("zhang2024"), "denoisegan", "cwf")[0]
    assert cwf["mse_ratio"] == pytest.approx(4.0, abs=0.05)
    assert cwf["mse_ratio_db"] == pytest.approx(6.0, abs=0.05)
    assert cwf["psnr_difference"] == pytest.approx(-1.6, abs=0.05)


def test_smoothers_of_tang_agree_too_well() -> None:
    found = audit.spread(published("tang2022"), ["mean", "gaussian", "bilateral"])
    assert found["psnr"][1] - found["psnr"][0] == pytest.approx(0.04)
    assert found["rms_255"] == pytest.approx([76.7, 77.0], abs=0.05)
    assert found["rms"] == pytest.approx([0.301, 0.302], abs=5e-4)
    rows = {r["method"]: r for r in audit.implied(published("tang2022"))}
    assert rows["lowpass"]["rms_255"] == pytest.approx(52.8, abs=0.05)
    assert rows["gan-perceptual"]["implied_mse"] == pytest.approx(3.119e-3, rel=1e-3)
    assert rows["mean"]["difference"] is None
    assert audit.common_offset(published("tang2022")) == []
    with pytest.raises(CryobenchError):
        audit.spread(published("tang2022"), ["cwf"])


def particles(snr: float, n: int = 6, size: int = 96) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A disc with structure on an empty background, and the same in white noise."""
    g = torch.Generator().manual_seed(0)
    axis = torch.linspace(-1, 1, size)
    disc = (axis[:, None] ** 2 + axis**2 < 0.3).float()
    clean = disc * (0.5 + 0.5 * torch.rand(n, size, size, generator=g))
    sigma = float(clean.std()) / math.sqrt(snr)
    return clean, clean + sigma * torch.randn(clean.shape, generator=g), sigma


@pytest.mark.parametrize("snr", [0.4, 0.1, 0.05])
def test_closed_form_predicts_the_legacy_score_of_a_perfect_denoiser(snr: float) -> None:
    clean, noisy, _ = particles(snr)
    row = audit.explain_legacy(clean, noisy)
    assert row["predicted"] == pytest.approx(row["perfect"], rel=0.02)
    assert row["center"] == pytest.approx(0.5, abs=0.06)
    assert row["blank"] == pytest.approx(
        float(score("legacy-zhang2024", 0 * clean, clean, prepared=True)["mse"].mean())
    )


def test_legacy_scaling_alone_costs_a_perfect_denoiser_tens_of_dB() -> None:
    clean, noisy, sigma = particles(0.1)
    fed, _ = CONVENTIONS["legacy-zhang2024"].prepare(clean, noisy, sigma)
    unclipped = score("fair", clean + 1e-3, clean)
    legacy = score("legacy-zhang2024", clean, clean, noisy)
    assert unclipped["psnr"].min() > 59
    assert legacy["psnr"].max() < 12
    assert float(fed.mean()) == pytest.approx(0.5, abs=0.06)


def test_needed_mean_solves_the_closed_form() -> None:
    clean, noisy, _ = particles(0.1)
    row = audit.explain_legacy(clean, noisy, 0.1323)
    assert audit.predicted_mse(row["mean_needed"], row["variance"], row["gain"], row["center"]) == pytest.approx(0.1323)
    assert audit.explain_legacy(clean, noisy, 1e-6)["mean_needed"] is None
    # FACTS.md 0.2: v = 0.03-0.06 and a = 0.1-0.35 need m = 0.15-0.19 and 0.25-0.30
    low, high = audit.predicted_mse(0.19, 0.06, 0.1), audit.predicted_mse(0.15, 0.03, 0.35)
    assert [low, high] == pytest.approx([0.1323, 0.1323], abs=0.015)
    with pytest.raises(CryobenchError):
        audit.explain_legacy(torch.zeros(1, 4, 4), torch.rand(1, 4, 4))


def test_the_closest_scoring_is_found_for_each_number() -> None:
    measured = {
        "fair": {"psnr": 28.0, "ssim": 0.74},
        "legacy-a": {"psnr": 7.3, "ssim": 0.11},
        "legacy-b": {"psnr": 4.2, "ssim": 0.62},
        "legacy-c": {"psnr": 23.0},
    }
    row = audit.closest({"mse": 0.1, "psnr": 4.963, "ssim": 0.425}, measured)
    assert (row["psnr_scoring"], row["psnr_ours"], row["psnr_gap"]) == ("legacy-b", 4.2, pytest.approx(0.763))
    assert (row["ssim_scoring"], row["ssim_ours"], row["ssim_gap"]) == ("legacy-b", 0.62, pytest.approx(-0.195))
    assert row["both"] == []
    # near both numbers at once is another thing than near each somewhere
    assert audit.closest({"psnr": 7.5, "ssim": 0.62}, measured)["both"] == []
    assert audit.closest({"psnr": 7.5, "ssim": 0.14}, measured)["both"] == ["legacy-a"]
    nothing = {"psnr_scoring": None, "psnr_ours": None, "psnr_gap": None}
    nothing |= {"ssim_scoring": None, "ssim_ours": None, "ssim_gap": None, "both": []}
    assert audit.closest({"psnr": 20.0}, {}) == nothing
    assert audit.closest({"psnr": 20.0}, measured)["ssim_scoring"] is None
