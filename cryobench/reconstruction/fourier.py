"""A volume from particle images with known poses, by direct Fourier insertion.

The transform of an image is a central slice of the volume's (see :mod:`cryobench.imaging.projection`). Each
of its samples is spread over the eight nearest cells of a padded 3D grid with trilinear weights; samples
times CTF are divided by the sum of the weights times CTF^2, the least-squares solution cell by cell. The
kernel multiplies the volume by a separable sinc^2, which is divided out at the end.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from cryobench.errors import CryobenchError
from cryobench.imaging.projection import checked_rotations, shift_phases
from cryobench.imaging.rotations import symmetry_matrices

#: samples spread at once: a few working arrays of this length
_CHUNK = {"cpu": 2**19, "cuda": 2**24}


class Backprojector:
    """Collects images and turns them into a volume of ``size`` voxels a side, z, y, x, on the CPU.

    padding: how much finer than the images' the 3D grid is. symmetry: point group as RELION names it; each image counts
    in all its equivalent poses (rotations that turn the grid into itself, as all of C2, C4, T and O do, are applied to
    the grid at the end, once for all images). nearest: each sample goes to the nearest cell alone, eight times faster
    and as good where many noisy slices dither its place. Memory: about 6 padding^3 size^3 bytes.
    Raises CryobenchError for padding below 1 and for unknown groups.
    """

    def __init__(
        self,
        size: int,
        symmetry: str = "C1",
        padding: float = 2,
        device: torch.device | str = "cpu",
        nearest: bool = False,
    ) -> None:
        if padding < 1:
            raise CryobenchError(f"padding must be at least 1, not {padding}")
        self.size, self.device, self._nearest = size, torch.device(device), nearest
        turns, others = _turns_and_others(symmetry_matrices(symmetry))
        self._turns, self._symmetry = turns, others.to(self.device, torch.float32)
        self._padded = m = 2 * round(padding * size / 2)
        # only x >= 0 is kept, the rest being conjugate; y and z wrap around
        self._shape = (m, m, m // 2 + 2)
        cells = m * m * (m // 2 + 2)
        self._sum = torch.zeros(cells, dtype=torch.complex64, device=self.device)
        self._weight = torch.zeros(cells, device=self.device)
        ky = torch.fft.fftfreq(size, 1 / size, device=self.device)[:, None].expand(size, size // 2 + 1)
        kx = torch.arange(size // 2 + 1, dtype=torch.float32, device=self.device).expand_as(ky)
        # strictly inside Nyquist, where a sample and its conjugate are told apart
        self._inside = 4 * (kx**2 + ky**2) < size**2
        self._points = torch.stack([kx[self._inside], ky[self._inside]]) * (m / size)
        #: how many slices, equivalent poses included, went in
        self._slices = 0

    @torch.no_grad()
    def insert(
        self, images: Tensor, rotations: Tensor, shifts: Tensor | None = None, ctf: Tensor | None = None
    ) -> None:
        """Add images (n, d, d) seen through rotations (n, 3, 3), as ``Projector.project`` defines them.

        shifts: (n, 2) pixels (x, y) by which the content was moved; ctf: (n or 1, d, d // 2 + 1) real, in the
        layout of rfft2, by which the transforms were multiplied.
        Raises CryobenchError for shapes that do not fit and for images that are not finite.
        """
        n, d = len(images), self.size
        if images.shape[1:] != (d, d):
            raise CryobenchError(f"images must be square, {d} pixels a side, not {tuple(images.shape[1:])}")
        if len(rotations) != n or (shifts is not None and shifts.shape != (n, 2)):
            raise CryobenchError(f"{n} images need {n} rotations and, if any, shifts of shape ({n}, 2)")
        if ctf is not None and (ctf.shape[1:] != (d, d // 2 + 1) or len(ctf) not in (1, n)):
            raise CryobenchError(f"the CTF must be ({n} or 1, {d}, {d // 2 + 1}), not {tuple(ctf.shape)}")
        if not torch.isfinite(images).all():
            raise CryobenchError("images hold NaN or infinite values: mend or remove those images first")
        rotations = checked_rotations(rotations)
        step = self._step(self._points.shape[1])
        for start in range(0, n, step):
            part = slice(start, start + step)
            origin = torch.fft.ifftshift(images[part].to(self.device, torch.float32), dim=(-2, -1))
            slices = torch.fft.rfft2(origin)
            if shifts is not None:
                slices *= shift_phases(-shifts[part].to(self.device, torch.float32), d)
            values = slices[:, self._inside]
            weights = torch.ones_like(values.real)
            if ctf is not None:
                factors = (ctf if len(ctf) == 1 else ctf[part]).to(self.device, torch.float32)
                factors = factors[:, self._inside]
                values, weights = values * factors, weights * factors**2
            self.insert_slices(values, weights, rotations[part], self._points * (d / self._padded))

    @torch.no_grad()
    def insert_slices(self, values: Tensor, weights: Tensor, rotations: Tensor, points: Tensor) -> None:
        """Add sums (n, m) of transforms times what they were multiplied by, and of its squares as their weights, seen
        through rotations (n, 3, 3) at points (2, m), kx >= 0 and ky in cycles per image, strictly within Nyquist."""
        # the column kx = 0 holds both members of each conjugate pair
        share = torch.where(points[0] == 0, 0.5, 1.0).to(self.device)
        points = points.to(self.device) * (self._padded / self.size)
        self._slices += len(values) * len(self._symmetry) * len(self._turns)
        step = self._step(points.shape[1])
        for start in range(0, len(values), step):
            part = slice(start, start + step)
            turned = rotations[part].to(self.device, torch.float32)
            value, weight = (x[part].to(self.device) * share for x in (values, weights))
            for symmetry in self._symmetry:
                self._spread(symmetry @ turned, value, weight, points)

    def _step(self, points: int) -> int:
        """How many slices of so many points are spread at once."""
        return max(1, _CHUNK.get(self.device.type, 2**19) // points)

    def _spread(self, rotations: Tensor, values: Tensor, weights: Tensor, points: Tensor) -> None:
        m, _, nx = self._shape
        position = (rotations[:, :, :2].transpose(0, 1).reshape(-1, 2) @ points).view(3, -1)  # x, y, z
        # the half at x < 0 is that of the conjugates
        sign = torch.where(position[0] < 0, -1.0, 1.0)
        position *= sign
        parts = torch.view_as_real(values.reshape(-1)).clone()
        parts[:, 1] *= sign
        value, weight = torch.view_as_complex(parts), weights.reshape(-1)
        if self._nearest:
            place = position.round_()
            place[1:] += m * (place[1:] < 0)
            x, y, z = place.to(torch.int32 if len(self._sum) < 2**31 else torch.int64)
            cell = (z * m + y) * nx + x
            self._sum.index_add_(0, cell, value)
            self._weight.index_add_(0, cell, weight)
            return
        corner = position.floor()
        fraction = position - corner
        for near in range(8):
            step = torch.tensor([near & 1, near >> 1 & 1, near >> 2], device=self.device)[:, None]
            x, y, z = corner.long() + step
            share = torch.where(step == 1, fraction, 1 - fraction).prod(0)
            cell = (z % m * m + y % m) * nx + x
            self._sum.index_add_(0, cell, value * share)
            self._weight.index_add_(0, cell, weight * share)

    def __add__(self, other: Backprojector) -> Backprojector:
        """The collection of both: the whole map from two halves."""
        if self._shape != other._shape:
            raise CryobenchError("only collections of the same size and padding can be added")
        both = Backprojector.__new__(Backprojector)
        added = {name: getattr(self, name) + getattr(other, name) for name in ("_sum", "_weight", "_slices")}
        both.__dict__.update(self.__dict__, **added)
        return both

    def shell_weights(self) -> Tensor:
        """Mean weight of the cells of each shell (size // 2 + 1,): what the samples there know, in units of one."""
        m = self._padded
        weight = len(self._turns) * _complete(self._weight.view(self._shape))  # turning keeps the shells
        shell = (shells(m, self.device) * (self.size / m)).round().long().clamp(max=self.size // 2 + 1).flatten()
        multiplicity = torch.full((m // 2 + 1,), 2.0, dtype=torch.float64, device=self.device)
        multiplicity[[0, -1]] = 1  # of a conjugate pair the half space holds one
        sums = torch.zeros(2, self.size // 2 + 2, dtype=torch.float64, device=self.device)
        for row, values in zip(sums, (weight, torch.ones_like(weight)), strict=True):
            row.index_add_(0, shell, (values * multiplicity).flatten())
        return (sums[0] / sums[1].clamp(min=1))[:-1].float()

    @torch.no_grad()
    def volume(self, floor: float = 1e-2, prior: Tensor | None = None) -> Tensor:
        """The volume (size, size, size), float32.

        floor: a cell with less than this part of the mean weight that its shell would have without CTF is
        divided by that instead, so that noise near a zero of the CTF is not blown up without bounds.
        prior: (size // 2 + 1,), added to the weights of each shell instead: the inverse of the volume's expected power
        there, in units of the weights, makes the result the mean of the posterior (a Wiener filter cell by cell);
        infinity leaves nothing of a shell.
        """
        d, m = self.size, self._padded
        total, weight = (_turned(_complete(x.view(self._shape)), self._turns) for x in (self._sum, self._weight))
        radius = shells(m, self.device)
        # a slice has (d / m)^2 samples per cell of its plane: 2 pi r of them fall on a shell of 4 pi r^2 cells
        least = floor * self._slices * (d / m) ** 2 / (2 * radius.clamp(min=1))
        least[radius > m // 2] = 0
        if prior is None:
            weight = torch.maximum(weight, least)
        else:
            at = (radius * (d / m)).round().long().clamp(max=d // 2 + 1)
            beyond = torch.full((1,), torch.inf, device=self.device)
            weight = weight + torch.cat([prior.to(self.device, torch.float32), beyond])[at]
        transform = torch.where(weight > 0, total / weight.where(weight > 0, 1.0), 0)
        if m == 2 * d:
            _fill_beside_origin(transform)
        volume = torch.fft.fftshift(torch.fft.irfftn(transform, s=(m, m, m)))
        first = m // 2 - d // 2
        inner = slice(first, first + d)
        axis = torch.arange(d, device=self.device) - d // 2
        kernel = torch.sinc(axis / m) ** (1 if self._nearest else 2)
        return (volume[inner, inner, inner] / (kernel[:, None, None] * kernel[:, None] * kernel)).cpu()


@functools.lru_cache(maxsize=4)
def shells(size: int, device: torch.device) -> Tensor:
    """The whole number of cycles per box nearest to each frequency of rfftn of a volume (size, size, size // 2 + 1), on
    the device, as far as size // 2; all beyond count as size // 2 + 1."""
    k = torch.fft.fftfreq(size, 1 / size, device=device) ** 2
    squared = k[:, None, None] + k[:, None] + torch.fft.rfftfreq(size, 1 / size, device=device) ** 2
    return squared.sqrt().round().long().clamp(max=size // 2 + 1)


@functools.cache
def _beside_origin() -> tuple[Tensor, Tensor, Tensor]:
    """Cells z, y, x nearer than 2 to the origin (26, 3); those at 0 and from 2 to 4 (k, 3); and how the transform at
    the former follows from the latter (26, k): the mean of a Gaussian process, whose covariance is the transform of a
    Gaussian density with a standard deviation of a tenth of the padded box."""
    axis = torch.arange(-4, 5)
    cells = torch.cartesian_prod(axis, axis, axis)
    radius = cells.double().norm(dim=1)
    inner = cells[(radius > 0) & (radius < 2)]
    outer = cells[(radius == 0) | ((radius >= 2) & (radius <= 4))]

    def covariance(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-2 * (math.pi / 10) ** 2 * torch.cdist(a.double(), b.double()).square())

    known = covariance(outer, outer) + 1e-6 * torch.eye(len(outer), dtype=torch.float64)
    return inner, outer, torch.linalg.solve(known, covariance(outer, inner)).T.float()


def _fill_beside_origin(transform: Tensor) -> None:
    """In place, for a half space (m, m, m // 2 + 1) at padding 2: the cells beside the origin, where no sample lies.

    The samples nearest to the origin are at frequencies 0 and 1 cycle per image, two cells out. Left to the gridding,
    these cells cost the volume a good part of its mean.
    """
    inner, outer, weights = _beside_origin()

    def places(cells: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, y, x = torch.where(cells[:, 2:] < 0, -cells, cells).to(transform.device).unbind(1)
        return z, y, x

    known = transform[places(outer)]
    known = torch.where((outer[:, 2] < 0).to(known.device), known.conj(), known)
    filled = weights.to(known) @ known
    kept = inner[:, 2] >= 0
    transform[places(inner[kept])] = filled[kept.to(filled.device)]


def _turns_and_others(group: Tensor) -> tuple[Tensor, Tensor]:
    """Those of a group's rotations (n, 3, 3) that turn a cubic grid into itself, whole numbers, a group again; and
    others, such that each element of the group is a product of one of the former with one of the latter."""
    whole = (group - group.round()).abs().amax((1, 2)) < 1e-6
    turns, left, others = group[whole].round(), group, []
    while len(left):
        others.append(left[0])
        left = left[torch.cdist(left.flatten(1), (turns @ left[0]).flatten(1)).amin(1) > 1e-3]
    return turns.long(), torch.stack(others)


def _turned(grid: Tensor, turns: Tensor) -> Tensor:
    """Sum of a half space (m, m, m // 2 + 1), z, y, x, turned by each of the rotations (n, 3, 3) of whole numbers."""
    if len(turns) == 1:
        return grid
    m, total = len(grid), torch.zeros_like(grid)
    beyond = grid[..., 1 : m // 2].flip((0, 1, 2)).roll((1, 1), (0, 1)).conj()
    full = torch.cat([grid, beyond], -1)
    for turn in turns.flip((1, 2)):  # z, y, x as the grid
        # along its axis i the turned grid runs as the old one does along axis source[i], forwards or backwards
        source = turn.abs().argmax(1).tolist()
        backwards = [axis for axis, old in enumerate(source) if turn[axis, old] < 0]
        new = full.permute(source)
        if backwards:
            new = new.flip(backwards).roll([1] * len(backwards), backwards)
        total += new[..., : m // 2 + 1]
    return total


def _complete(grid: Tensor) -> Tensor:
    """Half space x = 0 .. m / 2 with the conjugates of what fell on the plane x = 0."""
    grid = grid[..., :-1].clone()
    plane = grid[..., 0]
    mirrored = plane.flip((0, 1)).roll((1, 1), (0, 1))
    grid[..., 0] = plane + mirrored.conj()
    return grid


def reconstruct(
    images: Tensor,
    rotations: Tensor,
    shifts: Tensor | None = None,
    ctf: Tensor | None = None,
    symmetry: str = "C1",
    padding: float = 2,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Volume (d, d, d), z, y, x, from images (n, d, d); the arguments are those of :class:`Backprojector`."""
    collected = Backprojector(images.shape[-1], symmetry, padding, device)
    collected.insert(images, rotations, shifts, ctf)
    return collected.volume()


def reconstruct_halves(
    images: Tensor,
    rotations: Tensor,
    shifts: Tensor | None = None,
    ctf: Tensor | None = None,
    symmetry: str = "C1",
    subsets: Tensor | None = None,
    padding: float = 2,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """The map of all images, and of each half; subsets: (n,) of 1 and 2 (RELION's rlnRandomSubset).

    Without subsets every second image goes to the second half. Raises CryobenchError for an empty half.
    """
    n = len(images)
    subsets = torch.arange(n) % 2 + 1 if subsets is None else subsets
    halves = []
    for number in (1, 2):
        chosen = (subsets == number).nonzero()[:, 0]
        if len(subsets) != n or len(chosen) == 0:
            raise CryobenchError(f"half maps need a subset, 1 or 2, for each of the {n} images, and both in use")
        half = Backprojector(images.shape[-1], symmetry, padding, device)
        own_ctf = ctf if ctf is None or len(ctf) == 1 else ctf[chosen]
        half.insert(images[chosen], rotations[chosen], None if shifts is None else shifts[chosen], own_ctf)
        halves.append(half)
    return (halves[0] + halves[1]).volume(), halves[0].volume(), halves[1].volume()
