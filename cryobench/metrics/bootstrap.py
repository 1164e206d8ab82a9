"""Means with intervals: what a number is worth when test particles and training runs are samples.

An interval refers to a population, and which one depends on what was repeated:

* **One seed**: one training set, one fitted method, n test images. The units are the images, and the interval is for
  the mean over all images that *this* fitted method could be given. It says nothing about training it again.
* **Several seeds**: each has its own training set, its own fit and its own test images. The units are the seeds, each
  with all of its images, and the interval is for the mean over new seeds as well as new images. The images of one
  seed share its fit, so that 3 seeds of 256 images are not 768 experiments. The spread of the seeds' means holds the
  spread of their images already: resampling both would count it twice (Davison & Hinkley 1997, section 3.8).

Intervals are symmetric bootstrap-t intervals (Hall 1988, J. R. Stat. Soc. B 50:35; Efron & Tibshirani 1993, section
12.5): units are drawn with replacement, the deviation of each draw's mean is taken in that draw's own standard error,
and 95 % of these ratios, whatever their sign, lie within the factor that the interval has instead of 1.96. The
percentile bootstrap, simpler and better known, covers too rarely when the units are few; the equal-tailed bootstrap-t
does so where they have long tails, as paired differences can. Fewer than ``FEW`` units cannot be resampled in earnest:
then the factor is Student's, right for normal units, as means over the images of a seed nearly are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.special import stdtrit
from torch import Tensor

from cryobench.errors import CryobenchError

#: below this number of units the factor is Student's
FEW = 8
#: random numbers drawn at once
_CHUNK = 2**22

Sample = Tensor | np.ndarray
#: the values (n,) of one seed, or those of several seeds in a list
Samples = Sample | Sequence[Sample]
#: weighted means (b, c) of columns over n units -> (estimate, its standard error), each (b,)
_Statistic = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]


def summarise(values: Samples, seed: int = 0, resamples: int = 2000) -> dict[str, Any]:
    """``{mean, std, n, ci95: [low, high]}`` of per-image values: (n,), or a list of such, one a seed.

    mean is that of the seeds' means; std the sample standard deviation of all n values; ci95 the interval of the mean
    (see above), the same for the same ``seed`` of the resampling. What cannot be known is None: the spread of a single
    value, and any of them where the values are not finite (the PSNR of a perfect image).
    Raises CryobenchError where there is nothing to average.
    """
    groups = _groups(values)
    v = np.concatenate(groups)
    units = _units(groups)
    mean = float(units.mean())
    known = v.size > 1 and bool(np.isfinite(v).all())
    interval: list[float | None] = [None, None]
    if known and len(units) > 1:
        moved = units - mean
        low, high = _interval(np.stack([moved, moved**2], axis=1), _mean, seed, resamples)
        interval = [mean + low, mean + high]
    return {
        "mean": mean if math.isfinite(mean) else None,
        "std": float(v.std(ddof=1)) if known else None,
        "n": v.size,
        "ci95": interval,
    }


def paired(a: Samples, b: Samples, seed: int = 0, resamples: int = 2000) -> dict[str, Any]:
    """:func:`summarise` of a - b over the same images. The difference counts where ci95 leaves out 0.

    What an image has in common for a and b, such as how hard it is, drops out of the difference.
    """
    with np.errstate(invalid="ignore"):
        return summarise([x - y for x, y in _pairs(a, b)], seed, resamples)


def ratio_db(a: Samples, b: Samples, seed: int = 0, resamples: int = 2000) -> dict[str, Any]:
    """``{mean, n, ci95}`` in dB of 10 log10(mean a / mean b), for positive values of the same images.

    That is the ratio of means, not the mean of ratios: of errors a and b, by how many dB a's total is the larger.
    """
    pairs = _pairs(a, b)
    x, y = (_units([p[i] for p in pairs]) for i in (0, 1))
    found: dict[str, Any] = {"mean": None, "n": sum(p[0].size for p in pairs), "ci95": [None, None]}
    if not (np.isfinite(x).all() and np.isfinite(y).all() and x.mean() > 0 and y.mean() > 0):
        return found
    found["mean"] = 10 * math.log10(x.mean() / y.mean())
    if len(x) > 1:
        p, q = x / x.mean(), y / y.mean()
        low, high = _interval(np.stack([p, q, p * p, q * q, p * q], axis=1), _log_ratio, seed, resamples)
        found["ci95"] = [found["mean"] + low, found["mean"] + high]
    return found


def told_apart(summary: dict[str, Any]) -> bool:
    """Whether the interval of a difference leaves out zero."""
    low, high = summary["ci95"]
    return low is not None and not low <= 0 <= high


def _groups(values: Samples) -> list[np.ndarray]:
    several = isinstance(values, Sequence)
    groups = [np.asarray(v, dtype=np.float64).ravel() for v in (values if several else [values])]
    if not groups or not all(g.size for g in groups):
        raise CryobenchError("no values to average: the stack has no images")
    return groups


def _pairs(a: Samples, b: Samples) -> list[tuple[np.ndarray, np.ndarray]]:
    first, second = _groups(a), _groups(b)
    if [g.size for g in first] != [g.size for g in second]:
        sizes = [" + ".join(str(g.size) for g in groups) for groups in (first, second)]
        raise CryobenchError(f"paired values must belong to the same images: {sizes[0]} and {sizes[1]} were given")
    return list(zip(first, second, strict=True))


def _units(groups: list[np.ndarray]) -> np.ndarray:
    """What is independent: the images of one seed, or the means of several."""
    return groups[0] if len(groups) == 1 else np.array([g.mean() for g in groups])


def _interval(columns: np.ndarray, statistic: _Statistic, seed: int, resamples: int) -> tuple[float, float]:
    """95 % interval of a statistic of the column means of ``columns`` (units, c)."""
    n = len(columns)
    (estimate,), (error,) = statistic(columns.mean(axis=0, keepdims=True), n)
    if error == 0:
        factor = 0.0
    elif n < FEW:
        factor = stdtrit(n - 1, 0.975)
    else:
        estimates, errors = statistic(_resampled(columns, seed, resamples), n)
        some = errors > 1e-6 * error  # draws of one unit only, or of equal ones, have no standard error of their own
        factor = np.percentile(np.abs(estimates - estimate)[some] / errors[some], 95)
    return float(estimate - factor * error), float(estimate + factor * error)


def _mean(moments: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean from the columns v, v^2."""
    mean, square = moments.T
    return mean, np.sqrt(np.maximum(square - mean**2, 0) / (n - 1))


def _log_ratio(moments: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """10 log10(a / b) from the columns a, b, a^2, b^2, ab; the error is that of its linear part (delta method)."""
    a, b, aa, bb, ab = moments.T
    variance = aa / a**2 + bb / b**2 - 2 * ab / (a * b)  # of a_i / a - b_i / b, whose mean is 0
    return 10 * np.log10(a / b), 10 / math.log(10) * np.sqrt(np.maximum(variance, 0) / (n - 1))


def _resampled(columns: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """Column means (resamples, c) of draws of as many rows, with replacement."""
    n = len(columns)
    step = max(1, _CHUNK // n)
    parts = [_shares(n, min(step, resamples - i), seed, i) @ columns for i in range(0, resamples, step)]
    return np.concatenate(parts)


@lru_cache(maxsize=2)
def _shares(n: int, draws: int, seed: int, start: int) -> np.ndarray:
    """How often each of n units is in each draw, divided by n: (draws, n). The same for all values of a table."""
    drawn = np.random.default_rng([seed, start]).integers(0, n, (draws, n)) + n * np.arange(draws)[:, None]
    return np.bincount(drawn.ravel(), minlength=draws * n).reshape(draws, n) / n
