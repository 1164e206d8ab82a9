"""RobustGAN: a GAN whose critic is judged by a proper score of the beta family, and an L1 term.

Gu, Xian, Unarta, Yao, "Generative adversarial networks for robust cryo-EM image denoising", arXiv 2008.07307 (2020);
settings from the authors' code. A critic D that says with probability p "this image is clean" earns S(p, 1) if it is
and S(p, 0) if it was made by the generator G from a noisy image y. D is to earn much, G to let it earn little:

    loss of D = -E S(D(x), 1) - E S(D(G(y)), 0)
    loss of G =  E S(D(G(y)), 0) + 10 E |x - G(y)|    (mean over pixels)

    S(p, 1) = -integral over c from p to 1 of c^(alpha - 1) (1 - c)^beta
    S(p, 0) = -integral over c from 0 to p of c^alpha (1 - c)^(beta - 1)

The family is that of Buja, Stuetzle and Shen, "Loss functions for binary class probability estimation and
classification" (2005); Gao, Yao, Zhu, "Generative adversarial nets for robust scatter estimation: a proper scoring
rule perspective", JMLR 21(160) (2020), use it for GANs. alpha = beta = 0 is the logarithmic score (cross-entropy, the
Jensen-Shannon GAN), 1 the Brier score.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cryobench.errors import CryobenchError
from cryobench.imaging.particles import stream_seed
from cryobench.methods.nets.residual_gan import PlainUnit, ResidualGAN, critic_trunk, small_weights
from cryobench.methods.training import Batch, TrainConfig

if TYPE_CHECKING:
    from cryobench.imaging.training_data import TrainingData

CONTAMINATED = ("", "targets", "inputs", "both")


@dataclass(frozen=True)
class Config(TrainConfig):
    """The authors' code for simulated images, where nothing else is said."""

    widths: tuple[int, ...] = (64, 128, 256)
    units: tuple[int, ...] = (3, 3, 3)
    critic_widths: tuple[int, ...] = (64, 128, 256)
    critic_units: tuple[int, ...] = (2, 2, 3)
    alpha: float = 0.5
    beta: float = 0.5
    #: D's probabilities are clamped to [epsilon, 1 - epsilon]: beyond, nobody is pushed any more
    epsilon: float = 0.01
    # The code sums over the critic's patches (13 x 13 at 128 px) where it should average, which weighs the critic 169
    # times more than the formula. Ours is the formula.
    adversarial: float = 1.0
    penalty: str = "l1"
    penalty_weight: float = 10.0
    # Code: batch 10, 20 epochs of 2,500 steps.
    steps: int = 3000
    batch_size: int = 32
    learning_rate: float = 0.01
    critic_rate: float = 0.001
    #: D learns in every n-th step
    critic_every: int = 2
    beta1: float = 0.5
    # Code: constant rate and no average over weights. Ours: as all methods here.
    ema: float = 0.999
    # Paper: off. The mean over turns and mirrors of the input, as for all networks but sr3.
    self_ensemble: bool = False
    #: share of the training images whose "targets", "inputs" or "both" (the paper's types 1, 2, 3) are replaced by
    #: uniform noise: the paper's test of robustness
    contaminated: str = ""
    contamination: float = 0.0


