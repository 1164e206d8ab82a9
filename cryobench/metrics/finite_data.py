"""The limit of a finite data set: how much of the Bayes limit is lost since the structure itself has to be estimated.

Let the poses of all n images be known. Of a structure within a sphere that fills the part f of its box there are then,
in shell k (cycles per box), 4 pi k^2 f real numbers to estimate by least squares from n * order slices; and since an
estimate with p numbers from n slices costs each slice p / n of sigma^2, ring k of a slice has the squared error

    e_k = 4 pi k^2 f sigma^2 / (n order),        in all (4 pi / 3) k_max^3 f sigma^2 / (n order).

Where the structure's own power in the ring, s_k, is less than that, its mean is the better estimate. A Wiener filter
leaves e_k s_k / (e_k + s_k): never more than either. To it comes the error of the posterior over poses
(:mod:`cryobench.methods.bayes`), at least 3 sigma^2 an image. With unknown poses the volume is known less well, so that
the sum is a bound for methods that know no more of the structure than where it is, and not one that can be reached.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def volume_error(power: Tensor, sigma: float, n: int, order: int = 1, filling: float = 1.0) -> Tensor:
    """Squared error per ring (rings,) of a slice of the estimated volume, summed over the pixels of an image.

    power (rings,): of the clean images less their background, |transform|^2 / pixels summed over each ring; sigma: of
    white noise, in the units of the images; n: images that the volume comes from; order: of its point group; filling:
    see :func:`filling`.
    """
    k = torch.arange(len(power), dtype=torch.float64)
    noise = 4 * math.pi * k**2 * filling * sigma**2 / (n * order)
    noise[0] = sigma**2 / n  # one number, seen in every image
    return noise * power.double() / (noise + power.double()).clamp(min=1e-300)


def filling(volume: Tensor, energy: float = 0.999) -> float:
    """Part of the box (d, d, d) within the sphere about its centre that holds this part of the squared density."""
    d = len(volume)
    axis = (torch.arange(d, device=volume.device) - d // 2) ** 2
    squared = (axis[:, None, None] + axis[:, None] + axis).flatten()
    order = squared.argsort()
    held = volume.flatten()[order].double().square().cumsum(0)
    radius = float(squared[order[int((held < energy * held[-1]).sum())]]) ** 0.5
    return min(4 / 3 * math.pi * radius**3 / d**3, 1.0)
