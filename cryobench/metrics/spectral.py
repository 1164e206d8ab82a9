"""Scores per ring of spatial frequency: correlation with a reference, power."""

from __future__ import annotations

import torch
from torch import Tensor

from cryobench.errors import CryobenchError
from cryobench.imaging.rings import correlation, resolution, ring_frequencies, ring_sums

__all__ = ["frc", "resolution", "ring_frequencies", "ring_power"]


def frc(x: Tensor, ref: Tensor) -> Tensor:
    """Fourier ring correlation of two stacks (n, h, w), over all images together; (min(h, w) // 2 + 1,).

    Re sum X conj(Y) / sqrt(sum |X|^2 sum |Y|^2) per ring (Saxton & Baumeister 1982), 0 where a ring is empty.
    """
    if x.ndim != 3 or x.shape != ref.shape:
        raise CryobenchError(f"two stacks of one shape are needed, not {tuple(x.shape)} and {tuple(ref.shape)}")
    cross = power_x = power_y = 0
    for a, b in zip(x.split(256), ref.split(256), strict=True):
        fx, fy = torch.fft.rfft2(a.double()), torch.fft.rfft2(b.to(a.device).double())
        cross = cross + (fx * fy.conj()).real.sum(0)
        power_x, power_y = power_x + fx.abs().square().sum(0), power_y + fy.abs().square().sum(0)
    shape = tuple(x.shape[1:])
    return correlation(*(ring_sums(torch.as_tensor(v), shape) for v in (cross, power_x, power_y)))


def ring_power(x: Tensor) -> Tensor:
    """Mean of |X|^2 / (h w) per ring over a stack (n, h, w): white noise has its variance in each ring."""
    shape = (int(x.shape[-2]), int(x.shape[-1]))
    power = sum(torch.fft.rfft2(part.double()).abs().square().sum(0) for part in x.split(256))
    power = torch.as_tensor(power) / (len(x) * shape[0] * shape[1])
    return ring_sums(power, shape) / ring_sums(torch.ones_like(power), shape)
