"""Reference row: the mean image, whatever the input. What does not beat it has learnt nothing about a particle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from cryobench.methods.base import Budget, Denoiser

if TYPE_CHECKING:
    from cryobench.imaging.training_data import TrainingData


@dataclass(frozen=True)
class Config:
    """Nothing to choose."""


class Method(Denoiser):
    """The mean of the noisy training stack: its noise averages out, and so does the particle."""

    name = "blank"
    supervision = "noisy"
    equivariant = False
    Config = Config

    def fit(self, train: TrainingData, budget: Budget) -> None:
        """Average the noisy training images (n, h, w)."""
        self.state = {"mean": train.noisy.mean(0).to(self.device)}

    def denoise(self, images: Tensor, sigma: float | None = None) -> Tensor:
        """Return the mean image n times: that of the training stack, or of the input (n, h, w) when not fitted.

        For images of another size than the training ones it is the constant mean value.
        """
        mean = self.state.get("mean", images.mean(0))
        if mean.shape != images.shape[1:]:
            mean = mean.mean().expand(images.shape[1:])
        return mean.expand_as(images).clone()
