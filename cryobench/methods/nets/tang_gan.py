"""Generator and discriminator of Tang et al. (2022), shared by their two rows ``gan`` and ``gan-perceptual``.

The paper describes both in words and draws them in figures without widths: three blocks "convolution layers, residual
blocks, deconvolution layers" of convolution, batch normalisation and LeakyReLU, after Alsaiari et al. (2019), and a
discriminator of five convolutions with the same. Widths, kernels and strides are ours: those of the pix2pix family
(Isola et al. 2017; Johnson et al. 2016).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def block(convolution: nn.Module, channels: int, active: bool = True) -> nn.Sequential:
    """Convolution, batch normalisation and, if active, LeakyReLU."""
    return nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.LeakyReLU(0.2) if active else nn.Identity())


class Residual(nn.Module):
    """x + block(block(x)), the second one without its LeakyReLU, so that the sum can go both ways."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = block(nn.Conv2d(width, width, 3, padding=1, bias=False), width)
        self.second = block(nn.Conv2d(width, width, 3, padding=1, bias=False), width, active=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x))


class Generator(nn.Module):
    """Noisy images (n, 1, h, w), sides multiples of 4 patch -> the same shape, denoised.

    width: channels of the first convolution; two strided ones double them. blocks: residual blocks at the coarsest
    level. patch: patch x patch neighbouring pixels become channels first and are put back last. No tanh at the end:
    images here are in units of the noise, not in [-1, 1].
    """

    def __init__(self, width: int = 64, blocks: int = 6, patch: int = 1) -> None:
        super().__init__()
        self.patch, self.multiple = patch, 4 * patch
        wider, widest = 2 * width, 4 * width
        self.convolutions = nn.Sequential(
            block(nn.Conv2d(patch**2, width, 7, padding=3, bias=False), width),
            block(nn.Conv2d(width, wider, 3, stride=2, padding=1, bias=False), wider),
            block(nn.Conv2d(wider, widest, 3, stride=2, padding=1, bias=False), widest),
        )
        self.residuals = nn.Sequential(*(Residual(widest) for _ in range(blocks)))
        self.deconvolutions = nn.Sequential(
            block(nn.ConvTranspose2d(widest, wider, 4, stride=2, padding=1, bias=False), wider),
            block(nn.ConvTranspose2d(wider, width, 4, stride=2, padding=1, bias=False), width),
        )
        self.leave = nn.Conv2d(width, patch**2, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.convolutions(F.pixel_unshuffle(x, self.patch))
        return F.pixel_shuffle(self.leave(self.deconvolutions(self.residuals(h))), self.patch).to(x.dtype)


class Discriminator(nn.Module):
    """Images (n, inputs, h, w) -> logits (n, 1, h', w'), one for each patch of the image that a logit sees.

    Three strided 4 x 4 convolutions and two of 3 x 3; batch normalisation in the three between the first and the last,
    LeakyReLU after all but the last.
    """

    def __init__(self, inputs: int, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Sequential(nn.Conv2d(inputs, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)),
            block(nn.Conv2d(width, 2 * width, 4, stride=2, padding=1, bias=False), 2 * width),
            block(nn.Conv2d(2 * width, 4 * width, 4, stride=2, padding=1, bias=False), 4 * width),
            block(nn.Conv2d(4 * width, 8 * width, 3, padding=1, bias=False), 8 * width),
            nn.Conv2d(8 * width, 1, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.layers(x)).float()
