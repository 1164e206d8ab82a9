"""Which projection of a reference is nearest to a noisy image.

All images are compared with a grid of poses at low frequencies in one matrix product; then each image's best pose is
turned a little about the three axes, in ever smaller steps and with higher frequencies. It is a search for one pose,
hundreds of times cheaper than the posterior over all of them (:mod:`cryobench.methods.pose_posterior`), and always
returns a projection, whether the image shows the reference or not.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cryobench.imaging import orientation_grid as so3
from cryobench.imaging.boxes import fit_into
from cryobench.imaging.projection import CHUNK, Projector
from cryobench.imaging.rings import ring_index

if TYPE_CHECKING:
    from cryobench.imaging.ctf import ContrastTransfer

#: degrees between the poses of the grid
SPACING = 10.0
#: highest frequency compared with the grid, and then around the best pose in each of the rounds; cycles per box.
#: At 10 cycles a step of the grid shifts density at a quarter of the box from the centre by half a wave at most
COARSE, ROUNDS = 10, (14, 20)
#: images compared with the grid at once
IMAGES = 256


class ReferenceMatch:
    """Finds the nearest projections of one volume.

    volume: (d, d, d), in units of the images. noise_power: relative variance of the noise at each frequency,
    (d, d // 2 + 1) in the layout of rfft2, None for white noise. filters: (1, d, d // 2 + 1), multiplied onto the
    projections where no CTF is given. Means play no part, neither the images' nor the projections'.
    """

    def __init__(self, volume: Tensor, noise_power: Tensor | None = None, filters: Tensor | None = None) -> None:
        self.projector = Projector(volume)
        self.size, self.device, self.filters = self.projector.size, self.projector.device, filters
        self.pixels, self.points = self.projector.half_plane()
        self.radius = self.points.norm(dim=0)
        weight = ring_index((self.size, self.size))[1].to(self.device, torch.float32)
        if noise_power is not None:
            weight = weight / noise_power.to(self.device, torch.float32).flatten()
        self.weight = torch.where(self.radius > 0, weight[self.pixels], 0.0)

    def projections(self, images: Tensor, ctf: ContrastTransfer | None = None) -> Tensor:
        """The nearest projection of each image (n, h, w), centred like them and of that shape, on their device.

        ctf: of the images, multiplied onto the projections. Of images larger than the volume only the middle is
        compared, and the rest of what is returned is empty.
        """
        found = torch.empty_like(images, dtype=torch.float32)
        for start in range(0, len(images), IMAGES):
            part = slice(start, start + IMAGES)
            filters = self.filters if ctf is None else ctf[part].images(self.size, self.device)
            poses = self.rotations(images[part], filters)
            found[part] = fit_into(self.projector.project(poses, filters=filters), tuple(images.shape[1:]))
        return found

    def rotations(self, images: Tensor, filters: Tensor | None = None) -> Tensor:
        """The poses (n, 3, 3) of :meth:`projections`: those of least squared error in units of the noise.

        filters: (n or 1, d, d // 2 + 1), see :class:`ReferenceMatch`.
        """
        boxes = fit_into(images.to(self.device, torch.float32), (self.size, self.size))
        data = torch.fft.rfft2(torch.fft.ifftshift(boxes, dim=(-2, -1))).flatten(1)[:, self.pixels]
        gain = torch.ones(1, len(self.pixels), device=self.device)
        if filters is not None:
            gain = filters.to(self.device).flatten(1)[:, self.pixels]
        match, power = data * gain * self.weight, gain.square() * self.weight
        poses, band, waves, energy = self._grid
        scores = torch.view_as_real(match[:, band]).flatten(1) @ waves - power[:, band] @ energy
        best, step = poses[scores.argmax(1)], math.radians(SPACING)
        for highest in ROUNDS:
            step /= 3
            best = self._around(best, step, highest, match, power)
        return best

    @cached_property
    def _grid(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Poses (m, 3, 3); which coefficients are compared (b,); slices (2 b, m), real and imaginary; half their
        squares (b, m)."""
        band = (self.radius <= COARSE).nonzero()[:, 0]
        poses = so3.to_matrices(so3.grid(math.radians(SPACING), self.device)[0])
        step = max(1, CHUNK.get(self.device.type, 2**16) // len(band))
        slices = torch.cat([self.projector.sample(part, self.points[:, band]) for part in poses.split(step)])
        return poses, band, torch.view_as_real(slices).flatten(1).T, slices.abs().square().T / 2

    def _around(self, poses: Tensor, step: float, highest: float, match: Tensor, power: Tensor) -> Tensor:
        """The best of each pose (n, 3, 3) and its 26 neighbours, turned by ``step`` radians about one to three axes."""
        band = (self.radius <= highest).nonzero()[:, 0]
        angles = torch.tensor([-step, 0.0, step], device=self.device)
        turns = _small_turns(torch.cartesian_prod(angles, angles, angles))
        chunk = max(1, CHUNK.get(self.device.type, 2**16) // (len(band) * len(turns)))
        best = torch.empty_like(poses)
        for start in range(0, len(poses), chunk):
            part = slice(start, start + chunk)
            tried = poses[part, None] @ turns
            slices = self.projector.sample(tried.flatten(0, 1), self.points[:, band]).unflatten(0, tried.shape[:2])
            own = (power if len(power) == 1 else power[part])[:, None, band]
            scores = (slices * match[part, None, band].conj()).real - slices.abs().square() * own / 2
            index = scores.sum(2).argmax(1)
            best[part] = tried[torch.arange(len(index), device=self.device), index]
        return best


def _small_turns(vectors: Tensor) -> Tensor:
    """Rotations (n, 3, 3) by vectors (n, 3): about their direction, by their length in radians."""
    x, y, z = vectors.unbind(1)
    zero = torch.zeros_like(x)
    return torch.linalg.matrix_exp(torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], 1).view(-1, 3, 3))
