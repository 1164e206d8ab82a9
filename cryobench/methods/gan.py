"""GAN (unsupervised): an unpaired GAN, our reading of a row that Tang et al. (2022) do not describe.

Their table has a row "GAN (Unsupervised)", and their text no word on it. "Unsupervised" is taken to mean *unpaired*:
there are noisy images and there are clean images, but of other particles; no clean image ever meets its noisy one.
Technically the supervision is `clean-pairs`, since the gate has no level between pairs and no clean images.

A critic D that only knows clean images can say whether an image looks like a particle, not whether it is *this* one.
Something has to tie G(y) to y. Ours is a split of the noise (Pang et al. 2021, "Recorrupted-to-recorrupted"): with
y = x + n, n Gaussian of covariance Sigma, b of the same law and drawn by us,

    y_1 = y + alpha b,    y_2 = y - b / alpha,    cov(n + alpha b, n - b / alpha) = Sigma - Sigma = 0,

so that the noises of y_1 and y_2 are independent and E |G(y_1) - y_2|^2 = E |G(y_1) - x|^2 + const: y_2 stands in for
the clean image. With least squares for the adversaries (Mao et al. 2017), x' a clean image of another particle,

    min_D  1/2 E (D(x') - 1)^2 + 1/2 E D(G(y_1))^2,
    min_G  E |G(y_1) - y_2|^2 + lambda E (D(G(y_1)) - 1)^2.

Sigma is estimated from the corners of the noisy images. (Stein's unbiased risk estimate, the other way to do without
pairs, would need Sigma too: with sigma alone it holds for white noise.) Who knows Sigma could of course make pairs by
adding noise to the clean images, and should: that is ``gan-perceptual``. This row shows what is lost, and what is
invented, without.

When denoising, G is given y itself, whose noise is weaker than that of y_1 by the factor 1 / sqrt(1 + alpha^2).
Averaging G over several y_1 instead, as Pang et al. do, changed the error by under 2 % in a small run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from cryobench.methods.base import Budget
from cryobench.methods.learned import cut
from cryobench.methods.noise_spectrum import radial_noise_power
from cryobench.methods.tang_gan import Adversaries, Parts, TangConfig, TangGan
from cryobench.methods.training import Batch

if TYPE_CHECKING:
    from cryobench.imaging.training_data import TrainingData


@dataclass(frozen=True)
class Config(TangConfig):
    """All ours: the paper does not describe this row."""

    # lambda; reached in equal steps over the first half of the fit, before which the critic could not tell a blob from
    # noise
    adversarial: float = 0.5
    # alpha: the larger, the more noise G sees beyond that of the images, and the less there is in what it learns from
    split: float = 0.7
    discriminator_rate: float = 0.25


def unpaired(batch: Batch) -> Batch:
    """Inputs of one batch of pairs beside targets of another: two sets of images with no particle in common.

    From a simulator every batch has particles of its own. From a finite stack both are drawn at random, and what
    little they share is nowhere known.
    """

    def parted(step: int, batch_size: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
        source, _ = batch(2 * step, batch_size, seed, device)
        _, target = batch(2 * step + 1, batch_size, seed, device)
        return source, target

    return parted


def noise_filter(noisy: Tensor, shape: tuple[int, int]) -> Tensor:
    """What turns white noise of shape = (h, w) into noise like that of the images (n, ...), of variance 1.

    (h, w // 2 + 1), in the layout of rfft2; estimated from the corners, which must be empty.
    """
    frequency = torch.hypot(torch.fft.fftfreq(shape[0])[:, None], torch.fft.rfftfreq(shape[1])[None, :])
    height, width = noisy.shape[1:]
    # the estimate looks at squares: the largest in the middle of each image
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = noisy[:, top : top + side, left : left + side]
    return radial_noise_power(square, frequency.flatten()).reshape(frequency.shape).sqrt().float()


def split_noise(images: Tensor, root: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """y_1 and y_2 of the module's docstring, for images (n, 1, h, w) whose noise has variance 1 and the spectrum
    root^2."""
    white = torch.randn(images.shape, device=images.device)
    added = torch.fft.irfft2(torch.fft.rfft2(white) * root, s=images.shape[-2:])
    return images + alpha * added, images - added / alpha


class Method(TangGan):
    """Unpaired GAN on images in units of the noise, relative to the mean of the stack."""

    name = "gan"
    paper = "tang2022"
    supervision = "clean-pairs"
    Config = Config
    profiles: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "width": 8,
            "blocks": 2,
            "patch": 2,
            "discriminator": 8,
            "steps": 120,
            "batch_size": 8,
            "learning_rate": 5e-3,
            "warmup": 5,
            "ema": 0.9,
            "self_ensemble": True,
        },
        # The rate of pix2pix is for hundreds of thousands of steps; in hundreds it learns little.
        "quick": {
            "width": 32,
            "blocks": 4,
            "patch": 2,
            "discriminator": 16,
            "steps": 500,
            "batch_size": 8,
            "learning_rate": 2e-3,
            "warmup": 30,
            "ema": 0.98,
            "self_ensemble": True,
        },
        "full": {"self_ensemble": True},
    }

    def fit(self, train: TrainingData, budget: Budget) -> None:
        """Learn from noisy images and clean images of other particles. Raises SupervisionError where no clean ones are
        allowed."""
        config, batch = self.config, unpaired(self.batches(train))
        model = self.adversaries(train)
        height, width = cut([train.noisy[:1]], self.multiple, 0)[0].shape[1:]
        root = noise_filter(train.noisy, (height, width)).to(self.device)
        parts = Parts(config.steps, ("split noise", "adversarial"))

        def discriminate(m: Adversaries, noisy: Tensor, other: Tensor) -> Tensor:
            with torch.no_grad():
                made = m.generator(split_noise(noisy, root, config.split)[0])
            return 0.5 * (m.judge(other) - 1).square().mean() + 0.5 * m.judge(made).square().mean()

        def generate(m: Adversaries, noisy: Tensor, other: Tensor) -> Tensor:
            first, second = split_noise(noisy, root, config.split)
            made = m.generator(first)
            tie, adversarial = F.mse_loss(made.float(), second), (m.judge(made) - 1).square().mean()
            parts.note(tie, adversarial)
            return tie + config.adversarial * min(1.0, 2 * parts.step / config.steps) * adversarial

        self.play(model, batch, discriminate, generate, parts, budget)
