"""Means with intervals: what a number is worth when the test particles are a sample."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from cryobench.errors import CryobenchError

#: random numbers drawn at once
_CHUNK = 2**22


def summarise(values: Tensor | np.ndarray, seed: int = 0, resamples: int = 2000) -> dict[str, Any]:
    """``{mean, std, n, ci95: [low, high]}`` of per-image values (n,).

    std is the sample standard deviation; ci95 the percentile bootstrap interval of the mean (Efron &
    Tibshirani 1993, chapter 13), the same for the same seed. What cannot be known is None: the spread of a
    single value, and any of them where the values are not finite (the PSNR of a perfect image).
    """
    v = np.asarray(values, dtype=np.float64).ravel()
    if v.size == 0:
        raise CryobenchError("no values to average: the stack has no images")
    if v.size == 1 or not np.isfinite(v).all():
        mean = float(v.mean())
        return {"mean": mean if math.isfinite(mean) else None, "std": None, "n": v.size, "ci95": [None, None]}
    rng = np.random.default_rng(seed)
    step = max(1, _CHUNK // v.size)
    means = [
        v[rng.integers(0, v.size, (min(step, resamples - i), v.size))].mean(axis=1) for i in range(0, resamples, step)
    ]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return {
        "mean": float(v.mean()),
        "std": float(v.std(ddof=1)),
        "n": v.size,
        "ci95": [float(low), float(high)],
    }


def paired(a: Tensor | np.ndarray, b: Tensor | np.ndarray, seed: int = 0, resamples: int = 2000) -> dict[str, Any]:
    """:func:`summarise` of a - b over the same images (n,). The difference counts where ci95 leaves out 0."""
    a, b = np.asarray(a, dtype=np.float64).ravel(), np.asarray(b, dtype=np.float64).ravel()
    if a.shape != b.shape:
        raise CryobenchError(f"paired values must belong to the same images: {a.size} and {b.size} were given")
    with np.errstate(invalid="ignore"):
        return summarise(a - b, seed, resamples)
