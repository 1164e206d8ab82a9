"""Arithmetic on published numbers: do the columns of a table agree with each other?

All functions take ``published`` rows of a table's YAML file (``dataset``, ``method``, ``label``, ``metrics`` with
``mse``, ``psnr``, ``ssim`` where printed) and return plain rows for pages and tests.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any

from torch import Tensor

from cryobench.errors import CryobenchError
from cryobench.metrics.conventions import score

Row = dict[str, Any]

#: a published number counts as reproduced within 1 dB of PSNR and 0.05 of SSIM: the specimens are not the paper's
NEAR = {"psnr": 1.0, "ssim": 0.05}


def implied(published: Iterable[Row]) -> list[Row]:
    """What each printed MSE and PSNR says about the other, if the peak is 1.

    implied_psnr = -10 log10(MSE); difference = printed - implied PSNR, dB; implied_mse from the printed PSNR;
    ratio = implied_mse / MSE; rms = sqrt of the printed MSE, else of the implied one; rms_255 the same in grey
    levels of 255. jensen_violated: both columns cannot be means over images at peak 1, since the mean of
    -10 log10 is never below -10 log10 of the mean. None where a number is not printed.
    """
    rows = []
    for row in published:
        mse, psnr = row["metrics"].get("mse"), row["metrics"].get("psnr")
        implied_psnr = None if mse is None else -10 * math.log10(mse)
        implied_mse = None if psnr is None else 10 ** (-psnr / 10)
        difference = None if psnr is None or implied_psnr is None else psnr - implied_psnr
        known = mse if mse is not None else implied_mse
        rms = None if known is None else math.sqrt(known)
        rows.append(
            {k: row[k] for k in ("dataset", "method", "label")}
            | {
                "mse": mse,
                "psnr": psnr,
                "ssim": row["metrics"].get("ssim"),
                "implied_psnr": implied_psnr,
                "difference": difference,
                "implied_mse": implied_mse,
                "ratio": None if difference is None else 10 ** (-difference / 10),
                "rms": rms,
                "rms_255": None if rms is None else 255 * rms,
                # half a unit of the last printed digit moves the difference by less than 0.01 dB
                "jensen_violated": None if difference is None else difference < -0.01,
            }
        )
    return rows


def common_offset(published: Iterable[Row]) -> list[Row]:
    """Can one peak for all rows of a data set, unknown but the same, reconcile PSNR and MSE?

    With a peak P on the scale of the MSE, PSNR = 20 log10(P) - 10 log10(MSE) + J, where J >= 0 is the Jensen gap
    of averaging over images. That forces ``offset`` = 20 log10(P) to be at most the smallest difference of the
    data set (``peak`` = P); ``gap`` is the J that each row then needs. ``explained``: the gap is at most 1 dB,
    what errors that vary by a factor of about 4 from image to image give; more calls for another script.
    """
    rows = [r for r in implied(published) if r["difference"] is not None]
    least = {r["dataset"]: min(q["difference"] for q in rows if q["dataset"] == r["dataset"]) for r in rows}
    found = []
    for r in rows:
        offset = least[r["dataset"]]
        gap = r["difference"] - offset
        found.append(
            {k: r[k] for k in ("dataset", "method", "label")}
            | {"offset": offset, "peak": 10 ** (offset / 20), "gap": gap, "explained": gap <= 1}
        )
    return found


def rank_conflicts(published: Iterable[Row]) -> list[Row]:
    """Pairs of rows that MSE and PSNR rank differently: ``better_psnr`` has the larger MSE, by ``mse_ratio``."""
    rows = [r for r in implied(published) if r["difference"] is not None]
    found = []
    for a, b in combinations(rows, 2):
        first, second = (a, b) if a["psnr"] > b["psnr"] else (b, a)
        if a["dataset"] == b["dataset"] and first["mse"] > second["mse"] and first["psnr"] > second["psnr"]:
            found.append(
                {
                    "dataset": a["dataset"],
                    "better_psnr": first["method"],
                    "better_mse": second["method"],
                    "mse_ratio": first["mse"] / second["mse"],
                    "psnr_difference": first["psnr"] - second["psnr"],
                }
            )
    return found


def compare(published: Iterable[Row], method: str, other: str) -> list[Row]:
    """``other`` against ``method`` per data set: MSE (and dB) ratio, PSNR and SSIM difference.

    Two unrelated denoisers with nearly equal error share something that is not noise, such as an offset.
    """
    rows = implied(published)
    found = []
    for a in rows:
        for b in rows:
            if a["dataset"] == b["dataset"] and (a["method"], b["method"]) == (method, other):
                ratio = b["mse"] / a["mse"] if a["mse"] and b["mse"] else None
                found.append(
                    {
                        "dataset": a["dataset"],
                        "mse_ratio": ratio,
                        "mse_ratio_db": None if ratio is None else 10 * math.log10(ratio),
                        "psnr_difference": b["psnr"] - a["psnr"],
                        "ssim_difference": b["ssim"] - a["ssim"],
                    }
                )
    return found


def spread(published: Iterable[Row], methods: Iterable[str]) -> Row:
    """Range of PSNR (dB) and of rms error over some methods: {psnr: [low, high], rms: ..., rms_255: ...}.

    Raises CryobenchError where none of the methods is in the table.
    """
    wanted = set(methods)
    rows = [r for r in implied(published) if r["method"] in wanted and r["psnr"] is not None]
    if not rows:
        raise CryobenchError(f"the table has no published PSNR for {', '.join(sorted(wanted))}")
    return {key: [min(r[key] for r in rows), max(r[key] for r in rows)] for key in ("psnr", "rms", "rms_255")}


def predicted_mse(mean: float, variance: float, gain: float, center: float = 0.5) -> float:
    """MSE of a *perfect* denoiser whose input was scaled to its own [0, 1]: (c - m)^2 + (1 - a)^2 v.

    mean and variance m, v are those of the clean image scaled to [0, 1]; a is the gain that is left of it when
    the range of the noise takes up the scale; c is the mean of the fed image, near 0.5 where noise dominates.
    """
    return (center - mean) ** 2 + (1 - gain) ** 2 * variance


def explain_legacy(clean: Tensor, noisy: Tensor, published_mse: float | None = None) -> Row:
    """Does scaling the noisy images on their own explain a published MSE? On images (n, h, w) in one scale.

    Means over images of m and v (clean image scaled to [0, 1]), the gain a, the mean c of the fed images
    (``center``); :func:`predicted_mse` of these; ``perfect``: the legacy score of the clean images themselves
    taken as the output; ``blank``: MSE of a black output, m^2 + v. ``mean_needed``: the m at which the closed
    form gives the published MSE with these v, a and c, None if it cannot.
    """
    spread = (clean.amax((1, 2)) - clean.amin((1, 2))).double()
    if not (spread > 0).all():
        raise CryobenchError("a clean image is constant: it cannot be scaled to [0, 1]")
    unit = (clean - clean.amin((1, 2), keepdim=True)).double() / spread[:, None, None]
    mean, variance = float(unit.mean()), float(unit.var(dim=(1, 2), unbiased=False).mean())
    low, width = noisy.amin((1, 2)), (noisy.amax((1, 2)) - noisy.amin((1, 2))).double()
    gain = float((spread / width).mean())
    center = float(((clean.mean((1, 2)) - low) / width).mean())
    row: Row = {
        "mean": mean,
        "variance": variance,
        "gain": gain,
        "center": center,
        "predicted": predicted_mse(mean, variance, gain, center),
        "perfect": float(score("legacy-zhang2024", clean, clean, noisy)["mse"].mean()),
        "blank": float(unit.square().mean()),
        "mean_needed": None,
    }
    if published_mse is not None:
        rest = published_mse - (1 - gain) ** 2 * variance
        row |= {"published": published_mse, "mean_needed": center - math.sqrt(rest) if rest >= 0 else None}
    return row


def closest(published: Mapping[str, float], measured: Mapping[str, Mapping[str, float]]) -> Row:
    """Which scoring brings our own run of a method closest to its published row?

    published: metric -> printed value; measured: convention -> metric -> mean of our run. For psnr (dB) and ssim:
    ``METRIC_scoring`` with the smallest difference, ``METRIC_ours`` under it, ``METRIC_gap`` = published - ours.
    ``both``: the scorings that come within ``NEAR`` of both numbers at once. None, and [], where nothing is known.
    """
    row: Row = {}
    for metric in NEAR:
        gaps = {
            c: published[metric] - scores[metric]
            for c, scores in measured.items()
            if metric in published and metric in scores
        }
        best = min(gaps, key=lambda c: abs(gaps[c]), default=None)
        row[f"{metric}_scoring"] = best
        row[f"{metric}_ours"] = None if best is None else measured[best][metric]
        row[f"{metric}_gap"] = None if best is None else gaps[best]
    row["both"] = [
        c
        for c, scores in measured.items()
        if all(m in published and m in scores and abs(published[m] - scores[m]) <= near for m, near in NEAR.items())
    ]
    return row
