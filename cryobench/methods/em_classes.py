"""What an image may be other than a view of the particle: something else as strong, or nothing at all.

Junk (ice, carbon, a broken particle) is taken for a Gaussian field with the particles' own power spectrum: as much
contrast at each frequency, but no shape. Of an empty box there is only noise. Whether an image is a view is then a
question of evidence, the integral of the likelihood over all poses against that of the other two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cryobench.methods.em_poses import Views

#: prior probability of junk, and of an empty box
RARE = 0.01


@dataclass(frozen=True)
class Classes:
    """Probabilities (n,) of the three, and the best estimate (n, m) of what junk shows, in units of slices."""

    view: Tensor
    junk: Tensor
    empty: Tensor
    filtered: Tensor


def ring_means(slices: Tensor, radius: Tensor) -> Tensor:
    """Mean power of slices (p, m) in each ring (rings,); radius (m,) of the coefficients, cycles per image."""
    ring = radius.round().long()
    count = torch.bincount(ring).clamp(min=1)
    return torch.zeros(len(count), device=slices.device).index_add_(0, ring, slices.abs().square().mean(0)) / count


def signal_power(views: Views) -> Tensor:
    """:func:`ring_means` of what the images show beside noise, from their own power."""
    gain2 = views.gain.square().mean(0)
    excess = views.data.abs().square().mean(0) - views.frame.multiplicity
    ring = views.frame.radius.round().long()
    total = torch.zeros(2, int(ring.max()) + 1, device=gain2.device)
    total[0].index_add_(0, ring, excess)
    total[1].index_add_(0, ring, gain2)
    return (total[0] / total[1].clamp(min=1e-30)).clamp(min=0)


def _strength(views: Views, power: Tensor) -> Tensor:
    """Variance of each real number of the signal, in units of the noise (n or 1, m)."""
    power = power[views.frame.radius.round().long().clamp(max=len(power) - 1)]
    return views.gain.square() * power / views.frame.multiplicity


def junk_evidence(views: Views, power: Tensor, m: int | None = None) -> Tensor:
    """Log likelihood (n,) of a Gaussian field with this power per ring, relative to that of noise alone, in the first m
    coefficients."""
    strength, energy = _strength(views, power)[:, :m], views.data[:, :m].abs().square()
    return (energy * strength / (1 + strength) - views.frame.multiplicity[:m] * torch.log1p(strength)).sum(1) / 2


def classify(views: Views, evidence: Tensor, power: Tensor, volume_of_poses: float) -> Classes:
    """What images show. evidence (n,): log of the likelihood's integral over poses, relative to that of noise alone;
    volume_of_poses: what it was integrated over, which the uniform prior divides it by; power: of the particles' slices
    (:func:`ring_means`)."""
    junk = junk_evidence(views, power) + math.log(RARE)
    view = evidence - math.log(volume_of_poses) + math.log(1 - 2 * RARE)
    empty = torch.full_like(view, math.log(RARE))
    weights = torch.softmax(torch.stack([view, junk, empty]), 0)
    # y = gain S + noise: the Wiener estimate of S
    strength = _strength(views, power)
    filtered = strength / (1 + strength) * views.data / views.gain.where(views.gain != 0, torch.inf)
    return Classes(weights[0], weights[1], weights[2], filtered)


def worth(excess: Tensor) -> Tensor:
    """Weights (n,) of images while the volume is still taking shape; excess (n,): log evidence of each being a view
    over that of being junk. A crude volume fits no view well, and the more signal an image has the more its evidence
    falls short of junk's, for some directions more than for others. So what counts little is only what is both, better
    explained as junk and far below the bulk of the images."""
    middle = excess.median()
    spread = 1.5 * (excess - middle).abs().median() + 1e-6
    return torch.sigmoid(torch.maximum(excess / 2 + 3, 2 * (excess - middle) / spread + 8))
