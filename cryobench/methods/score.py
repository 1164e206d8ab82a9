"""Score-based denoising, learned from pairs of noisy images. The formulation is OURS.

Wu et al., "Score-based matching with target guidance for cryo-EM denoising" (arXiv 2604.17734): of this paper only the
abstract is public to us. It says that a network learns the score of the clean data; that this is combined with
Noise2Noise, a summary of the paper says. What follows is our reading of both, in units of the noise's standard
deviation sn = 1, from

* Vincent, "A connection between score matching and denoising autoencoders", Neural Comput. 23 (2011) 1661;
* Miyasawa (1961), "An empirical Bayes estimator of the mean of a normal population", also named after Tweedie:
  for z = x + noise of variance t^2, E[x | z] = z + t^2 grad log p_t(z);
* Lehtinen et al., "Noise2Noise", ICML 2018.

Given y1 = x + n1 and y2 = x + n2, draw z = y1 + tau u with u white, of variance 1, and minimise

    lambda(tau) |D(z, tau) - y2|^2.

n2 is independent of z, so that the minimum is D* = E[x | z]. Where n1 is white and Gaussian, so is the noise in z, of
variance t^2 = sn^2 + tau^2, and (D* - z) / t^2 is the score of the images at level t. Levels below sn are out of
reach: no z has less noise than y1. Denoising is one step of Tweedie's formula at the lowest level, y + sn^2 grad log
p(y) = D(y, 0).

lambda = 1: the target's noise, variance 1, is by far the largest part of the loss at every level, so that all levels
give gradients equally noisy and are to be weighted alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cryobench.methods.nets.unet import UNet
from cryobench.methods.unet import OnUNet, Settings


@dataclass(frozen=True)
class Config(Settings):
    """Everything here is ours. The network is that of ``noise2noise``, told the level, so that the two compare.

    at_zero: part of the training images to which no noise is added: the level at which images are denoised. For the
    others the logarithm of tau is uniform between those of ``lowest`` and ``highest``, in units of the noise. Below
    0.25 the total level would differ from that of tau = 0 by about 3 %; with 4 times the noise, of an SNR of 0.1 is
    left 0.006, where little more than the mean image can be known.
    """

    at_zero: float = 0.75
    lowest: float = 0.25
    highest: float = 4.0
    # Lower than that of ``unet``, and reached later: at 1.5e-3 within 100 steps a fit on an H200 died in step 70 (all
    # units off, the same output whatever the image). The gradients of noisy targets are mostly noise.
    learning_rate: float = 5e-4
    warmup: int = 500


class Network(nn.Module):
    """Images z (n, 1, h, w) and the level tau (n,) of the noise added to them (0 if not given) -> E[x | z]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.unet = UNet(1, 1, config.widths, config.blocks, config.patch, levels=True, norm=config.norm)

    def forward(self, z: Tensor, tau: Tensor | None = None) -> Tensor:
        tau = z.new_zeros(len(z)) if tau is None else tau
        share = (1 + tau**2).rsqrt()  # 1 / t: the network sees noise of variance 1 at every level
        return self.unet(z * share[:, None, None, None], share)


class Method(OnUNet):
    """A U-Net told the noise level, E[x | z] at all levels from that of the images upwards."""

    name = "score"
    paper = "wu2026"
    supervision = "noisy-pairs"
    Config = Config

    def network(self) -> nn.Module:
        return Network(self.config)

    def renoised(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """z = source + tau u, and tau (n,), for images (n, 1, h, w); draws from torch's global generator."""
        config, n, device = self.config, len(source), source.device
        low, high = math.log(config.lowest), math.log(config.highest)
        tau = (low + (high - low) * torch.rand(n, device=device)).exp()
        tau = torch.where(torch.rand(n, device=device) < config.at_zero, 0.0, tau)
        return source + tau[:, None, None, None] * torch.randn_like(source), tau

    def loss(self, net: nn.Module, source: Tensor, target: Tensor) -> Tensor:
        z, tau = self.renoised(source)
        return F.mse_loss(net(z, tau), target)

    def denoise(self, images: Tensor, sigma: float | None = None) -> Tensor:
        """D(y, 0) of images of any size; sigma as in :class:`Denoiser`. Raises CryobenchError before fit or load."""
        return self.posterior_mean(images, float(sigma or 0))

    def posterior_mean(self, z: Tensor, sigma: float, tau: float = 0.0) -> Tensor:
        """D(z, tau), (n, h, w): z are images (n, h, w) with noise sigma, to which more was added, tau sigma.

        In the units of the images. Raises CryobenchError before fit or load.
        """
        device, z = z.device, z.to(self.device)
        net, mean, unit = self.trained_network(), z.mean(), self.unit(z, sigma)
        if unit == 0:
            return z.to(device)

        def at_level(x: Tensor) -> Tensor:
            return net(x, x.new_full((len(x),), tau))

        with torch.no_grad():
            out = self.apply(at_level, self.seen((z - mean) / unit))
        return (out * unit + mean).to(device)

    def score(self, z: Tensor, sigma: float, tau: float = 0.0) -> Tensor:
        """The score grad log p_t(z), (n, h, w), at t^2 = (1 + tau^2) sigma^2 > 0; arguments as of
        :meth:`posterior_mean`. Per unit of the images."""
        return (self.posterior_mean(z, sigma, tau) - z) / ((1 + tau**2) * sigma**2)
