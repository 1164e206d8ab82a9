"""Linear filters with reflected borders, and the choice of their width without the clean image.

An image continued by half-sample reflection is diagonalised, for every symmetric kernel, by the orthonormal DCT-II
(:mod:`cryobench.imaging.dct`). A filter is therefore one array of gains H(ky, kx), and both terms of Stein's unbiased
risk estimate are sums over coefficients (Stein, Ann. Stat. 9:1135, 1981). For y = x + n with white noise of variance
sigma^2 and N pixels,

    E |Hy - x|^2 = E [ |Hy - y|^2 + 2 sigma^2 trace(H) - N sigma^2 ].

The right-hand side needs no clean image; the width that makes it least is nearly the best one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cryobench.imaging.dct import dct2, frequencies, idct2


def kernel_gains(half_kernel: Tensor, n: int) -> Tensor:
    """Gains (n,) of a symmetric kernel given by its centre and one side, (r + 1,), of any reach r."""
    j = torch.arange(1, len(half_kernel), device=half_kernel.device)
    waves = torch.cos(2 * math.pi * frequencies(n, half_kernel.device)[:, None] * j)
    return half_kernel[0] + 2 * waves @ half_kernel[1:]


def separable(gains: Callable[[float, int], Tensor]) -> Callable[[float, int, int], Tensor]:
    """Turn gains(width, n) along one axis into gains(width, h, w) of an image."""
    return lambda width, h, w: gains(width, h)[:, None] * gains(width, w)[None, :]


def filter_images(
    images: Tensor, sigma: float, gains: Callable[[float, int, int], Tensor], width: float | None, grid: Sequence[float]
) -> Tensor:
    """Filter images (n, h, w); ``width=None`` takes the width of ``grid`` with the least Stein risk over the stack.

    gains(width, h, w) returns the gain of each DCT coefficient; sigma is the noise standard deviation in
    the images' units (only used for ``width=None``).
    """
    h, w = images.shape[-2:]
    coefficients = dct2(images)
    if width is None:
        power = coefficients.square().double().mean(0).cpu()
        risks = [stein_risk(power, gains(value, h, w).double(), sigma) for value in grid]
        width = grid[risks.index(min(risks))]
    return idct2(coefficients * gains(width, h, w).to(images.device))


def stein_risk(power: Tensor, gains: Tensor, sigma: float) -> float:
    """Estimated squared error per image: mean DCT power (h, w) of the noisy stack, gains (h, w), noise level."""
    return float(((1 - gains) ** 2 * power).sum() + sigma**2 * (2 * gains.sum() - gains.numel()))


def reflect(images: Tensor, margin: int) -> Tensor:
    """Continue images (n, h, w) by half-sample reflection; the margin may exceed the image."""
    for axis in (-2, -1):
        n = images.shape[axis]
        index = torch.arange(-margin, n + margin, device=images.device) % (2 * n)
        images = images.index_select(axis, torch.minimum(index, 2 * n - 1 - index))
    return images
