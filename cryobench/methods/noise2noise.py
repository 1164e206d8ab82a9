"""Noise2Noise: learn to denoise from pairs of noisy images.

Lehtinen, Munkberg, Hasselgren, Laine, Karras, Aittala, Aila, "Noise2Noise: learning image restoration without clean
data", ICML 2018. With y1 = x + n1 and y2 = x + n2, the network that minimises E |f(y1) - y2|^2 is E[x | y1] if n2 has
mean zero and is independent of y1: the target's noise adds a constant to the loss and nothing to its minimum.
"""

from __future__ import annotations

from dataclasses import dataclass

from cryobench.methods import unet


@dataclass(frozen=True)
class Config(unet.Config):
    """Lehtinen et al. use a plain U-Net, and Zhang et al. say nothing about the one behind their row: ours is the one
    of ``unet``, so that the two differ in what they learn from, and in the rate, see ``score``."""

    learning_rate: float = 5e-4
    warmup: int = 500


class Method(unet.Method):
    """A U-Net on images in units of the noise; each exposure of a pair is the input half of the time."""

    name = "noise2noise"
    paper = "lehtinen2018noise2noise"
    supervision = "noisy-pairs"
    Config = Config
