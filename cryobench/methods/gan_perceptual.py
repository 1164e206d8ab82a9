"""GAN with perceptual loss (the proposed denoiser of Tang et al. 2022): a conditional GAN, L1 and fixed features.

Tang, Wang, Ouyang, Liu, "A noise extraction method for cryo-EM single-particle denoising", Journal on Big Data 4(1),
2022, doi 10.32604/jbd.2022.028078. With x the noisy and y the clean image:

    L_GAN(G, D) = E log D(x, y) + E log(1 - D(x, G(x, z)))                       (5)
    L_L1(G)     = E |y - G(x, z)|_1                                               (6)
    L_p         = C MSE(V(G(x)), V(y)),  V: features of a fixed VGG-19            (7)
    G*          = arg min_G max_D  L_GAN + lambda_1 L_L1 + lambda_2 L_p           (8)

The paper contradicts itself about what D sees: section 3.2.1 says the denoised and the clean image, section 3.2.2 and
eq. (5) say each of them beside the noisy x, as in Isola et al. 2017 ("pix2pix"). Ours is the latter. G's own noise z
is left out, as it is there: the noise of x is enough. G maximises log D(x, G(x)) instead of minimising log(1 - D),
which has no gradient where D is sure (Goodfellow et al. 2014).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cryobench.methods.base import Budget
from cryobench.methods.nets.perceptual import feature_network
from cryobench.methods.tang_gan import Adversaries, Parts, TangConfig, TangGan
from cryobench.methods.training import Batch, TrainConfig

if TYPE_CHECKING:
    from cryobench.imaging.training_data import TrainingData


@dataclass(frozen=True)
class Config(TangConfig):
    """The weights of the loss, which the paper leaves open."""

    # lambda_1 of eq. (8), for images in [-1, 1]: pix2pix's
    l1: float = 100.0
    # lambda_2 C of eqs. (7, 8) is set at the first step, so that the gradient of this term with respect to G(x) has
    # this share of that of the L1 term; 0 leaves the term out.
    perceptual: float = 0.1
    # V of eq. (7): "vgg19", "views" (trained here, see nets/perceptual.py), or "auto", the former where it is at hand
    features: str = "auto"
    feature_steps: int = 1000
    feature_batch: int = 64


class Method(TangGan):
    """Conditional GAN + L1 + perceptual loss on images in units of the noise, relative to the mean of the stack."""

    name = "gan-perceptual"
    paper = "tang2022"
    supervision = "clean-pairs"
    Config = Config
    judged = 2
    profiles: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "width": 8,
            "blocks": 2,
            "patch": 2,
            "discriminator": 8,
            "feature_steps": 15,
            "feature_batch": 16,
            "steps": 120,
            "batch_size": 8,
            "learning_rate": 5e-3,
            "warmup": 5,
            "ema": 0.9,
            "self_ensemble": True,
        },
        # The rate of pix2pix is for hundreds of thousands of steps; in hundreds it learns little. A discriminator as
        # fast as the generator cost 0.7 dB in a development run (tang2022, channel, width 16, 1000 steps).
        "quick": {
            "width": 32,
            "blocks": 4,
            "patch": 2,
            "discriminator": 16,
            "discriminator_rate": 0.25,
            "feature_steps": 60,
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
        """Learn from pairs of a noisy and the clean image. Raises SupervisionError where none are allowed."""
        config, batch = self.config, self.batches(train)
        model = self.adversaries(train)
        features: nn.Module | None = None
        facts: dict[str, Any] = {"name": "none"}
        weight = 0.0
        if config.perceptual:
            features, facts = self.features(model, batch, budget)
            weight = self.perceptual_weight(model, features, batch)
        parts = Parts(config.steps, ("adversarial", "L1", "perceptual"))

        def discriminate(m: Adversaries, noisy: Tensor, clean: Tensor) -> Tensor:
            with torch.no_grad():
                made = m.generator(noisy)
            real, false = m.judge(noisy, clean), m.judge(noisy, made)
            return 0.5 * (F.softplus(-real).mean() + F.softplus(false).mean())  # -log D(x, y) - log(1 - D(x, G(x)))

        def generate(m: Adversaries, noisy: Tensor, clean: Tensor) -> Tensor:
            made = m.generator(noisy)
            adversarial = F.softplus(-m.judge(noisy, made)).mean()  # -log D(x, G(x))
            l1 = config.l1 * F.l1_loss(m.scaled(made), m.scaled(clean))
            perceptual = torch.zeros_like(l1)
            if features is not None:
                perceptual = weight * feature_distance(features, m, made, clean)
            parts.note(adversarial, l1, perceptual)
            return adversarial + l1 + perceptual

        self.play(model, batch, discriminate, generate, parts, budget)
        self.info["seconds"] = round(self.info["seconds"] + facts.get("seconds", 0.0), 2)
        self.info.update(features=facts["name"], feature_network=facts, perceptual_weight=weight)

    def features(self, model: Adversaries, batch: Batch, budget: Budget) -> tuple[nn.Module, dict[str, Any]]:
        """V of eq. (7), fixed, and facts about it: its name, and how well it does what it was trained for here."""
        config = self.config

        def clean(step: int, batch_size: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
            source, target = batch(step, batch_size, seed, device)
            return source, unit_range(model, target)

        training = TrainConfig(  # with so few channels, bfloat16 is the slower one on a CPU
            steps=config.feature_steps, batch_size=config.feature_batch, learning_rate=5e-3, warmup=10,
            precision="float32",
        )  # fmt: skip
        return feature_network(config.features, clean, training, budget, self.seed, self.device)

    def perceptual_weight(self, model: Adversaries, features: nn.Module, batch: Batch) -> float:
        """lambda_2 C: what gives the perceptual term its share of the L1 term's gradient at the first step."""
        x, y = batch(0, self.config.batch_size, self.seed, self.device)
        with torch.no_grad():
            made = model.generator(x)
        made.requires_grad_()
        norms = []
        for term in (self.config.l1 * F.l1_loss(model.scaled(made), model.scaled(y)),
                     feature_distance(features, model, made, y)):  # fmt: skip
            norms.append(float(torch.autograd.grad(term, made)[0].norm()))
        return self.config.perceptual * norms[0] / max(norms[1], 1e-12)


def unit_range(model: Adversaries, images: Tensor) -> Tensor:
    """The range of the clean images brought to [0, 1], as the feature networks see it."""
    return (model.scaled(images) + 1) / 2


def feature_distance(features: nn.Module, model: Adversaries, made: Tensor, clean: Tensor) -> Tensor:
    """MSE(V(G(x)), V(y)) of eq. (7)."""
    with torch.no_grad():
        wanted = features(unit_range(model, clean)).float()
    return F.mse_loss(features(unit_range(model, made)).float(), wanted)
