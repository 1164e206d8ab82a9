"""Reference row: the best isotropic linear filter, given the true mean power spectrum.

Wiener (1949): the gain S / (S + N) per radial frequency, with the power N of the noise (sigma^2 if it is white).
A method below this row has not used the particle's shape at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cryobench.errors import CryobenchError
from cryobench.imaging.dct import dct2, idct2, radius
from cryobench.methods.base import Budget, Denoiser

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
        """Store the mean power of the clean images, less their common mean, and the shape of the noise's.

        The profile is on a grid of 1/256 cycles per pixel, so that images of another size (at the same pixel
        size) read it by interpolation.
        """
        clean = train.clean
        noise = (train.noisy - clean) / max(train.sigma, 1e-12)
        profiles = {"power": radial_profile(clean - clean.mean()), "noise": radial_profile(noise)}
        self.state = {name: profile.to(self.device) for name, profile in profiles.items()}

    def denoise(self, images: Tensor, sigma: float | None = None) -> Tensor:
        """Filter images (n, h, w) about their common mean. Raises CryobenchError when not fitted."""
        if "power" not in self.state:
            raise CryobenchError("lowpass-oracle knows the true spectrum only after training: give clean images to fit")
        h, w = images.shape[1:]
        grid = torch.arange(len(self.state["power"]), device=images.device) * STEP
        place = radius(h, w, images.device)
        power, noise = (interpolate(place, grid, self.state[name]) for name in ("power", "noise"))
        gains = power / (power + noise * max(sigma or 0.0, 1e-12) ** 2).clamp(min=1e-30)
        mean = images.mean()
        return idct2(dct2(images - mean) * gains) + mean


def radial_profile(images: Tensor) -> Tensor:
    """Mean DCT power of images (n, h, w) against radial frequency, in steps of STEP cycles per pixel."""
    power = dct2(images).square().double().mean(0)
    place = radius(*images.shape[1:]).double()
    # mean over rings of one DCT step, then linear between the rings' mean radii
    ring = (place * 2 * max(images.shape[1:])).round().long().flatten()
    count = torch.bincount(ring)
    where = torch.bincount(ring, place.flatten()) / count.clamp(min=1)
    value = torch.bincount(ring, power.flatten()) / count.clamp(min=1)
    grid = torch.arange(int(0.75 / STEP), dtype=torch.float64) * STEP
    return interpolate(grid, where[count > 0], value[count > 0]).float()


def interpolate(x: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """Linear interpolation of (places, values) (m,) at x (any shape); constant beyond the ends."""
    right = torch.searchsorted(places, x.contiguous()).clamp(1, len(places) - 1)
    left = right - 1
    t = ((x - places[left]) / (places[right] - places[left])).clamp(0, 1)
    return values[left] * (1 - t) + values[right] * t
