"""Low-pass filter with a raised-cosine edge, as ``relion_image_handler --lowpass`` makes it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cryobench.errors import CryobenchError
from cryobench.imaging.dct import radius
from cryobench.methods.base import Denoiser
from cryobench.methods.linear import filter_images


@dataclass(frozen=True)
class Config:
    """cutoff: frequency where the gain is 1/2, in cycles per pixel (0.5 = Nyquist); ``None`` takes the least
    Stein risk for each stack. edge: width of the edge in Fourier pixels of the image (RELION: 2).
    """

    cutoff: float | None = None
    edge: float = 2.0


#: cut-offs tried, in cycles per pixel; the last one is past the corner of the spectrum and keeps everything
GRID = [0.01 * 1.1**i for i in range(45)] + [10.0]


class Method(Denoiser):
    """Radial cut-off with reflected borders."""

    name = "lowpass"
    supervision = "sigma"
    Config = Config

    def gains(self, cutoff: float, h: int, w: int) -> Tensor:
        """Gains (h, w): 1 below cutoff - edge/2, 0 above cutoff + edge/2, half a cosine between."""
        edge = max(self.config.edge, 1e-6) / max(h, w)
        gains = 0.5 + 0.5 * torch.cos(math.pi * ((radius(h, w) - cutoff) / edge + 0.5).clamp(0, 1))
        gains[0, 0] = 1  # the mean stays, whatever the cut-off
        return gains

    def denoise(self, images: Tensor, sigma: float | None = None) -> Tensor:
        """Filter images (n, h, w). Raises CryobenchError for a cut-off that is not positive."""
        if self.config.cutoff is not None and self.config.cutoff <= 0:
            raise CryobenchError(f"lowpass: cutoff must be positive, in cycles per pixel: {self.config.cutoff}")
        return filter_images(images, sigma or 0.0, self.gains, self.config.cutoff, GRID)
