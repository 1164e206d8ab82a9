"""DenoiseGAN: a conditional GAN that turns a noisy particle into the projection behind it.

Su, Zhang, Schawinski, Zhang, Cianfrocco, "Generative adversarial networks as a tool to recover structural information
from cryo-electron microscopy data", bioRxiv 256792 (2018); settings from the authors' code. With the generator G, the
critic D that sees an image and the noisy one y side by side, and sigma the logistic function,

    loss of D = -(E log sigma(D(x, y)) + E log(1 - sigma(D(G(y), y)))) / 2
    loss of G = -E log sigma(D(G(y), y)) + 100 E |x - G(y)|    (mean over pixels)

as in pix2pix (Isola et al. 2017). D judges overlapping patches; its outputs are averaged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cryobench.methods.nets.residual_gan import BottleneckUnit, ResidualGAN, critic_trunk, small_weights
from cryobench.methods.training import TrainConfig


@dataclass(frozen=True)
class Config(TrainConfig):
    """The authors' code, where nothing else is said."""

    # The code has a sixth level, 512 wide, for images of 256 px. At 128 px five levels end in the same 4 x 4 places.
    widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    units: tuple[int, ...] = (3, 3, 3, 3, 0)
    critic_widths: tuple[int, ...] = (64, 128, 256)
    critic_units: tuple[int, ...] = (2, 2, 3)
    #: width of the critic's last layers, which keep the resolution
    critic_top: int = 512
    adversarial: float = 1.0
    l1: float = 100.0
    # Code: batch 1, 21 epochs. One image at a time leaves a GPU idle; even of 16 at 128 px a step takes an H200 0.13 s,
    # in which it mostly waits for Python.
    steps: int = 1000
    batch_size: int = 32
    learning_rate: float = 4e-4
    critic_rate: float = 1.5e-4
    beta1: float = 0.5
    # Code: constant rate and no average over weights. Ours: as all methods here.
    ema: float = 0.999
    # Paper: off. The mean over turns and mirrors of the input, as for all networks but sr3.
    self_ensemble: bool = False


class Critic(nn.Module):
    """Images and conditions, each (n, 1, h, w) -> logits of "clean" (n, 1, p, q), one a patch."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        widths, top = config.critic_widths, config.critic_top
        self.layers = nn.Sequential(
            *critic_trunk(2, widths, config.critic_units, BottleneckUnit),
            *(nn.ZeroPad2d((1, 2, 1, 2)), nn.Conv2d(widths[-1], top, 4, bias=False), nn.BatchNorm2d(top), nn.ELU()),
            *(BottleneckUnit(top) for _ in range(2)),
            *(nn.Conv2d(top, top, 4, bias=False), nn.BatchNorm2d(top), nn.ELU()),
            nn.Conv2d(top, 1, 4),
        )
        small_weights(self)

    def forward(self, images: Tensor, condition: Tensor) -> Tensor:
        return self.layers(torch.cat([images, condition], dim=1)).float()


class Method(ResidualGAN):
    """DenoiseGAN on images in units of the noise, relative to the mean of the stack."""

    name = "denoisegan"
    paper = "su2018gan"
    supervision = "clean-pairs"
    Config = Config
    residual_unit = BottleneckUnit
    critic_places = 7
    profiles: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "widths": (16, 32),
            "units": (1, 1),
            "critic_widths": (8, 16),
            "critic_units": (1, 1),
            "critic_top": 16,
            "steps": 120,
            "batch_size": 8,
            "learning_rate": 5e-3,
            "critic_rate": 1e-3,
            "warmup": 5,
            "ema": 0.9,
            "self_ensemble": True,
        },
        # half as wide as the paper's, with fewer units and four levels, which end in 4 x 4 places: 64 px on one CPU
        # core. The rate is higher, for a fiftieth of the steps.
        "quick": {
            "widths": (32, 64, 128, 256),
            "units": (1, 1, 2, 0),
            "critic_widths": (16, 32, 64),
            "critic_units": (1, 1, 1),
            "critic_top": 64,
            "steps": 250,
            "learning_rate": 2e-3,
            "warmup": 50,
            "ema": 0.99,
            "self_ensemble": True,
        },
        "full": {"self_ensemble": True},
    }

    def critic(self) -> nn.Module:
        return Critic(self.config)

    def turns(self) -> tuple[float, int]:
        return self.config.critic_rate / self.config.learning_rate, 1

    def critic_loss(self, game: nn.ModuleDict, noisy: Tensor, clean: Tensor) -> Tensor:
        with torch.no_grad():
            made = game["generator"](noisy)
        return (
            _cross_entropy(game["critic"](clean, noisy), 1.0) + _cross_entropy(game["critic"](made, noisy), 0.0)
        ) / 2

    def generator_loss(self, game: nn.ModuleDict, noisy: Tensor, clean: Tensor) -> Tensor:
        made = game["generator"](noisy)
        loss = self.config.l1 * F.l1_loss(made, clean)
        if self.config.adversarial:
            loss = loss + self.config.adversarial * _cross_entropy(game["critic"](made, noisy), 1.0)
        return loss


def _cross_entropy(logits: Tensor, label: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))
