"""Intervals are what they claim: simulated repeats cover the truth at the nominal rate."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from cryobench.errors import CryobenchError
from cryobench.metrics import bootstrap
from cryobench.metrics.bootstrap import FEW, paired, ratio_db, summarise, told_apart

REPEATS = 1000
#: three standard errors of a rate of 95 % in so many repeats
MARGIN = 3 * math.sqrt(0.05 * 0.95 / REPEATS)

#: shapes of per-image values with mean 0 and variance 1: (name, generator, sizes)
SHAPES: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "skewed": lambda rng, shape: rng.exponential(size=shape) - 1,
    "slightly skewed": lambda rng, shape: (rng.gamma(4, size=shape) - 4) / 2,
    "long-tailed": lambda rng, shape: rng.laplace(size=shape) / math.sqrt(2),
}


def coverage(intervals: list[list[float]], truth: float = 0.0) -> float:
    return float(np.mean([low <= truth <= high for low, high in intervals]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [16, 64, 256])
def test_one_seed_covers_at_the_nominal_rate(shape: str, n: int) -> None:
    values = SHAPES[shape](np.random.default_rng(0), (REPEATS, n))
    rate = coverage([summarise(v)["ci95"] for v in values])
    if (shape, n) == ("skewed", 16):
        # skewness 2, more than scores have (1.6 at most): 93.3 % in 4,000 repeats, where percentiles cover 89 %
        percentiles = [list(np.percentile(_means(v), [2.5, 97.5])) for v in values]
        assert coverage(percentiles) + 0.02 < rate < 0.95 + MARGIN
    else:
        assert abs(rate - 0.95) < MARGIN


def _means(v: np.ndarray) -> np.ndarray:
    return v[np.random.default_rng(0).integers(0, len(v), (1000, len(v)))].mean(axis=1)


def test_a_few_normal_values_cover_at_the_nominal_rate() -> None:
    for n in (2, 5, FEW - 1):
        values = np.random.default_rng(n).normal(size=(REPEATS, n))
        assert abs(coverage([summarise(v)["ci95"] for v in values]) - 0.95) < MARGIN
        # a tenth of the repeats against an independent Student interval
        for v in values[:100]:
            expected = stats.t.interval(0.95, n - 1, v.mean(), stats.sem(v))
            assert summarise(v)["ci95"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("shape", ["normal", "skewed"])
@pytest.mark.parametrize("effect", [0.0, 0.05, 1.0])
@pytest.mark.parametrize(("seeds", "n"), [(2, 64), (3, 16), (3, 256), (12, 64)])
def test_several_seeds_cover_whatever_the_effect_of_a_seed(shape: str, effect: float, seeds: int, n: int) -> None:
    """effect: standard deviation of what the images of a seed share, beside 1 of what they do not."""
    rng = np.random.default_rng(seeds)
    shared = effect * rng.normal(size=(REPEATS, seeds, 1))
    values = shared + SHAPES[shape](rng, (REPEATS, seeds, n))
    rate = coverage([summarise(list(v))["ci95"] for v in values])
    assert abs(rate - 0.95) < MARGIN


def test_pooling_the_images_of_seeds_or_resampling_them_twice_would_not_cover() -> None:
    """What the rule for seeds is for: the obvious alternatives fail where a seed has an effect."""
    rng = np.random.default_rng(0)
    values = 0.3 * rng.normal(size=(300, 3, 1)) + rng.normal(size=(300, 3, 64))
    assert coverage([summarise(v.ravel())["ci95"] for v in values]) < 0.7
    nested = []
    for v in values:
        seeds = rng.integers(0, 3, (400, 3))
        images = rng.integers(0, 64, (400, 3, 64))
        nested.append(list(np.percentile(v[seeds[:, :, None], images].mean((1, 2)), [2.5, 97.5])))
    assert coverage(nested) < 0.9
    assert coverage([summarise(list(v))["ci95"] for v in values]) > 0.92


@pytest.mark.parametrize("shape", ["normal", "skewed"])
@pytest.mark.parametrize(("seeds", "n"), [(1, 16), (1, 256), (3, 64)])
def test_equal_methods_are_told_apart_one_time_in_twenty(shape: str, seeds: int, n: int) -> None:
    """Two methods of equal mean on the same images: hard images are hard for both, seeds are lucky for either."""
    rng = np.random.default_rng(n)
    image = 3 * rng.normal(size=(REPEATS, seeds, n))
    luck = 0.5 * rng.normal(size=(2, REPEATS, seeds, 1)) if seeds > 1 else np.zeros((2, 1, 1, 1))
    a, b = (image + one + 0.5 * SHAPES[shape](rng, (REPEATS, seeds, n)) for one in luck)
    found = [told_apart(paired(list(x), list(y))) for x, y in zip(a, b, strict=True)]
    assert abs(np.mean(found) - 0.05) < MARGIN


@pytest.mark.parametrize("sizes", [(16,), (200,), (40, 40, 40)])
def test_ratio_of_means_covers_at_the_nominal_rate(sizes: tuple[int, ...]) -> None:
    """Errors of a method and of the limit on the same images: skewed, correlated, 3 dB apart in their means."""
    rng = np.random.default_rng(1)
    intervals = []
    for _ in range(REPEATS):
        limit = [rng.gamma(4, 0.25, n) for n in sizes]
        method = [2 * x * rng.gamma(9, 1 / 9, len(x)) for x in limit]
        intervals.append(ratio_db(method, limit)["ci95"])
    assert abs(coverage(intervals, 10 * math.log10(2)) - 0.95) < MARGIN


def test_ratio_of_means_is_not_the_mean_of_ratios() -> None:
    a, b = np.array([1.0, 4.0, 4.0]), np.array([1.0, 1.0, 2.0])
    assert ratio_db(a, b)["mean"] == pytest.approx(10 * math.log10(9 / 4))
    # the interval of the logarithm by the delta method, written out: a_i / a - b_i / b
    linear = a / 3 - b / (4 / 3)
    half = stats.t.ppf(0.975, 2) * stats.sem(linear) * 10 / math.log(10)
    low, high = ratio_db(a, b)["ci95"]
    assert (high - low) / 2 == pytest.approx(half)
    assert (high + low) / 2 == pytest.approx(ratio_db(a, b)["mean"])
    # scale of both: no matter
    assert ratio_db(7 * a, 7 * b)["ci95"] == pytest.approx([low, high])


def test_seeds_and_images_are_different_units() -> None:
    rng = np.random.default_rng(2)
    groups = [rng.normal(m, 1, 50) for m in (0.0, 1.0, 2.5)]
    found = summarise(groups)
    assert found["n"] == 150
    assert found["mean"] == pytest.approx(np.concatenate(groups).mean())
    assert found["std"] == pytest.approx(np.concatenate(groups).std(ddof=1))
    means = [g.mean() for g in groups]
    assert found["ci95"] == pytest.approx(stats.t.interval(0.95, 2, np.mean(means), stats.sem(means)), rel=1e-9)
    low, high = summarise(np.concatenate(groups))["ci95"]
    assert high - low < 0.2 * (found["ci95"][1] - found["ci95"][0])
    # one seed in a list is one seed
    assert summarise(groups[:1]) == summarise(groups[0])


def test_values_that_cannot_be_resampled_are_no_trouble() -> None:
    assert summarise(np.full(20, 0.25))["ci95"] == [0.25, 0.25]
    one_off = np.array([1.0] * 19 + [2.0])  # most draws of these hold no spread, or nearly none
    low, high = summarise(one_off)["ci95"]
    assert math.isfinite(low)
    assert math.isfinite(high)
    assert ratio_db(np.ones(9), np.zeros(9)) == {"mean": None, "n": 9, "ci95": [None, None]}
    assert not told_apart(summarise(np.array([1.0])))
    assert not told_apart(paired([np.array([1.0, math.inf])], [np.array([1.0, math.inf])]))
    for bad in (lambda: summarise([]), lambda: summarise([np.ones(3), np.ones(0)])):
        with pytest.raises(CryobenchError, match="no images"):
            bad()
    with pytest.raises(CryobenchError, match=r"3 \+ 4 and 4 \+ 3"):
        paired([np.ones(3), np.ones(4)], [np.ones(4), np.ones(3)])


def test_many_images_do_not_need_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws are made in pieces: the same interval as all at once, by the normal approximation."""
    shares = bootstrap._shares

    def small(n: int, draws: int, *rest: int) -> np.ndarray:
        assert n * draws <= 2**22
        return shares(n, draws, *rest)

    monkeypatch.setattr(bootstrap, "_shares", small)
    values = np.random.default_rng(3).normal(size=5000)
    low, high = summarise(values)["ci95"]
    half = 1.96 * values.std() / math.sqrt(5000)
    assert [low, high] == pytest.approx([values.mean() - half, values.mean() + half], abs=0.1 * half)
