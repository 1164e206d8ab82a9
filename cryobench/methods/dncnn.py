"""DnCNN: a plain convolutional network that predicts the noise.

Zhang, Zuo, Chen, Meng, Zhang, "Beyond a Gaussian denoiser: residual learning of deep CNN for image denoising",
IEEE Trans. Image Process. 26 (2017) 3142. With y = x + v, the network R is trained to minimise
|R(y) - (y - x)|^2 / 2 (eq. 1); the denoised image is y - R(y).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from cryobench.methods.learned import Learned
from cryobench.methods.training import TrainConfig


@dataclass(frozen=True)
class Config(TrainConfig):
    """The network is the reference code's for a known noise level; where the training differs, it says so. Ours
    besides: gradients clipped."""

    depth: int = 17
    width: int = 64
    bn_eps: float = 1e-4
    # The reference code's value. In torch it is the weight of the new batch, so that almost nothing is averaged;
    # 0.05 was probably meant. The average over weights (ema) mends it here.
    bn_momentum: float = 0.95
    # The paper's network predicts the noise. At SNR 0.1 that is the larger part of the input, and every layer must
    # carry it without loss: 16.2 dB after 300 short steps, where predicting the image gives 27.6 dB (TRPV1, 64 px,
    # depth 10, shuffle 2). All profiles therefore predict the image; the paper argues for the residual where the
    # image is close to the input.
    residual: bool = True
    # Deviation for short training (the paper: 1, off): the network works on every shuffle-th pixel in each
    # direction, the rest as channels (Zhang et al. 2018, FFDNet): shuffle^2 cheaper, and it sees farther.
    shuffle: int = 1
    # Paper: 40 px patches, batch 128, 180 epochs of 1,862 steps. Ours: whole particles, since their
    # structure is larger than a patch; a step at 128 px takes an H200 15 ms.
    steps: int = 4000
    batch_size: int = 32
    # Paper: constant, x0.2 at epochs 30, 60 and 90. Ours: warm-up and cosine, for any number of steps.
    learning_rate: float = 1e-3
    # Paper: no average over weights.
    ema: float = 0.999
    # Paper: off. The result is the mean over the eight turns and mirrors of the input (see Learned); all profiles
    # do so, as the U-Nets of this book.
    self_ensemble: bool = False


class Network(nn.Module):
    """Normalised images (n, 1, h, w), sides multiples of shuffle -> the same shape, denoised."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.shuffle, self.residual = config.shuffle, config.residual
        width, pixels = config.width, config.shuffle**2
        layers: list[nn.Module] = [nn.Conv2d(pixels, width, 3, padding=1), nn.ReLU()]
        for _ in range(config.depth - 2):
            layers.append(nn.Conv2d(width, width, 3, padding=1, bias=False))
            layers += [nn.BatchNorm2d(width, config.bn_eps, config.bn_momentum), nn.ReLU()]
        layers.append(nn.Conv2d(width, pixels, 3, padding=1))
        self.layers = nn.Sequential(*layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.orthogonal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        out = F.pixel_shuffle(self.layers(F.pixel_unshuffle(x, self.shuffle)), self.shuffle).to(x.dtype)
        return x - out if self.residual else out


class Method(Learned):
    """DnCNN on images in units of the noise, relative to the mean of the stack."""

    name = "dncnn"
    paper = "zhang2017dncnn"
    supervision = "clean-pairs"
    Config = Config
    profiles: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "residual": False,
            "shuffle": 2,
            "depth": 4,
            "width": 16,
            "steps": 120,
            "batch_size": 8,
            "learning_rate": 5e-3,
            "warmup": 5,
            "ema": 0.9,
            "self_ensemble": True,
        },
        "quick": {
            "residual": False,
            "shuffle": 8,
            "depth": 7,
            "width": 128,
            "steps": 1900,
            "batch_size": 8,
            "learning_rate": 5e-3,
            "warmup": 50,
            "ema": 0.99,
            "self_ensemble": True,
        },
        "full": {"residual": False, "self_ensemble": True},
    }

    @property
    def multiple(self) -> int:
        return int(self.config.shuffle)

    @property
    def margin(self) -> int:
        return int(self.config.depth * self.config.shuffle)

    def network(self) -> nn.Module:
        return Network(self.config)
