"""Diffusion: the schedule against its definition, the samplers against Gaussian data, where all is known."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from cryobench.errors import CryobenchError
from cryobench.methods.diffusion import SAMPLERS, fewer_levels, linear_schedule, noised, random_levels, walk

SCHEDULE = linear_schedule(2000, 1e-6, 1e-2)
NO_LIMITS = (-math.inf, math.inf)

# two neighbouring pixels, correlated; what the samplers must draw from
MEAN = torch.tensor([0.7, -0.4], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.9, 0.5], [0.5, 0.6]], dtype=torch.float64)


def covariance_at(level: float) -> Tensor:
    return level**2 * COVARIANCE + (1 - level**2) * torch.eye(2, dtype=torch.float64)


def exact(y: Tensor, level: float) -> Tensor:
    """E[eps | y_t] for the Gaussian above; y (n, 2)."""
    gain = torch.linalg.solve(covariance_at(level), COVARIANCE) * level  # both symmetric, they commute
    clean = MEAN + (y - level * MEAN) @ gain
    return (y - level * clean) / math.sqrt(1 - level**2)


def root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.sqrt()) @ vectors.T


def draw(sampler: str, steps: int, start: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    *_, (y, _) = walk(exact, start, fewer_levels(SCHEDULE, steps), sampler, NO_LIMITS, generator)
    return y


def starts(n: int) -> Tensor:
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_schedule_is_the_product_of_its_betas() -> None:
    gamma, product = SCHEDULE**2, 1.0
    assert gamma[0] == 1
    for t in range(1, 2001):
        product *= 1 - (1e-6 + (1e-2 - 1e-6) * (t - 1) / 1999)
        assert math.isclose(gamma[t], product, rel_tol=1e-9)
    assert 4e-5 < product < math.exp(-10)  # the betas sum to 10; the logarithm of 1 - beta is a little more


def test_random_levels_lie_between_neighbours_and_spread_over_all() -> None:
    torch.manual_seed(0)
    levels = torch.cat([random_levels(SCHEDULE, 16) for _ in range(2000)]).double()
    assert float(levels.max()) <= 1
    assert float(levels.min()) >= float(SCHEDULE[-1]) - 1e-7
    # t + u, uniform over 0..T where sqrt(gamma) is as SR3 draws it: where the schedule, made continuous, has the level
    place = torch.bucketize(-levels, -SCHEDULE).clamp(1, 2000)
    share = (SCHEDULE[place - 1] - levels) / (SCHEDULE[place - 1] - SCHEDULE[place])
    time = (place - 1 + share) / 2000
    gap = (time.sort().values - (torch.arange(len(time)) + 0.5) / len(time)).abs().max()
    assert float(gap) < 0.005
    for batch in time.reshape(-1, 16)[:50]:
        assert float(batch.sort().values.diff().max()) < 2 / 16 + 1e-3, "a batch spreads over all levels"


def test_noised_has_the_variance_it_should() -> None:
    clean, noise = torch.full((100_000,), 2.0), torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    y = noised(clean, noise, 0.6)
    assert math.isclose(float(y.mean()), 1.2, abs_tol=0.01)
    assert math.isclose(float(y.std()), 0.8, abs_tol=0.01)


def test_few_levels_are_the_schedules() -> None:
    assert fewer_levels(SCHEDULE, 2000) == SCHEDULE.flip(0).tolist()
    assert fewer_levels(SCHEDULE, 4) == SCHEDULE[[2000, 1500, 1000, 500, 0]].tolist()
    for steps in (0, 2001):
        with pytest.raises(CryobenchError, match="1 to 2000 steps"):
            fewer_levels(SCHEDULE, steps)


@pytest.mark.parametrize(("t", "s"), [(900, 899), (900, 300), (2000, 1000)])
def test_an_ancestral_step_is_the_posterior_of_the_forward_process(t: int, s: int) -> None:
    """With y_0 known, the step from y_t ends at q(y_s | y_0), as correlated with y_t as the forward process makes it;
    for neighbours its variance is the (1 - gamma_{t-1}) / (1 - gamma_t) beta_t of the SR3 code."""
    now, then, n = float(SCHEDULE[t]), float(SCHEDULE[s]), 400_000
    generator = torch.Generator().manual_seed(0)
    eps = torch.randn(n, generator=generator, dtype=torch.float64)
    start = now * 1.5 + math.sqrt(1 - now**2) * eps
    ((y, guess),) = walk(lambda y, level: eps, start, [now, then], "ancestral", NO_LIMITS, generator)
    assert torch.allclose(guess, torch.full_like(guess, 1.5))
    assert math.isclose(float(y.mean()), then * 1.5, abs_tol=0.01)
    assert math.isclose(float(y.var()), 1 - then**2, rel_tol=0.01)
    joint = float(((y - y.mean()) * (start - start.mean())).mean())
    assert math.isclose(joint, now / then * (1 - then**2), rel_tol=0.02, abs_tol=2e-3)
    if s == t - 1:
        left = y - y.mean() - joint / (1 - now**2) * (start - start.mean())
        beta = 1 - (now / then) ** 2
        assert math.isclose(float(left.var()), (1 - then**2) / (1 - now**2) * beta, rel_tol=0.02)


@pytest.mark.parametrize(("sampler", "steps"), [("ancestral", 2000), ("ddim", 200), ("dpm", 25)])
def test_samples_have_mean_and_covariance_of_the_data(sampler: str, steps: int) -> None:
    y = draw(sampler, steps, starts(20_000))
    assert torch.allclose(y.mean(dim=0), MEAN, atol=0.02)
    assert torch.allclose(torch.cov(y.T), COVARIANCE, atol=0.03)


def flow(y: Tensor, now: float, then: float) -> Tensor:
    """What deterministic sampling tends to with many steps. For Gaussian data it is known: what is so many standard
    deviations from the mean at one level is as many at the other."""
    turned = torch.linalg.solve(root(covariance_at(now)), root(covariance_at(then)))
    return then * MEAN + (y - now * MEAN) @ turned


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpm", 2)])
def test_fast_samplers_converge_to_the_exact_flow(sampler: str, order: int) -> None:
    """Between two levels, in even steps of the log of the signal-to-noise ratio, in which the orders are proved."""
    start = starts(500)
    errors = []
    for steps in (20, 40, 80):
        levels = torch.linspace(-2, 2, steps + 1, dtype=torch.float64).mul(2).sigmoid().sqrt().tolist()
        *_, (y, _) = walk(exact, start, levels, sampler, NO_LIMITS)
        errors.append(float((y - flow(start, levels[0], levels[-1])).square().mean().sqrt()))
    for coarse, fine in pairwise(errors):
        assert abs(math.log2(coarse / fine) - order) < 0.25, errors


def test_the_whole_way_ends_at_the_exact_flow() -> None:
    start = starts(500)
    for sampler, most in (("ddim", 0.01), ("dpm", 0.001)):
        gap = draw(sampler, 200, start) - flow(start, float(SCHEDULE[-1]), 1.0)
        assert float(gap.square().mean().sqrt()) < most


def test_who_draws_on_the_way() -> None:
    start = starts(50)
    for sampler in SAMPLERS:
        same = torch.equal(draw(sampler, 20, start, seed=1), draw(sampler, 20, start, seed=2))
        assert same == (sampler != "ancestral")
        assert torch.equal(draw(sampler, 20, start, seed=1), draw(sampler, 20, start, seed=1))
    with pytest.raises(CryobenchError, match="no sampler 'euler'"):
        draw("euler", 20, start)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guesses_and_result_keep_to_the_limits(sampler: str) -> None:
    steps = list(walk(exact, 3 * starts(200), fewer_levels(SCHEDULE, 20), sampler, (-0.5, 1.0), torch.Generator()))
    assert len(steps) == 20
    for _, guess in steps:
        assert float(guess.min()) >= -0.5
        assert float(guess.max()) <= 1.0
    assert torch.allclose(*steps[-1]), "the last step ends at the guess"
