"""Reference row: the noisy images as they are. What does not beat it harms."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cryobench.methods.base import Denoiser


@dataclass(frozen=True)
class Config:
    """Nothing to choose."""


class Method(Denoiser):
    """The identity."""

    name = "noisy"
    supervision = "none"
    Config = Config

    def denoise(self, images: Tensor, sigma: float | None = None) -> Tensor:
        """Return images (n, h, w) unchanged."""
        return images
