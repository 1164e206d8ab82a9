"""Gaussian filter."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cryobench.errors import CryobenchError
from cryobench.methods.base import Denoiser
from cryobench.methods.linear import filter_images, kernel_gains, separable


@dataclass(frozen=True)
class Config:
    """width: standard deviation in pixels; ``None`` takes the least Stein risk for each stack."""

    width: float | None = None


#: widths tried, in pixels: none, then steps of 15 % from 0.3 to 17
GRID = [0.0] + [0.3 * 1.15**i for i in range(30)]


def gains(width: float, n: int) -> Tensor:
    """Gains (n,) of a sampled Gaussian of standard deviation ``width``, cut at 4 of them."""
    half = torch.exp(-0.5 * (torch.arange(math.ceil(4 * width) + 1) / max(width, 1e-6)) ** 2)
    return kernel_gains(half / (2 * half.sum() - half[0]), n)


class Method(Denoiser):
    """Gaussian window with reflected borders."""

    name = "gaussian"
    supervision = "sigma"
    Config = Config

    def denoise(self, images: Tensor, sigma: float | None = None) -> Tensor:
        """Smooth images (n, h, w). Raises CryobenchError for a negative width."""
        if self.config.width is not None and self.config.width < 0:
            raise CryobenchError(f"gaussian: width must not be negative: {self.config.width}")
        return filter_images(images, sigma or 0.0, separable(gains), self.config.width, GRID)
