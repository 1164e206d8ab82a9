"""Taught one structure, shown another: how much worse it gets, and how much of the first appears in the second."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from cryobench.imaging.particles import Particles, Simulation, Simulator, stream_seed
from cryobench.imaging.training_data import TrainingData
from cryobench.methods.base import Budget, Denoiser
from cryobench.methods.registry import get_method
from cryobench.metrics.images import psnr
from cryobench.metrics.invention import excess, nearest, scramble
from cryobench.specimens.catalog import resolve


@dataclass(frozen=True)
class Sample:
    """Simulated images of one structure: some to learn from, others (``test``) to be tested on."""

    name: str
    simulator: Simulator
    train: Particles
    test: Particles
    seed: int

    @classmethod
    def simulated(cls, name: str, size: int, snr: float, n_train: int, n_test: int, seed: int) -> Sample:
        """White noise, no CTF. name: as for ``cryobench simulate``. Raises CryobenchError for an unknown structure."""
        structure = resolve(name)
        pixel_size = structure.pixel_size(size)
        volume, _ = structure.density(size, pixel_size)
        simulator = Simulator(volume, Simulation(size, pixel_size, snr=snr), symmetry=structure.symmetry)
        train, test = simulator.simulate(n_train + n_test, seed).split(n_train)
        return cls(structure.name, simulator, train, test, seed)

    @cached_property
    def projections(self) -> Tensor:
        """500 random projections (500, size, size)."""
        return self.simulator.draw(500, stream_seed(self.seed, "projections to compare with"))[0]

    def fit(self, method: str, profile: str = "quick", **options: Any) -> Denoiser:
        """A method fitted on these images, with hyper-parameters that differ from the profile's by name."""
        made = get_method(method)
        fitted = made(made.config_for(profile, **options), seed=self.seed)
        fitted.fit(
            TrainingData.simulated(made.supervision, self.train, self.simulator, self.seed), Budget(progress=False)
        )
        return fitted

    def noise(self, n: int) -> Tensor:
        """n boxes (n, size, size) without a particle: noise as strong as the images'."""
        clean = self.test.clean[:1].expand(n, -1, -1)
        noisy, _ = self.simulator.noisy(clean, stream_seed(self.seed, "pure noise"), self.test.sigma)
        return noisy - clean + self.test.offset


def transfer(fitted: Mapping[str, Denoiser], samples: Sequence[Sample], n: int) -> list[dict[str, Any]]:
    """Every fitted method (by the name of the sample it was fitted on) on the first n test images of every sample.

    Rows: ``taught``, ``shown``; ``psnr`` (dB) and ``loss``, how much lower it is than of the method taught the right
    structure. Then mean correlations with the nearest projection of the structure it was *taught*, both less their mean
    images, since any two centred particles share much of those: ``output`` of the outputs and ``truth`` of the clean
    images, which may resemble it too; ``error`` of output - clean, ``error_right`` of that of the rightly taught,
    ``error_null`` of the error scrambled; ``z``, error - error_right in its standard errors, paired image by image.
    """
    rows = []
    for shown in samples:
        noisy, clean, sigma = shown.test.noisy[:n], shown.test.clean[:n], shown.test.sigma
        outputs = {name: method.denoise(noisy, sigma) for name, method in fitted.items()}
        right = outputs[shown.name]
        for taught in samples:
            output = outputs[taught.name]
            error = _centred(output - clean)
            stacks = {
                "output": _centred(output),
                "truth": _centred(clean),
                "error": error,
                "error_right": _centred(right - clean),
                "error_null": scramble(error, torch.Generator().manual_seed(shown.seed)),
            }
            like = {name: nearest(x, _centred(taught.projections))[0] for name, x in stacks.items()}
            values, best = psnr(output, clean, 1.0), psnr(right, clean, 1.0)
            rows.append(
                {"taught": taught.name, "shown": shown.name, "psnr": float(values.mean())}
                | {"loss": float((best - values).mean()), **{name: float(x.mean()) for name, x in like.items()}}
                | {"z": excess(like["error"], like["error_right"][None])}
            )
    return rows


def _centred(stack: Tensor) -> Tensor:
    return stack - stack.mean(0)
