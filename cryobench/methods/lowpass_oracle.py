"""Reference row: the best isotropic linear filter, given the true mean power spectrum.

Wiener (1949): the gain S / (S + sigma^2) per radial frequency. A method below this row has not used the
particle's shape at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cryobench.errors import CryobenchError
from cryobench.methods.base import Budget, Denoiser
from cryobench.methods.linear import dct2, idct2, radius

if TYPE_CHECKING:
    from cryobench.imaging.training_data import TrainingData

STEP = 1 / 256  # spacing of the stored profile in cycles per pixel


@dataclass(frozen=True)
class Config:
    """Nothing to choose."""


class Method(Denoiser):
    """Radial Wiener filter with reflected borders, built from the clean training images."""

    name = "lowpass-oracle"
    supervision = "clean-pairs"
    equivariant = False  # the spectrum is in the training images' units; to shift it is
    Config = Config

    def fit(self, train: TrainingData, budget: Budget) -> None:
        """Store the mean power (pixel variance per coefficient) of the clean images, less their common mean.

        The profile is on a grid of 1/256 cycles per pixel, so that images of another size (at the same pixel
        size) read it by interpolation.
        """
        clean = train.clean
        power = dct2(clean - clean.mean()).square().double().mean(0)
        place = radius(*clean.shape[1:]).double()
        # mean over rings of one DCT step, then linear between the rings' mean radii
        ring = (place * 2 * max(clean.shape[1:])).round().long().flatten()
        count = torch.bincount(ring)
        where = torch.bincount(ring, place.flatten()) / count.clamp(min=1)
        value = torch.bincount(ring, power.flatten()) / count.clamp(min=1)
        grid = torch.arange(int(0.75 / STEP), dtype=torch.float64) * STEP
        self.state = {"power": interpolate(grid, where[count > 0], value[count > 0]).float().to(self.device)}

    def denoise(self, images: Tensor, sigma: float | None = None) -> Tensor:
        """Filter images (n, h, w) about their common mean. Raises CryobenchError when not fitted."""
        if "power" not in self.state:
            raise CryobenchError("lowpass-oracle knows the true spectrum only after training: give clean images to fit")
        h, w = images.shape[1:]
        power = self.state["power"]
        grid = torch.arange(len(power), device=images.device) * STEP
        power = interpolate(radius(h, w, images.device), grid, power)
        gains = power / (power + max(sigma or 0.0, 1e-12) ** 2)
        mean = images.mean()
        return idct2(dct2(images - mean) * gains) + mean


def interpolate(x: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """Linear interpolation of (places, values) (m,) at x (any shape); constant beyond the ends."""
    right = torch.searchsorted(places, x.contiguous()).clamp(1, len(places) - 1)
    left = right - 1
    t = ((x - places[left]) / (places[right] - places[left])).clamp(0, 1)
    return values[left] * (1 - t) + values[right] * t
