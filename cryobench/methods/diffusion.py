"""Noise schedule and samplers of conditional diffusion, as functions of a network that predicts noise.

Notation of SR3 (Saharia et al., "Image super-resolution via iterative refinement", arXiv 2104.07636): y_0 is the clean
image, x the condition, eps white noise of variance 1, gamma_t = prod_{i <= t} (1 - beta_i) and

    y_t = sqrt(gamma_t) y_0 + sqrt(1 - gamma_t) eps.

A *level* is sqrt(gamma), from 1 (clean) down to almost 0 (noise); that number is what the network is told. The step
from one level to a higher one need not be one of the schedule's, so that a sampler may take fewer of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from cryobench.errors import CryobenchError

#: (y_t, level) -> the noise in y_t, same shape
NoisePredictor = Callable[[Tensor, float], Tensor]
SAMPLERS = ("ancestral", "ddim", "dpm")


def linear_schedule(steps: int, first: float, last: float) -> Tensor:
    """Levels sqrt(gamma_t) for t = 0..steps, float64, from 1 downwards; beta_t rises linearly from first to last."""
    beta = torch.linspace(first, last, steps, dtype=torch.float64)
    return torch.cat([beta.new_ones(1), (1 - beta).cumprod(0)]).sqrt()


def random_levels(schedule: Tensor, n: int) -> Tensor:
    """n levels (n,), float32: t uniform, then sqrt(gamma) uniform between its neighbours t - 1 and t (SR3).

    The n values of t are spread evenly from one random start, each still uniform: the loss varies less from batch to
    batch. Draws from torch's global generator.
    """
    steps = len(schedule) - 1
    t = (((torch.arange(n) + torch.rand(())) / n) * steps).long().clamp(max=steps - 1)
    high, low = schedule[t], schedule[t + 1]
    return (low + (high - low) * torch.rand(n, dtype=torch.float64)).float()


def noised(clean: Tensor, noise: Tensor, level: Tensor | float) -> Tensor:
    """y_t of that level from y_0 and eps."""
    level = torch.as_tensor(level, device=clean.device)
    return level * clean + (1 - level**2).sqrt() * noise


def fewer_levels(schedule: Tensor, steps: int) -> list[float]:
    """steps + 1 levels of the schedule, evenly spaced in t, in the order of sampling: from noise up to 1.

    Raises CryobenchError for more steps than the schedule has, or none.
    """
    if not 1 <= steps < len(schedule):
        raise CryobenchError(f"sampling takes 1 to {len(schedule) - 1} steps, not {steps}")
    return schedule[torch.linspace(len(schedule) - 1, 0, steps + 1).round().long()].tolist()


def walk(
    predict: NoisePredictor, start: Tensor, levels: Sequence[float], sampler: str, limits: tuple[float, float],
    generator: torch.Generator | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """The reverse process: after each step, y at the level reached and the clean image guessed on the way there.

    start: white noise of variance 1, of the shape of the images. levels: see :func:`fewer_levels`. limits: the guessed
    clean image is clamped to them. sampler: "ancestral" draws from q(y_s | y_t, y_0) with the guess as y_0 (SR3; the
    generator gives its noise); "ddim" adds none (Song et al., arXiv 2010.02502, eta = 0); "dpm" is DPM-Solver++(2M)
    (Lu et al., arXiv 2211.01095): as ddim, but the guess is extrapolated from the last two.
    Raises CryobenchError for another sampler.
    """
    if sampler not in SAMPLERS:
        raise CryobenchError(f"no sampler {sampler!r}; there are: {', '.join(SAMPLERS)}")
    y, last, last_width = start, None, 0.0
    for now, then in pairwise(levels):
        noise_now, noise_then = math.sqrt(1 - now**2), math.sqrt(max(0.0, 1 - then**2))
        guess = ((y - noise_now * predict(y, now)) / now).clamp(*limits)
        if sampler == "ancestral":
            share = 1 - (now / then) ** 2  # beta, where the two levels are neighbours in the schedule
            y = then * share / noise_now**2 * guess + now / then * (noise_then / noise_now) ** 2 * y
            if noise_then > 0:
                fresh = torch.randn(y.shape, generator=generator, device=y.device)
                y = y + noise_then / noise_now * math.sqrt(share) * fresh
        else:
            aim, width = guess, math.inf  # width: how much the log of the signal-to-noise ratio rises
            if noise_then > 0:
                width = math.log(then / noise_then) - math.log(now / noise_now)
                if sampler == "dpm" and last is not None:
                    aim = guess + width / (2 * last_width) * (guess - last)
            y = noise_then / noise_now * y + (then - now * noise_then / noise_now) * aim
            last, last_width = guess, width
        yield y, guess
