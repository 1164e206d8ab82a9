"""SR3 with a U-Net after it: the method that Zhang et al. propose.

Zhang, Zhao, Hu, Zhao, "Robust single-particle cryo-EM image denoising and restoration", arXiv 2401.01097 (2024),
section 2.1.2: the diffusion model of :mod:`cryobench.methods.sr3` "can quickly reveal the particle structure, but it
takes longer time to gradually reduce noise". They therefore train it briefly, 200 epochs instead of 5000, draw samples
of the training images, and train "a simple U-Net" g to make the clean image y_0 of them (section 2.2):

    min  E |g(sample of f_theta given x) - y_0|^2.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from cryobench.imaging.particles import stream_seed
from cryobench.imaging.training_data import augmented
from cryobench.methods import sr3
from cryobench.methods.base import Budget
from cryobench.methods.learned import Learned
from cryobench.methods.nets.unet import UNet, reach
from cryobench.methods.training import train as run_training

if TYPE_CHECKING:
    from cryobench.imaging.training_data import TrainingData

DIFFUSION = "diffusion."  # before the names of the diffusion model's tensors among those of the state


@dataclass(frozen=True)
class Config(sr3.Config):
    """What ``sr3`` has describes the diffusion model; ``post_...`` and what follows, the U-Net (the paper gives none
    of its settings). Of ``sr3``'s, ``blocks``, ``norm``, ``patch`` and the optimiser's serve both networks."""

    samples: int = 1
    # Of the 4,000 steps of sr3 (the paper: 200 epochs of 5000, 1/25; the diffusion model would not have settled here)
    steps: int = 1500
    post_widths: tuple[int, ...] = (48, 96, 192, 192)
    post_steps: int = 2500
    # training images whose samples are drawn, once
    outputs: int = 8000
    # Whether the U-Net sees the noisy image beside the sample. The paper does not say; it calls the U-Net
    # post-processing, which we read as: the sample alone, which knows less than the noisy image does.
    sees_noisy: bool = False
    # The result is the mean over eight turns and mirrors of the U-Net's input.
    self_ensemble: bool = True


class Method(Learned):
    """A U-Net on one sample of a diffusion model."""

    name = "sr3-post"
    paper = "zhang2024"
    supervision = "clean-pairs"
    costly = True
    Config = Config
    profiles: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            **sr3.Method.profiles["smoke"], "samples": 1,
            "post_widths": (8, 16), "post_steps": 100, "outputs": 64,
        },
        "quick": {
            **sr3.Method.profiles["quick"], "samples": 1, "steps": 350, "sampling_steps": 3,
            "post_widths": (32, 64, 128), "post_steps": 1500, "outputs": 2000,
        },
        "full": {**sr3.Method.profiles["full"], "samples": 1},
    }  # fmt: skip

    @property
    def multiple(self) -> int:
        return int(self.config.patch * 2 ** (len(self.config.post_widths) - 1))

    @property
    def margin(self) -> int:
        return reach(len(self.config.post_widths), self.config.blocks, self.config.patch)

    def network(self) -> nn.Module:
        c = self.config
        return UNet(2 if c.sees_noisy else 1, 1, c.post_widths, c.blocks, c.patch, norm=c.norm)

    def diffusion(self, seed: int | None = None) -> sr3.Method:
        """The diffusion model with what it learned so far; another seed gives other samples."""
        names = [field.name for field in dataclasses.fields(sr3.Config)]
        config = sr3.Config(**{name: getattr(self.config, name) for name in names})
        model = sr3.Method(config, self.device, self.seed if seed is None else seed)
        model.state = {k.removeprefix(DIFFUSION): v for k, v in self.state.items() if k.startswith(DIFFUSION)}
        return model

    def weights(self) -> dict[str, Tensor]:
        return {k: v for k, v in self.state.items() if not k.startswith(DIFFUSION)}

    def seen(self, images: Tensor) -> Tensor:
        """Samples of normalised images (n, h, w), beside these if it ``sees_noisy``: (n, c, h, w)."""
        return self._beside(images, self.diffusion().denoise(images, 1.0).to(images))

    def _beside(self, images: Tensor, samples: Tensor) -> Tensor:
        return torch.stack([images, samples] if self.config.sees_noisy else [samples], dim=1)

    def outputs(self, train: TrainingData) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy images, one sample of each, clean images: normalised, (n, h, w), on the CPU, the same at every call.

        The images are those of batches after the ones that the diffusion model learned from: of images that it knows
        by heart the samples would be too good (of a stack without simulator they are the same images again).
        """
        n, at_once = self.config.outputs, 64
        draw = self.diffusion().batches(train)
        parts = [
            draw(self.config.steps + k // at_once, min(at_once, n - k), self.seed, self.device)
            for k in range(0, n, at_once)
        ]
        noisy, clean = (torch.cat([part[i] for part in parts])[:, 0] for i in range(2))
        samples = self.diffusion(stream_seed(self.seed, "outputs")).denoise(noisy, 1.0)
        return noisy.cpu(), samples, clean.cpu()

    def fit(self, train: TrainingData, budget: Budget) -> None:
        """Train the diffusion model, draw samples, train the U-Net. Raises SupervisionError without clean images."""
        started, kept = time.monotonic(), budget.checkpoint
        aside = None if kept is None else kept.with_name(f"{kept.stem}-diffusion{kept.suffix}")
        model = self.diffusion()
        model.fit(train, dataclasses.replace(budget, checkpoint=aside))
        self.state = {DIFFUSION + name: value for name, value in model.state.items()}
        drawn = time.monotonic()
        stacks = self.outputs(train)
        drawn, left = time.monotonic() - drawn, budget.seconds
        if left is not None:
            left = max(0.0, left - (time.monotonic() - started))

        def batch(step: int, batch_size: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
            noisy, samples, clean = augmented(stacks, batch_size, stream_seed(seed, step, "choice"))
            return self._beside(noisy, samples).to(device), clean[:, None].to(device)

        config, net = dataclasses.replace(self.config, steps=self.config.post_steps), self.fresh()
        budget = dataclasses.replace(budget, seconds=left)
        self.info = run_training(net, batch, self.loss, config, budget, self.seed, self.device, self.name)
        self.info["diffusion"] = model.info
        self.info["seconds"] = round(self.info["seconds"] + model.info["seconds"] + drawn, 2)
        self.state |= net.state_dict()
        if aside is not None:
            aside.unlink(missing_ok=True)
