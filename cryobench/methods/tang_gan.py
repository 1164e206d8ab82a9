"""What ``gan`` and ``gan-perceptual``, the two GANs of Tang et al. (2022), share: networks, fit, the terms of the loss.

Tang, Wang, Ouyang, Liu, "A noise extraction method for cryo-EM single-particle denoising", Journal on Big Data 4(1),
2022, doi 10.32604/jbd.2022.028078.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cryobench.methods.base import Budget
from cryobench.methods.learned import Learned
from cryobench.methods.nets.tang_gan import Discriminator, Generator
from cryobench.methods.training import Batch, Loss, Player, TrainConfig, seeded
from cryobench.methods.training import train as run_training

if TYPE_CHECKING:
    from cryobench.imaging.training_data import TrainingData


@dataclass(frozen=True)
class TangConfig(TrainConfig):
    """The paper gives no number; those of the networks and of the training are pix2pix's (Isola et al. 2017) where it
    has one, but for steps and batch: a step at 256 px takes an H200 43 ms."""

    width: int = 64
    blocks: int = 6
    # Deviation for short training (the paper: 1): the generator works on patches of pixels, see Generator.
    patch: int = 1
    discriminator: int = 64
    # the discriminator's learning rate, as a multiple of the generator's
    discriminator_rate: float = 1.0
    steps: int = 2500
    batch_size: int = 16
    learning_rate: float = 2e-4
    beta1: float = 0.5
    # pix2pix: no average over weights.
    ema: float = 0.999
    # The mean over turns and mirrors of the input, as for all networks but sr3 (the paper: off).
    self_ensemble: bool = False


class Adversaries(nn.Module):
    """A generator and a discriminator as one model, for the training loop.

    low, high: range of the clean images in the generator's units; the discriminator sees it as [-1, 1].
    """

    def __init__(self, generator: Generator, discriminator: Discriminator, low: float, high: float) -> None:
        super().__init__()
        self.generator, self.discriminator = generator, discriminator
        self.low, self.high = low, max(high, low + 1e-6)

    def scaled(self, images: Tensor) -> Tensor:
        """The range [low, high] brought to [-1, 1], float32."""
        return (images.float() - self.low) * (2 / (self.high - self.low)) - 1

    def judge(self, *images: Tensor) -> Tensor:
        """The discriminator's logits for images (n, 1, h, w) laid beside each other as channels, float32."""
        return torch.as_tensor(self.discriminator(torch.cat([self.scaled(v) for v in images], dim=1))).float()


class Parts:
    """The terms of a loss, one row a step; NaN where another process computed the step, before a fit was resumed."""

    def __init__(self, steps: int, names: tuple[str, ...]) -> None:
        self.names, self.step = names, 0
        self.rows = torch.full((steps, len(names)), float("nan"))

    def watch(self, batch: Batch) -> Batch:
        """The same batches; each also says which step is being computed."""

        def watched(step: int, batch_size: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
            self.step = step
            return batch(step, batch_size, seed, device)

        return watched

    def note(self, *terms: Tensor) -> None:
        """Keep this step's terms; where a batch is computed in pieces, those of the last one."""
        self.rows = self.rows.to(terms[0].device)  # no waiting for the GPU but once
        self.rows[self.step] = torch.stack([term.detach().float() for term in terms])

    def curve(self, most: int = 200) -> list[list[float]]:
        """``[[step, term, ...], ...]``, means of the steps that were noted, at most ``most`` of them."""
        width = -(-len(self.rows) // most)
        found = []
        for first in range(0, len(self.rows), width):
            part = self.rows[first : first + width]
            part = part[part.isfinite().all(dim=1)]
            if len(part):
                found.append([min(first + width, len(self.rows)), *part.mean(dim=0).tolist()])
        return found


class TangGan(Learned):
    """Base of the two GANs; not a method itself. ``judged``: how many images the discriminator sees side by side."""

    Config = TangConfig
    judged = 1

    @property
    def multiple(self) -> int:
        return int(4 * self.config.patch)

    @property
    def margin(self) -> int:
        """Kernels of 7 see 3 patches, those of the residual blocks one place of 4 patches each; a step between two
        levels, at most one place of the finer on the way down, of the coarser on the way up."""
        return int(self.config.patch * (15 + 8 * self.config.blocks))

    def network(self) -> Generator:
        return Generator(self.config.width, self.config.blocks, self.config.patch)

    def adversaries(self, train: TrainingData) -> Adversaries:
        """Both networks with fresh weights, which depend on the seed alone.

        Raises SupervisionError where no clean images are allowed.
        """
        mean, sigma = float(train.noisy.mean()), max(train.sigma, 1e-12)
        low, high = ((float(v) - mean) / sigma for v in train.clean.aminmax())
        with seeded(self.seed, self.device):
            model = Adversaries(self.network(), Discriminator(self.judged, self.config.discriminator), low, high)
            return model.to(self.device)

    def play(
        self, model: Adversaries, batch: Batch, discriminate: Loss, generate: Loss, parts: Parts, budget: Budget
    ) -> None:
        """Train both in turns, the discriminator first; only the generator is kept. parts: noted by the losses."""
        players = [
            Player(model.discriminator, discriminate, rate=self.config.discriminator_rate),
            Player(model.generator, generate),
        ]
        self.info = run_training(
            model, parts.watch(batch), players, self.config, budget, self.seed, self.device, self.name
        )
        self.info.update(part_names=list(parts.names), parts=parts.curve())
        self.state = model.generator.state_dict()
