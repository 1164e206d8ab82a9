"""restore: a wide-activation U-Net that learns from the even and the odd frames of movies.

Palovcak, Asarnow, Campbell, Yu, Cheng, "Enhancing the signal-to-noise ratio and generating contrast for cryo-EM images
with convolutional neural networks", IUCrJ 7 (2020) 1142. With y1 = s + n1 and y2 = s + n2, the sums of the even and of
the odd frames, f minimises E |f(y1) - y2|^2. Network and settings are those of the authors' code (asarnow/restore).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from cryobench.methods.learned import Learned
from cryobench.methods.training import TrainConfig


@dataclass(frozen=True)
class Config(TrainConfig):
    """The network is the authors'; where the training differs, it says so. Ours besides: gradients clipped, an average
    over weights, either exposure as the input, turns and mirrors."""

    width: int = 32
    levels: int = 3
    blocks: int = 4  # per level of the encoder, 3 x 3 kernels
    up_blocks: int = 3  # per level of the decoder, 4 x 4 kernels
    # Deviation for short training (theirs: 1, off): patch x patch pixels are channels, as in nets/unet.py, since the
    # costly first level has the least to say at this SNR.
    patch: int = 1
    # Theirs: patches of 192 px of micrographs, 100 epochs of 500 steps, each patch made mean 0 and variance 1. Ours:
    # whole particles in units of the noise, which keeps the scale of weak and strong images; and fewer, larger steps:
    # one of 10 images at 128 px takes an H200 53 ms, in which it mostly waits for Python.
    steps: int = 2000
    batch_size: int = 24
    # Theirs: 1e-4, times 1, 0.5, 0.25 and 0.125 by quarters of the run. Ours: warm-up and cosine.
    learning_rate: float = 1e-3
    beta2: float = 0.99
    # Theirs: off. The result is the mean over the eight turns and mirrors of the input (see Learned); all profiles
    # do so, as the other U-Nets of this book.
    self_ensemble: bool = False


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A convolution whose weights are a length g per output channel times a direction v / |v| (Salimans and Kingma)."""
    padding = kernel // 2 if kernel % 2 else 0
    return weight_norm(nn.Conv2d(inputs, outputs, kernel, stride, padding))


class WideBlock(nn.Module):
    """x + conv(narrow(relu(wide(x)))): many channels where the ReLU is, few where the kernel is large (Yu et al. 2018).

    An even kernel has no centre: it reaches one pixel farther to one side, to the lower right or, with ``early``, to
    the upper left. Blocks in a row take turns, so that what they see stays centred.
    """

    def __init__(self, width: int, kernel: int, early: bool = False) -> None:
        super().__init__()
        near, far = (0, 0) if kernel % 2 else (kernel // 2 - 1, kernel // 2)
        self.padding = (far, near, far, near) if early else (near, far, near, far)
        self.wide = conv(width, 4 * width, 1)
        self.narrow = conv(4 * width, int(0.8 * width), 1)
        self.conv = conv(int(0.8 * width), width, kernel)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(F.pad(self.narrow(F.relu(self.wide(x))), self.padding))


class Up(nn.Module):
    """(n, width, h, w) -> (n, width, 2 h, 2 w): four times the channels, a wide block, depth to space."""

    def __init__(self, width: int, early: bool) -> None:
        super().__init__()
        self.spread = conv(width, 4 * width, 1)
        self.block = WideBlock(4 * width, 4, early)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.block(F.relu(self.spread(x))), 2)


class Down(nn.Module):
    """A level of the encoder: wide blocks, then half the size by a strided convolution and by pooling the input."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(WideBlock(width, 3) for _ in range(blocks)))
        self.stride = conv(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The maps at this size, for the decoder, and those of half the size."""
        h = self.blocks(x)
        return h, F.relu(self.stride(h)) + F.max_pool2d(x, 2)


class Rise(nn.Module):
    """A level of the decoder: join what the encoder had at this size, wide blocks, twice the size; its input is
    added, brought to that size by layers of its own."""

    def __init__(self, width: int, blocks: int, joins: bool) -> None:
        super().__init__()
        self.join = conv(2 * width if joins else width, width, 1)
        self.blocks = nn.Sequential(*(WideBlock(width, 4, early=k % 2 == 1) for k in range(blocks)))
        self.up = Up(width, early=blocks % 2 == 1)
        self.shortcut = Up(width, early=blocks % 2 == 1)

    def forward(self, x: Tensor, encoded: Tensor | None) -> Tensor:
        joined = x if encoded is None else torch.cat([x, encoded], dim=1)
        return self.up(self.blocks(F.relu(self.join(joined)))) + self.shortcut(x)


class Network(nn.Module):
    """Normalised images (n, 1, h, w), sides multiples of ``patch * 2**levels`` -> the same shape, denoised."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.patch, width, pixels = config.patch, config.width, config.patch**2
        self.enter = conv(pixels, width, 3)
        self.down = nn.ModuleList(Down(width, config.blocks) for _ in range(config.levels))
        # at each size the decoder gets what the encoder had there; at the smallest, where it starts, there is no more
        self.rise = nn.ModuleList(Rise(width, config.up_blocks, joins=k > 0) for k in range(config.levels))
        self.mix = conv(2 * width, width, 1)
        self.leave = conv(width, pixels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h, encoded = self.enter(F.pixel_unshuffle(x, self.patch)), []
        for level in self.down:
            maps, h = level(h)
            encoded.append(maps)
        for k, level in enumerate(self.rise):
            h = level(h, encoded.pop() if k else None)
        out = self.leave(F.relu(self.mix(torch.cat([h, encoded.pop()], dim=1))))
        return F.pixel_shuffle(out, self.patch).to(x.dtype)


class Method(Learned):
    """The wide-activation U-Net on images in units of the noise; each exposure of a pair is the input half the time."""

    name = "restore"
    paper = "palovcak2020restore"
    supervision = "noisy-pairs"
    Config = Config
    profiles: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "width": 16,
            "levels": 1,
            "blocks": 1,
            "up_blocks": 1,
            "patch": 2,
            "steps": 120,
            "batch_size": 8,
            "learning_rate": 5e-3,
            "warmup": 5,
            "ema": 0.9,
            "self_ensemble": True,
        },
        "quick": {
            "width": 24,
            "levels": 2,
            "blocks": 1,
            "up_blocks": 1,
            "patch": 4,
            "steps": 1600,
            "learning_rate": 6e-3,
            "warmup": 50,
            "ema": 0.99,
            "self_ensemble": True,
        },
        "full": {"self_ensemble": True},
    }

    @property
    def multiple(self) -> int:
        return int(self.config.patch * 2**self.config.levels)

    @property
    def margin(self) -> int:
        """Followed back layer by layer: 4 x 4 kernels see 3 pixels in pairs and up to 2 alone, 3 x 3 kernels 1."""
        config, reach = self.config, 0
        for _ in range(config.levels):
            reach = -(-reach // 2) + (3 * (config.up_blocks + 1) + 1) // 2
        for _ in range(config.levels):
            reach = 2 * reach + 1 + config.blocks
        return int(config.patch * (reach + 1))

    def network(self) -> nn.Module:
        return Network(self.config)
