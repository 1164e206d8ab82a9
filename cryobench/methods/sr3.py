"""SR3: a conditional diffusion model that draws clean images which could lie behind the noisy one.

Zhang, Zhao, Hu, Zhao, "Robust single-particle cryo-EM image denoising and restoration", arXiv 2401.01097 (2024), take
the model of Saharia et al., "Image super-resolution via iterative refinement", arXiv 2104.07636. A network f_theta sees
the noisy image x and the clean one y_0 in other noise eps, and says what eps is (their eq. 3):

    min  E |f_theta(x, sqrt(gamma) y_0 + sqrt(1 - gamma) eps, gamma) - eps|^2.

From pure noise, step by step, it then draws y_0 from p(y_0 | x) (eqs. 1 and 2). The mean of many such samples tends to
E[y_0 | x], the estimate with the least squared error; a single one has twice its error if the model is exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cryobench.imaging.particles import stream_seed
from cryobench.imaging.turns import TURNS, turn, turn_back
from cryobench.methods.base import Budget
from cryobench.methods.diffusion import fewer_levels, linear_schedule, noised, random_levels, walk
from cryobench.methods.nets.tiling import apply_tiled
from cryobench.methods.nets.unet import UNet
from cryobench.methods.training import TrainConfig, pick_precision
from cryobench.methods.training import train as run_training
from cryobench.methods.unet import OnUNet

if TYPE_CHECKING:
    from cryobench.imaging.training_data import TrainingData


@dataclass(frozen=True)
class Config(TrainConfig):
    """Zhang et al. give no setting but the loss. Defaults are those of the SR3 code that they probably started from
    (Janspiry/Image-Super-Resolution-via-Iterative-Refinement), where nothing else is said."""

    # There: widths 64 to 512 in five levels with attention, 98 M weights, 10^6 steps of batch 4. Ours is sized for the
    # minutes of `full`, on the U-Net of the other methods.
    widths: tuple[int, ...] = (48, 96, 192, 384)
    blocks: int = 2
    patch: int = 4
    # There: group normalisation. Ours: none, as in ``unet``.
    norm: bool = False
    # T, and beta_t, which rises linearly with t
    diffusion_steps: int = 2000
    first_beta: float = 1e-6
    last_beta: float = 1e-2
    # The next three keep eq. 3 but for its weights, and make short training work; the profiles set them.
    # skip: f = sqrt(1 - gamma) y_t + sqrt(gamma) F with F the U-Net. At high noise eps is then known without learning,
    # and what is left to learn is -y_0 (Salimans & Ho, arXiv 2202.00512, call F's target v).
    skip: bool = False
    # combine: a third input, the mean of the two noisy images weighted by what each knows of y_0.
    combine: bool = False
    # weighting: eq. 3 times gamma^-weighting; at 1, with skip, F's error counts alike at every level. Only with skip.
    weighting: float = 0.0
    # How samples are drawn: "ancestral" in 2000 steps is the paper's; "ddim" and "dpm" need few, see diffusion.walk.
    sampler: str = "ancestral"
    sampling_steps: int = 2000
    # The result is the mean of so many samples; the paper's is one. antithetic: each second one starts from the
    # negative of the noise before it, so that what is odd in the noise cancels (not with "ancestral", which adds
    # noise on the way).
    samples: int = 1
    antithetic: bool = False
    steps: int = 4000
    batch_size: int = 64
    # There 1e-4, constant, without an average over weights.
    learning_rate: float = 1e-3
    ema: float = 0.999


class Network(nn.Module):
    """f_theta: x and y_t as two channels (n, 2, h, w), levels sqrt(gamma) (n,) -> the noise in y_t (n, 1, h, w).

    x is in units of its noise. ``scale``: standard deviation of clean images in these units; y_0 is a clean image
    divided by it. ``low``, ``high``: range of y_0. Set by the fit.
    """

    scale: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.skip, self.combine = config.skip, config.combine
        inputs = 3 if config.combine else 2
        self.unet = UNet(inputs, 1, config.widths, config.blocks, config.patch, levels=True, norm=config.norm)
        for name in ("scale", "low", "high"):
            self.register_buffer(name, torch.ones(()))

    def forward(self, pair: Tensor, levels: Tensor) -> Tensor:
        level = levels[:, None, None, None]
        seen = torch.cat([pair, self.combined(pair, level)], dim=1) if self.combine else pair
        out = self.unet(seen, levels)
        return (1 - level**2).sqrt() * pair[:, 1:] + level * out if self.skip else out

    def combined(self, pair: Tensor, level: Tensor) -> Tensor:
        """The mean of x / scale and y_t / level, weighted by their inverse noise variances, divided by its expected
        spread: for white noise it knows all about y_0 that the two know."""
        noise = 1 - level**2
        known = self.scale**2 * noise + level**2
        return (self.scale * noise * pair[:, :1] + level * pair[:, 1:]) / (known * (known + noise)).sqrt()


class Method(OnUNet):
    """Samples of p(clean | noisy) by conditional diffusion, averaged."""

    name = "sr3"
    paper = "zhang2024"
    supervision = "clean-pairs"
    costly = True
    Config = Config
    profiles: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "widths": (16, 32), "blocks": 1, "patch": 2, "skip": True, "combine": True, "weighting": 0.5,
            "sampler": "ddim", "sampling_steps": 5, "samples": 2, "antithetic": True,
            "steps": 150, "batch_size": 8, "learning_rate": 5e-3, "warmup": 5, "ema": 0.9,
        },
        "quick": {
            "widths": (32, 64, 128), "blocks": 1, "skip": True, "combine": True, "weighting": 0.5,
            "sampler": "ddim", "sampling_steps": 10, "samples": 4, "antithetic": True,
            "steps": 1200, "batch_size": 16, "learning_rate": 2e-3, "warmup": 50, "ema": 0.99,
        },
        "full": {
            "skip": True, "combine": True, "weighting": 0.5,
            "sampler": "ddim", "sampling_steps": 25, "samples": 8, "antithetic": True,
        },
    }  # fmt: skip

    def network(self) -> Network:
        return Network(self.config)

    def schedule(self) -> Tensor:
        """Levels sqrt(gamma_t), t = 0..T."""
        config = self.config
        return linear_schedule(config.diffusion_steps, config.first_beta, config.last_beta)

    def loss(self, net: Any, source: Tensor, target: Tensor) -> Tensor:
        """Eq. 3 for normalised pairs (n, 1, h, w), at one random level an image; see ``weighting``."""
        levels = random_levels(self.schedule(), len(source)).to(source.device)
        noise = torch.randn_like(target)
        y = noised(target / net.scale, noise, levels[:, None, None, None])
        error = (net(torch.cat([source, y], dim=1), levels) - noise).square().mean(dim=(1, 2, 3))
        return (error * levels ** (-2 * self.config.weighting)).mean()

    def fit(self, train: TrainingData, budget: Budget) -> None:
        """Learn from pairs of a noisy and the clean image. Raises SupervisionError where none are allowed."""
        batch = self.batches(train)
        net: Any = self.fresh()
        # units in which clean images have spread 1, as the schedule expects; samples keep to the range seen
        clean = (train.clean - train.clean.mean()) / train.clean.std()
        net.scale.fill_(float(train.clean.std()) / train.sigma)
        net.low.fill_(float(clean.min()))
        net.high.fill_(float(clean.max()))
        self.info = run_training(net, batch, self.loss, self.config, budget, self.seed, self.device, self.name)
        self.state = net.state_dict()

    @torch.no_grad()
    def path(self, images: Tensor, sigma: float, sample: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """One sample of each of the images (n, h, w) as it comes to be: after every step y_t and the clean image
        guessed on the way, both (n, h, w) in the images' units. Another number ``sample`` gives another one, drawn for
        the images turned in another way (both of an antithetic pair in the same): the mean then does for free a part
        of what ``over_turns`` does.

        Raises CryobenchError before fit or load.
        """
        config = self.config
        turned = TURNS[(sample // 2 if config.antithetic else sample) % len(TURNS)]
        images = turn(images.to(self.device), *turned)
        mean, unit = images.mean(), self.unit(images, sigma)
        net: Any = self.trained_network()
        height, width = images.shape[1:]
        x = F.pad(
            (images - mean)[:, None] / unit, (0, -width % self.multiple, 0, -height % self.multiple), mode="replicate"
        )
        bfloat16 = pick_precision(config.precision, self.device) == "bfloat16"

        def predict(y: Tensor, level: float) -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16):
                out = apply_tiled(
                    lambda pair: net(pair, pair.new_full((len(pair),), level)),
                    torch.cat([x, y], dim=1), self.margin, self.multiple,
                )  # fmt: skip
            return out[:, None]

        generator = torch.Generator(self.device)
        negative = config.antithetic and config.sampler != "ancestral" and sample % 2
        generator.manual_seed(stream_seed(self.seed, "sample", sample - 1 if negative else sample))
        start = torch.randn(x.shape, generator=generator, device=self.device)
        levels = fewer_levels(self.schedule(), config.sampling_steps)
        limits = float(net.low), float(net.high)
        for pair in walk(predict, -start if negative else start, levels, config.sampler, limits, generator):
            y, guess = (v[:, 0, :height, :width] * (unit * net.scale) + mean for v in pair)
            yield turn_back(y, *turned), turn_back(guess, *turned)

    def draw(self, images: Tensor, sigma: float, samples: int) -> Tensor:
        """Samples 0, 1, ... of each of the images (n, h, w): (samples, n, h, w), on the CPU."""
        return torch.stack([self._sample(images, sigma, k).cpu() for k in range(samples)])

    def _sample(self, images: Tensor, sigma: float, sample: int) -> Tensor:
        *_, (y, _) = self.path(images, sigma, sample)
        return y

    def denoise(self, images: Tensor, sigma: float | None = None) -> Tensor:
        """Mean of the samples, the same at every call; images of any size, sigma as in :class:`Denoiser`.

        Raises CryobenchError before fit or load.
        """
        if self.unit(images, sigma) == 0:
            self.trained_network()
            return images
        total = torch.zeros_like(images)
        for k in range(self.config.samples):
            total += self._sample(images, float(sigma or 0), k)
        return total / self.config.samples
