"""Mean filter: each pixel becomes the average of a square window around it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cryobench.errors import CryobenchError
from cryobench.methods.base import Denoiser
from cryobench.methods.linear import filter_images, kernel_gains, separable


@dataclass(frozen=True)
class Config:
    """width: side of the window in pixels, odd; ``None`` takes the least Stein risk for each stack."""

    width: int | None = None


def gains(width: float, n: int) -> Tensor:
    """Gains (n,) of a window of ``width`` pixels along one axis."""
    return kernel_gains(torch.full(((int(width) + 1) // 2,), 1 / width), n)


class Method(Denoiser):
    """Square window with reflected borders."""

    name = "mean"
    supervision = "sigma"
    Config = Config

    def denoise(self, images: Tensor, sigma: float | None = None) -> Tensor:
        """Average images (n, h, w) over the window. Raises CryobenchError for an even width."""
        width = self.config.width
        if width is not None and (width < 1 or width % 2 == 0):
            raise CryobenchError(f"mean: width must be an odd number of pixels, not {width}")
        return filter_images(images, sigma or 0.0, separable(gains), width, range(1, 42, 2))
