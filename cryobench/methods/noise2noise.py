"""Noise2Noise: learn to denoise from pairs of noisy images.

Lehtinen, Munkberg, Hasselgren, Laine, Karras, Aittala, Aila, "Noise2Noise: learning image restoration without clean
data", ICML 2018. With y1 = x + n1 and y2 = x + n2, the network that minimises E |f(y1) - y2|^2 is E[x | y1] if n2 has
mean zero and is independent of y1: the target's noise adds a constant to the loss and nothing to its minimum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from cryobench.methods.learned import Learned
from cryobench.methods.nets.unet import UNet
from cryobench.methods.training import TrainConfig


@dataclass(frozen=True)
class Config(TrainConfig):
    """A plain U-Net; Zhang et al. say nothing about the one behind their row."""

    widths: tuple[int, ...] = (64, 128, 256, 256)
    blocks: int = 2
    patch: int = 2
    steps: int = 20_000
    batch_size: int = 32
    learning_rate: float = 1e-3
    ema: float = 0.999


class Method(Learned):
    """A U-Net on images in units of the noise; each exposure of a pair is the input half of the time."""

    name = "noise2noise"
    paper = "lehtinen2018noise2noise"
    supervision = "noisy-pairs"
    Config = Config
    profiles: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "widths": (8, 16),
            "blocks": 1,
            "steps": 120,
            "batch_size": 8,
            "learning_rate": 5e-3,
            "warmup": 5,
            "ema": 0.9,
        },
        "quick": {
            "widths": (64, 128, 256),
            "blocks": 1,
            "patch": 4,
            "steps": 600,
            "batch_size": 16,
            "learning_rate": 2e-3,
            "warmup": 50,
            "ema": 0.99,
        },
    }

    @property
    def multiple(self) -> int:
        return int(self.config.patch * 2 ** (len(self.config.widths) - 1))

    @property
    def margin(self) -> int:
        return 4 * self.multiple

    def network(self) -> nn.Module:
        return UNet(widths=self.config.widths, blocks=self.config.blocks, patch=self.config.patch)