class Critic(nn.Module):
    """Images (n, 1, h, w) -> probabilities of "clean" (n, 1, p, q), one a patch. It does not see the noisy image."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *critic_trunk(1, config.critic_widths, config.critic_units, PlainUnit),
            nn.Conv2d(config.critic_widths[-1], 1, 4),
        )
        small_weights(self)

    def forward(self, images: Tensor) -> Tensor:
        return torch.sigmoid(self.layers(images).float())


class Method(ResidualGAN):
    """RobustGAN on images in units of the noise, relative to the mean of the stack."""

    name = "robustgan"
    paper = "gu2020betagan"
    supervision = "clean-pairs"
    Config = Config
    residual_unit = PlainUnit
    critic_places = 4
    profiles: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "widths": (16, 32),
            "units": (1, 1),
            "critic_widths": (8, 16),
            "critic_units": (1, 1),
            "steps": 120,
            "batch_size": 8,
            "warmup": 5,
            "ema": 0.9,
            "self_ensemble": True,
        },
        # half as wide as the paper's, with fewer units: 64 px on one CPU core
        "quick": {
            "widths": (32, 64, 128),
            "units": (1, 2, 3),
            "critic_widths": (16, 32, 64),
            "critic_units": (1, 1, 1),
            "steps": 700,
            "batch_size": 8,
            # 600 steps at the paper's rate ended 0.2 dB lower than 500 at this one (development run, channel)
            "learning_rate": 3e-3,
            "warmup": 50,
            "ema": 0.99,
            "self_ensemble": True,
        },
        "full": {"self_ensemble": True},
    }

    def critic(self) -> nn.Module:
        return Critic(self.config)

    def turns(self) -> tuple[float, int]:
        return self.config.critic_rate / self.config.learning_rate, self.config.critic_every

    def batches(self, train: TrainingData) -> Batch:
        """As for all methods, with ``contamination`` where the configuration asks for it."""
        return contaminate(super().batches(train), self.config.contaminated, self.config.contamination)

    def critic_loss(self, game: nn.ModuleDict, noisy: Tensor, clean: Tensor) -> Tensor:
        with torch.no_grad():
            made = game["generator"](noisy)
        return -self._earned(game["critic"](clean), True) - self._earned(game["critic"](made), False)

    def generator_loss(self, game: nn.ModuleDict, noisy: Tensor, clean: Tensor) -> Tensor:
        made, config = game["generator"](noisy), self.config
        distance = F.l1_loss(made, clean) if config.penalty == "l1" else F.mse_loss(made, clean)
        loss = config.penalty_weight * distance
        if config.adversarial:
            loss = loss + config.adversarial * self._earned(game["critic"](made), False)
        return loss

    def _earned(self, probability: Tensor, clean: bool) -> Tensor:
        config = self.config
        clamped = probability.clamp(config.epsilon, 1 - config.epsilon)
        return beta_score(clamped, clean, config.alpha, config.beta).mean()


def beta_score(probability: Tensor, happened: bool, alpha: float, beta: float) -> Tensor:
    """S(p, 1) or S(p, 0) of the beta family, at most 0, for probabilities in (0, 1) of any shape.

    alpha, beta > -1. Proper: what happens with probability q earns most, on average, if p = q is said.
    """
    if not happened:  # by c -> 1 - c
        probability, alpha, beta = 1 - probability, beta, alpha
    # With c = 1 - (1 - p) u^2 the integrand has no singularity at c = 1, whatever beta is
    nodes, weights = _quadrature(probability.device)
    rest = 1 - probability[..., None]
    integrand = (1 - rest * nodes**2) ** (alpha - 1) * 2 * rest ** (beta + 1) * nodes ** (2 * beta + 1)
    return -(integrand * weights).sum(-1)


@cache
def _quadrature(device: torch.device) -> tuple[Tensor, Tensor]:
    """Nodes and weights of Gauss and Legendre on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(64)
    both = torch.as_tensor(np.stack([(nodes + 1) / 2, weights / 2]), dtype=torch.float32, device=device)
    return both[0], both[1]


def contaminate(batch: Batch, kind: str, share: float) -> Batch:
    """The batches with a share of their images replaced by noise, uniform over the range of the others.

    kind: one of CONTAMINATED; each image is replaced or kept on its own, depending on seed and step alone. With "both",
    input and target are independent noise. Raises CryobenchError for another kind or a share outside [0, 1].
    """
    if kind not in CONTAMINATED or not 0 <= share <= 1:
        raise CryobenchError(f"contamination: {kind!r} with share {share}; one of {CONTAMINATED}, share from 0 to 1")
    if not kind or not share:
        return batch

    def contaminated(step: int, batch_size: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(stream_seed(seed, step, "contamination"))
        replaced = (torch.rand(batch_size, 1, 1, 1, generator=generator) < share).to(device)
        stacks = []
        for stack, name in zip(batch(step, batch_size, seed, device), ("inputs", "targets"), strict=True):
            low, high = stack.aminmax()
            uniform = torch.rand(stack.shape, generator=generator).to(device) * (high - low) + low
            stacks.append(torch.where(replaced, uniform, stack) if kind in (name, "both") else stack)
        return stacks[0], stacks[1]

    return contaminated
