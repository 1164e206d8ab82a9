"""A first volume from nothing but noisy images: annealed expectation-maximisation over a grid of orientations.

Few frequencies, a coarse grid, turned at random before each iteration, and a likelihood that is flattened
(scores / heat). Hot, all orientations weigh alike and the volume is round. At some heat the round volume becomes
unstable and takes shape within a few iterations; where it does so slowly it finds the right shape, from any start.
So the heat falls by a few per cent an iteration, and not at all while the evidence still rises. It ends above 1: the
grid is coarser than the posterior, and a likelihood taken at its word would send images to wrong cells.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cryobench.imaging import orientation_grid as so3
from cryobench.imaging.rotations import random_rotations
from cryobench.imaging.slices import SliceTable
from cryobench.methods import em_classes
from cryobench.methods.em_poses import FLOATS, Views, phases, sample_slices, shift_grid
from cryobench.reconstruction.fourier import Backprojector

#: what is added to the weight of each cell, as a part of its shell's mean
RIDGE = 0.1


@dataclass(frozen=True)
class Annealing:
    """band: frequencies up to this, cycles per image. spacing: of the grid, degrees. hot, cool: first and last heat, as
    parts of the images' mean signal in units of the noise (|signal|^2 / sigma^2, some hundred); never below 1. rate:
    what the heat is multiplied by in each iteration in which the evidence rose by less than ``rise`` of the signal.
    most: at most so many iterations.
    """

    band: float = 8.0
    spacing: float = 15.0
    hot: float = 1 / 40
    cool: float = 1 / 220
    rate: float = 0.94
    rise: float = 0.005
    most: int = 80


class GridEM:
    """EM over a grid of all orientations, and of whole-pixel shifts up to ``shift``."""

    def __init__(self, views: Views, annealing: Annealing, generator: torch.Generator, shift: float = 0.0) -> None:
        self.views, self.annealing, self.generator = views, annealing, generator
        self.m = views.frame.within(annealing.band)
        self.shifts = shift_grid(shift, views.frame.device)
        data = views.data[:, 1 : self.m]
        noise = float(views.frame.multiplicity[1 : self.m].sum())
        #: mean |signal|^2 of an image, in units of the noise
        self.signal = max(float(data.abs().square().sum(1).mean()) - noise, 0.05 * noise)
        #: log evidence (n,) of each image being no view but junk as strong as the views
        self.junk = em_classes.junk_evidence(views, em_classes.signal_power(views), self.m)
        self.worth = torch.ones(len(views), device=data.device)

    def run(self) -> tuple[Tensor, float]:
        """A volume of a small box (:func:`box_for`), and the mean log evidence of an image before the last step."""
        a, volume = self.annealing, self.blobs()
        heat, before, evidence = a.hot * self.signal, -math.inf, 0.0
        for _ in range(a.most):
            volume, evidence = self.step(volume, max(heat, 1.0))
            if evidence - before < a.rise * self.signal or before == -math.inf:
                if heat <= max(1.0, a.cool * self.signal):
                    break
                heat *= a.rate
            before = evidence
        return volume, evidence

    def blobs(self) -> Tensor:
        """Twelve Gaussian blobs at random places about the centre, as strong as the images' signal."""
        size, frame = box_for(self.annealing.band), self.views.frame
        axis = torch.arange(size, dtype=torch.float32) - size // 2
        grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij")[::-1], -1)  # x, y, z
        centres = torch.randn(12, 3, generator=self.generator) * (size / 8)
        squared = (grid[..., None, :] - centres).square().sum(-1)
        volume = torch.exp(-squared / (2 * (size / 16) ** 2)).sum(-1).to(frame.device)
        slices = sample_slices(SliceTable(volume), random_rotations(32, self.generator, frame.device), frame, self.m)
        modelled = slices.abs().square().mean(0) * self.views.gain[:, : self.m].square().mean(0)
        return volume * (self.signal / modelled[1:].sum().clamp(min=1e-30)).sqrt()

    def step(self, volume: Tensor, heat: float) -> tuple[Tensor, float]:
        """One iteration: the next volume, and the mean log evidence of an image before it."""
        views, frame, m = self.views, self.views.frame, self.m
        cells, _ = so3.grid(math.radians(self.annealing.spacing), frame.device)
        rotations = so3.to_matrices(cells) @ random_rotations(1, self.generator, frame.device)[0]
        slices = sample_slices(SliceTable(volume), rotations, frame, m)
        real, power = torch.view_as_real(slices).flatten(1), slices.abs().square()
        sums, weights = torch.zeros_like(real), torch.zeros_like(power)
        own: list[Tensor] = []
        step = max(1, FLOATS.get(frame.device.type, 2**25) // (len(rotations) * len(self.shifts)))
        for start in range(0, len(views), step):
            some = views[start : start + step]
            gain = some.gain[:, :m]
            moved = some.data[:, None, :m] * gain[:, None] * phases(self.shifts, frame, m, back=True)
            moved = torch.view_as_real(moved).flatten(0, 1).flatten(1)  # (images * shifts, 2 m)
            scores = (moved @ real.T).view(len(some), len(self.shifts), -1) - (gain.square() @ power.T / 2)[:, None]
            scores = scores.flatten(1)
            own.append(scores.logsumexp(1) - math.log(scores.shape[1]))
            weight = torch.softmax(scores / heat, 1) * self.worth[start : start + step, None]
            sums += weight.view(-1, len(rotations)).T @ moved
            total = weight.view(len(some), -1, len(rotations)).sum(1).T
            weights += total @ gain.square() if len(gain) > 1 else total.sum(1)[:, None] * gain.square()
        back = Backprojector(len(volume), device=frame.device)
        used = weights.sum(1) > 1e-3 * weights.sum(1).mean()
        sums = torch.view_as_complex(sums.view(len(rotations), m, 2).contiguous())
        back.insert_slices(sums[used], weights[used], rotations[used], frame.points[:, :m])
        evidence = torch.cat(own)
        self.worth = em_classes.worth(evidence - self.junk)
        return back.volume(prior=RIDGE * back.shell_weights()).to(frame.device), float(evidence.mean())


def box_for(band: float) -> int:
    """The smallest even box whose Nyquist frequency is above ``band`` cycles per box."""
    return 2 * (math.floor(band) + 1)
