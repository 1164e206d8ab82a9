"""Two methods on the same images: distance to the limit, ranks, and the check that nobody beats the limit.

Records are compared where they have the same seed and the same hash of the test images, and nowhere else. ``found``
stands for the records of one method on one specimen, one a seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cryobench.bench import records
from cryobench.metrics.bootstrap import paired, ratio_db, told_apart

Found = list[dict[str, Any]]

#: rows that are no denoisers to choose from: what a number is read against. They are shown and not ranked
REFERENCE_ROWS = ("noisy", "blank", "shrink", "lowpass-oracle", "bayes")


def values(found: Found, convention: str, metric: str) -> list[np.ndarray]:
    """Per-image values, one array (n,) a seed; of the records that have them."""
    scores = [r["per_image"].get(convention, {}) for r in found]
    return [records.unpack(s[metric]).astype(np.float64) for s in scores if metric in s]


def shared(a: Found, b: Found) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Pairs of records, seed by seed, on the images that both were given; empty if there are none."""
    other = {_images(r): r for r in b}
    return [(r, other[_images(r)]) for r in a if _images(r) in other]


def together(a: Found, b: Found, metric: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Fair values of both, seed by seed, on the images that both were given; empty if there are none."""
    both = shared(a, b)
    return values([x for x, _ in both], "fair", metric), values([y for _, y in both], "fair", metric)


def difference(a: Found, b: Found, metric: str = "psnr") -> dict[str, Any] | None:
    """Mean of a - b with its paired interval; None if they share no images."""
    x, y = together(a, b, metric)
    return paired(x, y) if x else None


def excess(found: Found, limit: Found) -> dict[str, Any] | None:
    """By how many dB the mean squared error exceeds the limit's, with its paired interval; None without images."""
    x, y = together(found, limit, "mse")
    return ratio_db(x, y) if x else None


def beats_limit(found: Found, limit: Found) -> float | None:
    """By how many dB a method is better than the Bayes limit, where it is beyond error; otherwise None.

    No estimator's expected error is below that of the posterior mean, whatever it was fitted on. So the images are
    the units here, of all seeds together, and the interval of MSE(method) - MSE(limit) must reach up to zero. The
    limit's own error of computation (``mc_error`` of its fit, a part of its MSE) is granted.
    """
    x, y = (np.concatenate(v) if v else np.zeros(0) for v in together(found, limit, "mse"))
    if not x.size:
        return None
    granted = y.mean() * max(float(r.get("fit", {}).get("mc_error") or 0.0) for r in limit)
    high = paired(x, y)["ci95"][1]
    return float(10 * np.log10(y.mean() / x.mean())) if high is not None and high + granted < 0 else None


def ranks(methods: Mapping[str, Found]) -> dict[str, int]:
    """Rank of each method by fair PSNR: 1 + the number of methods that are better beyond error.

    Better beyond error: the paired interval of the difference leaves out zero. Methods that cannot be told apart
    share a rank; those on other images than most have none. Each pair is judged at 95 %: of twenty pairs of equal
    methods one is told apart by chance.
    """
    scored = [m for m, r in methods.items() if m not in REFERENCE_ROWS and values(r, "fair", "psnr")]
    company = {a: sum(bool(shared(methods[a], methods[b])) for b in scored) for a in scored}
    names = [m for m in scored if company[m] == max(company.values())]
    found = dict.fromkeys(names, 1)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            gap = difference(methods[a], methods[b])
            if gap and told_apart(gap):
                found[a if gap["mean"] < 0 else b] += 1
    return found


def _images(record: dict[str, Any]) -> tuple[int, str]:
    return record["seed"], record["provenance"]["data_hash"]
