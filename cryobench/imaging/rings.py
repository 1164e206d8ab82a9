"""Rings (and shells) of spatial frequency, shared by scores of images and of volumes.

Rings are one Fourier pixel of the shortest side wide: ring k holds the frequencies nearest to k / min(shape)
cycles per pixel, up to Nyquist, so that non-square images have round rings. Ring 0 is the mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cryobench.errors import CryobenchError


def ring_frequencies(shape: tuple[int, ...]) -> Tensor:
    """Centre of each ring in cycles per pixel, (min(shape) // 2 + 1,)."""
    return torch.arange(min(shape) // 2 + 1, dtype=torch.float64) / min(shape)


def ring_index(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Ring number and multiplicity of each coefficient of ``torch.fft.rfftn`` over 2D or 3D ``shape``.

    Both flat. Frequencies beyond the last ring get the number min(shape) // 2 + 1. The multiplicity is 2
    where the half transform stands for a conjugate pair, else 1.
    """
    *leading, last = shape
    squared = torch.fft.rfftfreq(last, dtype=torch.float64) ** 2
    for n in reversed(leading):
        squared = torch.fft.fftfreq(n, dtype=torch.float64).view(-1, *(1,) * squared.ndim) ** 2 + squared
    radius = squared.sqrt() * min(shape)
    index = radius.round().long().clamp(max=min(shape) // 2 + 1)
    x = torch.arange(last // 2 + 1)
    single = (x == 0) | (2 * x == last)
    weight = torch.where(single, 1.0, 2.0).to(torch.float64).expand(index.shape)
    return index.flatten(), weight.flatten()


def ring_sums(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Sum of real ``values`` (laid out as rfftn of ``shape``) per ring, over the full transform; (rings,)."""
    index, weight = ring_index(shape)
    rings = min(shape) // 2 + 1
    total = torch.zeros(rings + 1, dtype=torch.float64)
    return total.index_add_(0, index, values.detach().cpu().double().flatten() * weight)[:rings]


def correlation(cross: Tensor, power_x: Tensor, power_y: Tensor) -> Tensor:
    """cross / sqrt(power_x power_y), 0 where one of the powers is 0."""
    scale = (power_x * power_y).sqrt()
    return torch.where(scale > 0, cross / scale.where(scale > 0, 1.0), 0.0)


def resolution(curve: Tensor, pixel_size: float, shape: tuple[int, ...], threshold: float) -> float | None:
    """Angstrom at which a curve over rings of ``shape`` first falls below the threshold.

    Linear between rings, ring 0 (the mean) left out. A curve that never falls below is good to the last
    ring; one that starts below has no resolution: None. Common thresholds: 0.143 between two independent
    halves (Rosenthal & Henderson 2003), 0.5 against the truth.
    """
    values = [float(v) for v in curve]
    if len(values) != min(shape) // 2 + 1:
        raise CryobenchError(f"a curve over {tuple(shape)} has {min(shape) // 2 + 1} rings, not {len(values)}")
    if len(values) < 2 or not values[1] >= threshold:
        return None
    for k in range(2, len(values)):
        if values[k] < threshold:
            ring = k - 1 + (values[k - 1] - threshold) / (values[k - 1] - values[k])
            return pixel_size * min(shape) / ring
    return pixel_size * min(shape) / (len(values) - 1)
