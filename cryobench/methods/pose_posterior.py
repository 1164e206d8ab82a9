"""Posterior over the poses of images of a known volume, and the mean projection under it.

An image is y = A P_R V + noise: its transform is a slice of V's through R, times the CTF A, plus Gaussian noise of
known power. With uniform R the posterior weight of a pose is ``exp(-|y - A P_R V|^2 / 2 sigma^2)``, and the posterior
mean of A P_R V is the estimate with the least mean squared error there is.

The integral over SO(3) is a sum over cells (:mod:`cryobench.imaging.orientation_grid`). All images are compared with
a coarse grid, at low frequencies, in one matrix product. Then, image by image, the cells that matter are split in
eight and compared again, with more frequencies as the cells shrink. At every step the sum is taken twice, over the
centres of the cells and over their corners; when the two agree, both together are the integral. (A sum over a regular
grid converges very fast as soon as its spacing is that of the posterior's width.) Where the noise is so strong that
much of the coarse grid matters, its whole is summed instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cryobench.imaging import orientation_grid as so3
from cryobench.imaging.projection import CHUNK, Projector
from cryobench.imaging.rings import ring_index

#: cells with more than this part of the posterior are split together with their neighbours
HEAVY = 0.02


@dataclass(frozen=True)
class Search:
    """How poses are searched.

    spacing: of the coarse grid, degrees. phase: frequencies are compared up to the one at which a step of the grid
    shifts the phase of density at the volume's root mean square radius by this many radians. mass: the cells that are
    split hold this part of the posterior. least, most: how many cells of an image are split at a time; an image that
    needs more than ``most`` is not split: its posterior is wide. tolerance: an image is done when doubling its cells
    moves the square of its mean by less than this part of its variance. levels: at most so many splits.
    """

    spacing: float = 7.5
    phase: float = 4.5
    least: int = 24
    most: int = 3000
    mass: float = 0.995
    tolerance: float = 0.01
    levels: int = 9


@dataclass(frozen=True)
class Posterior:
    """Per image: mean (n, d, d); variance (n,), the expected squared error of the mean per pixel; change (n,), by what
    part of the variance the last doubling of the cells moved the mean; cells (n,), how many share the weight:
    1 / sum of w^2."""

    mean: Tensor
    variance: Tensor
    change: Tensor
    cells: Tensor


class PoseSearch:
    """Finds the poses of images (n, d, d) of one volume.

    projector: of the volume, in the units of the images. noise_power: variance of the noise at each frequency,
    (d, d // 2 + 1) in the layout of rfft2; sigma^2 everywhere if it is white. group: rotations (order, 3, 3) that
    leave the volume as it is. radius: root mean square distance of its density from the centre, pixels.
    """

    def __init__(self, projector: Projector, noise_power: Tensor, group: Tensor, radius: float, search: Search) -> None:
        self.projector, self.search, self.reach = projector, search, radius
        self.device, d = projector.device, projector.size
        self.group = group.to(self.device, torch.float32)
        self.pixels, self.points = projector.half_plane()
        self.radius, self.every = self.points.norm(dim=0), torch.arange(len(self.pixels), device=self.device)
        multiplicity = ring_index((d, d))[1].to(self.device, torch.float32)[self.pixels]
        # sums of |coefficient|^2 times these: squared error per pixel; squared error in units of the noise
        self.energy = multiplicity / d**4
        self.weight = multiplicity / (d**2 * noise_power.to(self.device).flatten()[self.pixels])

    def run(self, images: Tensor, ctf: Tensor | None = None) -> Posterior:
        """The posterior of images (n, d, d), whose clean part is ctf (n or 1, d, d // 2 + 1) times a slice."""
        n, d = len(images), self.projector.size
        data = torch.fft.rfft2(torch.fft.ifftshift(images.to(self.device), dim=(-2, -1))).flatten(1)[:, self.pixels]
        one = torch.ones(1, len(self.pixels), device=self.device)
        gain = one if ctf is None else ctf.to(self.device).flatten(1)[:, self.pixels]
        match, power, energy = data * gain * self.weight, gain.square() * self.weight, gain.square() * self.energy
        mean = torch.zeros_like(data)
        variance, change, count = torch.full((3, n), math.inf, device=self.device)
        cells, owner, size, wide = self._coarse(match, power)
        if wide.any():
            some = [x if len(x) == 1 else x[wide] for x in (match, power, energy)]
            mean[wide], found = self._whole_grid(*some)
            variance[wide], change[wide], count[wide] = found
        for _ in range(self.search.levels + 1):
            better, found, centres, scores = self._integral(cells, owner, size, match, power, energy)
            done = wide | (change < self.search.tolerance)
            mean = torch.where(done[:, None], mean, better)
            variance, change, count = torch.where(done, torch.stack([variance, change, count]), found)
            band = self._band(size)
            if len(band) < len(self.pixels):  # at higher frequencies a cell's centre says nothing about its rim
                cells, owner = self._inside(cells, owner, 2 * float(size[2]))
                scores = self._scores(cells, owner, match, power, band)
            else:
                cells, owner = centres
            weight = _softmax(scores, owner, n)
            keep, much = self._heaviest(weight, owner, n)
            wide |= much
            active = ~(wide | (change < self.search.tolerance))[owner]
            keep, heavy = keep & active, (weight > HEAVY) & active
            if not keep.any():
                break
            # the posterior may lie next to the cells that came out best: they are split with their neighbours
            near, whose = so3.neighbours(cells[heavy], size, self.group), owner[heavy].repeat_interleave(6)
            cells, owner = _without_doubles(torch.cat([cells[keep], near]), torch.cat([owner[keep], whose]), size)
            cells, size = so3.split(cells, size)
            owner = owner.repeat_interleave(8)
        slices = torch.zeros(n, d * (d // 2 + 1), dtype=mean.dtype, device=self.device)
        slices[:, self.pixels] = mean * gain
        out = torch.fft.fftshift(torch.fft.irfft2(slices.view(n, d, -1), s=(d, d)), dim=(-2, -1))
        return Posterior(out.cpu(), variance.cpu(), change.cpu(), count.cpu())

    def _integral(
        self, cells: Tensor, owner: Tensor, size: Tensor, match: Tensor, power: Tensor, energy: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], Tensor]:
        """Sums over the centres and the corners of cells (m, 3), which belong to the images ``owner`` (m,).

        Returns mean slices (n, pixels); variance, change and count (3, n) as in :class:`Posterior`; the centres in the
        domain with their owners; and their scores.
        """
        n = len(match)
        centres, corners = self._inside(cells, owner), self._inside(cells + size / 2, owner)
        both, whose = torch.cat([centres[0], corners[0]]), torch.cat([centres[1], corners[1]])
        scores = self._scores(both, whose, match, power, self.every)
        weight = _softmax(scores, whose, n)
        place = torch.cat([centres[1], corners[1] + n])  # sums of the two lattices apart
        mean, errors = _moments(*self._sums(both, place, weight, energy, n), energy)
        squares = torch.zeros(n, device=self.device).index_add_(0, whose, weight.square())
        return mean, torch.stack([*errors, 1 / squares]), centres, scores[: len(centres[0])]

    def _whole_grid(self, match: Tensor, power: Tensor, energy: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`_integral` over all centres and corners of the coarse grid, for images whose posterior is wide."""
        cells, size = so3.grid(math.radians(self.search.spacing), self.device)
        lattices = [so3.to_matrices(c) for c in (cells, cells + size / 2)]
        lattices = [r[so3.in_domain(r, self.group)] for r in lattices]
        scores = [self._all_scores(rotations, match, power, self.every) for rotations in lattices]
        weights = torch.softmax(torch.cat(scores, 1), 1).split([len(r) for r in lattices], 1)
        total, first, square = [], [], []
        for rotations, weight in zip(lattices, weights, strict=True):
            total.append(weight.sum(1))
            mean, own = torch.zeros_like(match), torch.zeros_like(total[0])
            for part, slices in self._slices(rotations, self.every):
                share = weight[:, part]
                mean += torch.complex(share @ slices.real, share @ slices.imag)
                own += (share * (energy @ slices.abs().square().T)).sum(1)
            first.append(mean)
            square.append(own)
        mean, errors = _moments(torch.stack(total), torch.stack(first), torch.stack(square), energy)
        return mean, torch.stack([*errors, 1 / torch.stack([w.square().sum(1) for w in weights]).sum(0)])

    def _inside(self, cells: Tensor, owner: Tensor, margin: float = 0.0) -> tuple[Tensor, Tensor]:
        """The cells (m, 3), with their owners, whose centres are poses that no equivalent one stands for."""
        inside = so3.in_domain(so3.to_matrices(cells), self.group, margin)
        return cells[inside], owner[inside]

    def _band(self, size: Tensor) -> Tensor:
        """Which coefficients to compare on a grid of this cell size: indices of those of low frequency."""
        limit = self.search.phase * self.projector.size / (2 * math.pi * self.reach * float(size[2]))
        return (self.radius <= limit).nonzero()[:, 0]

    def _coarse(self, match: Tensor, power: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The best cells of the coarse grid: cells (m, 3), the image that each belongs to (m,), their size; and for
        which images (n,) they are too many."""
        cells, size = so3.grid(math.radians(self.search.spacing), self.device)
        rotations = so3.to_matrices(cells)
        inside = so3.in_domain(rotations, self.group, 2 * float(size[2]))
        cells = cells[inside]
        scores = self._all_scores(rotations[inside], match, power, self._band(size))
        best, index = scores.topk(min(self.search.most, len(cells)), dim=1)
        weight = (best - scores.logsumexp(1, keepdim=True)).exp()
        owner = torch.arange(len(match), device=self.device).repeat_interleave(index.shape[1])
        keep, wide = self._heaviest(weight.flatten(), owner, len(match))
        return cells[index.flatten()[keep]], owner[keep], size, wide

    def _all_scores(self, rotations: Tensor, match: Tensor, power: Tensor, band: Tensor) -> Tensor:
        """Log likelihood (n, m) of every pose (m, 3, 3) for every image, up to a constant of the image."""
        scores = torch.empty(len(match), len(rotations), device=self.device)
        match, power = match[:, band], power[:, band]
        for part, slices in self._slices(rotations, band):
            cross = match.real @ slices.real.T + match.imag @ slices.imag.T
            scores[:, part] = cross - power @ slices.abs().square().T / 2
        return scores

    def _slices(self, rotations: Tensor, band: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the volume through rotations (m, 3, 3) at some coefficients, a part of them at a time."""
        step = max(1, CHUNK.get(self.device.type, 2**16) // len(band))
        for start in range(0, len(rotations), step):
            part = slice(start, start + step)
            yield part, self.projector.sample(rotations[part], self.points[:, band])

    def _scores(self, cells: Tensor, owner: Tensor, match: Tensor, power: Tensor, band: Tensor) -> Tensor:
        """Log likelihood (m,) of each cell's pose for the image it belongs to, up to a constant of the image."""
        scores = torch.empty(len(cells), device=self.device)
        match, power = torch.view_as_real(match[:, band]).flatten(1), power[:, band]
        for part, slices in self._slices(so3.to_matrices(cells), band):
            mine = owner[part]
            cross = (torch.view_as_real(slices).flatten(1) * match[mine]).sum(1)
            scores[part] = cross - (slices.abs().square() * (power if len(power) == 1 else power[mine])).sum(1) / 2
        return scores

    def _sums(
        self, cells: Tensor, place: Tensor, weight: Tensor, energy: Tensor, n: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sums, by lattice and image, of w (2, n), w times slice (2, n, m) and w times energy with the CTF (2, n).

        place: n times the lattice, 0 or 1, plus the image, of each of the cells.
        """
        used = weight > 1e-6  # the rest would not be seen
        cells, place, weight = cells[used], place[used], weight[used]
        total = torch.zeros(2 * n, device=self.device).index_add_(0, place, weight)
        first = torch.zeros(2 * n, len(self.pixels), dtype=torch.complex64, device=self.device)
        square = torch.zeros_like(total)
        for part, slices in self._slices(so3.to_matrices(cells), self.every):
            first.index_add_(0, place[part], slices * weight[part, None])
            own = energy if len(energy) == 1 else energy[place[part] % n]
            square.index_add_(0, place[part], (slices.abs().square() * own).sum(1) * weight[part])
        return total.view(2, n), first.view(2, n, -1), square.view(2, n)

    def _heaviest(self, weight: Tensor, owner: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Which of the cells (m,) to split, image by image the heaviest; and which images (n,) would need too many."""
        order = weight.argsort(descending=True)
        order = order[owner[order].argsort(stable=True)]
        mine, count = owner[order], torch.bincount(owner, minlength=n)
        first = (count.cumsum(0) - count)[mine]
        sums = weight[order].double().cumsum(0) - weight[order]
        before = sums - sums[first]  # the weight of the heavier cells of the same image
        rank = torch.arange(len(order), device=owner.device) - first
        needed = before < self.search.mass
        chosen = (rank < self.search.least) | (needed & (rank < self.search.most))
        wide = torch.zeros(n, dtype=torch.bool, device=owner.device)
        wide[mine[needed & (rank >= self.search.most - 1)]] = True
        return torch.empty_like(chosen).index_put_((order,), chosen), wide


def _moments(total: Tensor, first: Tensor, square: Tensor, energy: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Mean (n, m), and its variance and change (n,), from the sums of two lattices (:meth:`PoseSearch._sums`)."""
    whole = total.sum(0).clamp(min=1e-30)
    mean = first.sum(0) / whole[:, None]
    variance = (square.sum(0) / whole - (mean.abs().square() * energy).sum(1)).clamp(min=0)
    one, other = first / total.clamp(min=1e-30)[..., None]
    # half the distance between the lattices' means: what the second one moves, if both hold as much
    moved = ((one - other).abs().square() * energy).sum(1) / 4
    return mean, (variance, moved / variance.clamp(min=1e-30))


def _without_doubles(cells: Tensor, owner: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Each cell of an image once, in the order of the images."""
    numbers = so3.numbers(cells, size)
    _, place = torch.unique(owner * (int(numbers.max()) + 1) + numbers, return_inverse=True)
    first = torch.empty(int(place.max()) + 1, dtype=torch.long, device=cells.device)
    first[place] = torch.arange(len(place), device=cells.device)
    return cells[first], owner[first]


def _softmax(scores: Tensor, owner: Tensor, n: int) -> Tensor:
    """Weights (m,) that sum to 1 over the cells of each image."""
    top = torch.full((n,), -math.inf, device=scores.device).scatter_reduce(0, owner, scores, "amax")
    weight = (scores - top[owner]).exp()
    return weight / torch.zeros_like(top).index_add_(0, owner, weight)[owner]
