"""Where images come from: the modes of their posterior over orientations and shifts, given a volume.

An image's transform is a central slice of the volume's, times CTF and gain, plus noise. In units of the noise, with
data y and model C S(R) exp(-2 pi i k.t / d), the log likelihood is -|y - a C S|^2 / 2. A grid over SO(3), one matrix
product at low frequencies, gives each image its best cells. From there Levenberg and Marquardt's method climbs to the
modes, whose curvature is their width: posteriors this narrow are Gaussian.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cryobench.imaging import orientation_grid as so3
from cryobench.imaging.rings import ring_index
from cryobench.imaging.slices import SliceTable

#: floats held at once by a step of the search
FLOATS = {"cpu": 2**25, "cuda": 2**29}
#: part of the best score that a start may lack as long as it has not climbed
SLACK = 0.15
#: coefficients of slices made at once: on a CPU the working set should stay in the cache
CHUNK = {"cpu": 2**16, "cuda": 2**22}


class Frame:
    """The Fourier coefficients of images (d, d) inside the Nyquist circle, by rising frequency.

    pixels: places (m,) in rfft2's layout; points (2, m): kx, ky in cycles per image; radius (m,); multiplicity (m,);
    width: of the box, in the pixels that shifts are counted in (d, but for a frame of images made smaller).
    """

    def __init__(self, size: int, device: torch.device | str = "cpu", width: int | None = None) -> None:
        self.size, self.device, self.width = size, torch.device(device), width or size
        ky = torch.fft.fftfreq(size, 1 / size)[:, None].expand(size, size // 2 + 1)
        kx = torch.arange(size // 2 + 1, dtype=torch.float32).expand_as(ky)
        radius = torch.hypot(kx, ky).flatten()
        order = radius.argsort(stable=True)
        self.pixels = order[2 * radius[order] < size].to(self.device)
        self.points = torch.stack([kx.flatten(), ky.flatten()]).to(self.device)[:, self.pixels]
        self.radius = radius.to(self.device)[self.pixels]
        self.multiplicity = ring_index((size, size))[1].to(self.device, torch.float32)[self.pixels]

    def within(self, radius: float) -> int:
        """How many coefficients have at most this frequency: they are the first."""
        return int((self.radius <= radius).sum())

    def transform(self, images: Tensor) -> Tensor:
        """Coefficients (n, m) of images (n, d, d), whose origin is pixel d // 2."""
        origin = torch.fft.ifftshift(images.to(self.device, torch.float32), dim=(-2, -1))
        return torch.fft.rfft2(origin).flatten(1)[:, self.pixels]

    def images(self, coefficients: Tensor) -> Tensor:
        """Images (n, d, d) of coefficients (n, m)."""
        n, d = len(coefficients), self.size
        full = torch.zeros(n, d * (d // 2 + 1), dtype=torch.complex64, device=self.device)
        full[:, self.pixels] = coefficients
        return torch.fft.fftshift(torch.fft.irfft2(full.view(n, d, -1), s=(d, d)), dim=(-2, -1))


@dataclass(frozen=True)
class Views:
    """Images as the search wants them, in units of their noise: data (n, m) complex; gain (n or 1, m), by which a
    slice is multiplied to be compared with data. |data - gain S|^2 / 2 is minus the log likelihood."""

    frame: Frame
    data: Tensor
    gain: Tensor

    @classmethod
    def of(cls, frame: Frame, images: Tensor, noise: Tensor, ctf: Tensor | None = None) -> Views:
        """images (n, d, d) of background 0; noise: standard deviation (m,) at each frequency, in their units (sigma
        everywhere for white noise); ctf: (n or 1, d, d // 2 + 1)."""
        scale = frame.multiplicity.sqrt() / (frame.size * noise)
        gain = scale[None]
        if ctf is not None:
            gain = ctf.to(frame.device).flatten(1)[:, frame.pixels] * scale
        return cls(frame, frame.transform(images) * scale, gain)

    def scaled(self, gains: Tensor) -> Views:
        """With the model of each image multiplied by its gain (n,)."""
        return replace(self, gain=self.gain * gains[:, None])

    def tempered(self, heat: float | Tensor) -> Views:
        """As if the variance of the noise were ``heat`` times as large; of each image its own: (n, 1)."""
        return replace(self, data=self.data * heat**-0.5, gain=self.gain * heat**-0.5)

    def shrunk(self, size: int) -> Views:
        """The same as images (size, size) of the same box: their low frequencies alone."""
        frame = Frame(size, self.frame.device, self.frame.width)
        m = len(frame.radius)  # in either frame the first, in the same order
        return Views(frame, self.data[:, :m].contiguous(), self.gain[:, :m].contiguous())

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, part: slice | Tensor) -> Views:
        return replace(self, data=self.data[part], gain=self.gain if len(self.gain) == 1 else self.gain[part])


@dataclass(frozen=True)
class Modes:
    """Poses (p) of images: owner (p,), rotations (p, 3, 3), shifts (p, 2) in pixels, score (p,): log likelihood, up to
    a constant of the image; spread (p, q, q): the posterior's covariance there is spread spread^T (radians about the
    axes of the image, then pixels)."""

    owner: Tensor
    rotations: Tensor
    shifts: Tensor
    score: Tensor
    spread: Tensor

    def evidence(self) -> Tensor:
        """Log (p,) of the likelihood's integral over each mode, a Gaussian."""
        return self.score + self.spread.det().abs().log() + self.spread.shape[1] / 2 * math.log(2 * math.pi)

    def __getitem__(self, part: Tensor) -> Modes:
        return Modes(*(x[part] for x in vars(self).values()))

    @classmethod
    def cat(cls, parts: Sequence[Modes]) -> Modes:
        return cls(*(torch.cat(x) for x in zip(*(vars(part).values() for part in parts), strict=True)))


def softmax(scores: Tensor, owner: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Weights (p,) that sum to 1 over those of each owner, and the log (n,) of what they were divided by."""
    top = torch.full((n,), -math.inf, device=scores.device).scatter_reduce(0, owner, scores, "amax")
    weight = (scores - top[owner]).exp()
    total = torch.zeros_like(top).index_add_(0, owner, weight)
    return weight / total[owner], top + total.log()


@dataclass(frozen=True)
class Climb:
    """spacing: of the grid, degrees. band: it is compared up to this many cycles per image. most: modes of an image
    that are followed. window: a mode is given up when its score is this far below the best. steps: at most so many
    steps uphill. shift: images are off-centre by up to so many pixels (0: all centred). limit: no frequency above this
    is looked at, cycles per image."""

    spacing: float = 7.5
    band: float = 12.0
    most: int = 8
    window: float = 12.0
    steps: int = 6
    shift: float = 0.0
    limit: float = math.inf


class PoseClimber:
    """Finds the modes of images of one volume; group: rotations (order, 3, 3) that leave it as it is."""

    def __init__(self, table: SliceTable, frame: Frame, group: Tensor, climb: Climb) -> None:
        self.table, self.frame, self.climb = table, frame, climb
        cells, self.size = so3.grid(math.radians(climb.spacing), frame.device)
        rotations = so3.to_matrices(cells)
        self.grid = rotations[so3.in_domain(rotations, group.to(rotations), float(self.size[2]) / 2)]
        self.low = frame.within(min(climb.band, climb.limit))
        self.group = group.to(self.grid)

    def follow(self, views: Views, modes: Modes) -> Modes:
        """The modes of all images, from where they were for a volume that differs little."""
        return self._climb(views, modes.owner, modes.rotations, modes.shifts, near=True)

    def run(self, views: Views) -> Modes:
        """The modes of all images."""
        real, power = self._low_slices
        step = max(1, FLOATS.get(self.frame.device.type, 2**25) // len(self.grid))
        found = []
        for start in range(0, len(views), step):
            some = views[start : start + step]
            modes = self._climb(some, *self._coarse(some, real, power))
            found.append(replace(modes, owner=modes.owner + start))
        return Modes.cat(found)

    @functools.cached_property
    def _low_slices(self) -> tuple[Tensor, Tensor]:
        """Slices at all cells of the grid as real numbers (cells, 2 low), and their power (cells, low)."""
        slices = sample_slices(self.table, self.grid, self.frame, self.low)
        return torch.view_as_real(slices).flatten(1), slices.abs().square()

    def _coarse(self, views: Views, real: Tensor, power: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The best cells of each image, none beside a better one: owner, rotations, shifts."""
        low, n = self.low, len(views)
        gain, shifts = views.gain[:, :low], shift_grid(self.climb.shift, self.frame.device)
        norm = gain.square() @ power.T / 2
        best = torch.full((n, len(real)), -math.inf, device=real.device)
        where = torch.zeros(n, len(real), dtype=torch.int16, device=real.device)
        for j, shift in enumerate(shifts):
            moved = views.data[:, :low] * gain * phases(shift[None], self.frame, low, back=True)
            scores = torch.view_as_real(moved).flatten(1) @ real.T - norm
            where.masked_fill_(scores > best, j)
            best = torch.maximum(best, scores)
        count = min(4 * self.climb.most, best.shape[1])
        top, index = best.topk(count, dim=1)
        rotations = self.grid[index]  # (n, count, 3, 3)
        # nearest of all equivalent poses; greedy choice of the best, then of those not near a better one
        traces = torch.stack([torch.einsum("nkab,nlab->nkl", rotations, s @ rotations) for s in self.group]).amax(0)
        near = traces > 1 + 2 * math.cos(1.5 * float(self.size[2]))
        kept = torch.ones_like(top, dtype=torch.bool)
        for k in range(1, count):
            kept[:, k] = ~(near[:, k, :k] & kept[:, :k]).any(1)
        kept &= kept.cumsum(1) <= self.climb.most
        kept &= top > top[:, :1] - self._slack(top[:, :1])
        owner = kept.nonzero()[:, 0]
        return owner, rotations[kept], shifts[where.gather(1, index)[kept].long()]

    def _slack(self, top: Tensor) -> Tensor:
        """How far below the best a start may be: a cell's centre misses the top of its mode by a part of its height."""
        return (SLACK * top).clamp(min=2 * self.climb.window)

    def _climb(self, views: Views, owner: Tensor, rotations: Tensor, shifts: Tensor, near: bool = False) -> Modes:
        """Levenberg-Marquardt from each start; what falls behind is dropped on the way."""
        n, every = len(views), self.frame.within(self.climb.limit)
        damping = torch.full((len(owner),), 0.03, device=owner.device)
        now = Modes(owner, rotations, shifts, torch.full_like(damping, -math.inf), damping[:, None, None])
        slope = torch.zeros(len(owner), 0, device=owner.device)
        trial_rotations, trial_shifts = rotations, shifts
        for k in range(2 if near else 0, 5 if near else self.climb.steps):
            m = self.frame.within(min(1.5 * self.climb.band, self.climb.limit)) if k < 2 else every
            if k == 2:  # scores with more frequencies cannot be compared with those before
                now = replace(now, score=torch.full_like(now.score, -math.inf))
            score, first, second = self._slopes(views, now.owner, trial_rotations, trial_shifts, m)
            if k == 0 or k == 2 or not slope.shape[1]:
                slope, curvature = first, second
            better = score > now.score
            pick = better[:, None, None]
            now = replace(
                now,
                rotations=torch.where(pick, trial_rotations, now.rotations),
                shifts=torch.where(pick[:, 0], trial_shifts, now.shifts),
                score=torch.where(better, score, now.score),
            )
            slope = torch.where(pick[:, 0], first, slope)
            curvature = torch.where(pick, second, curvature)
            damping = torch.where(better, damping / 4, damping * 8)
            top = torch.full((n,), -math.inf, device=owner.device).scatter_reduce(0, now.owner, now.score, "amax")
            slack = self._slack(top) if k < 2 else torch.full_like(top, self.climb.window)
            left = now.score > (top - slack)[now.owner]
            now, slope, curvature, damping = now[left], slope[left], curvature[left], damping[left]
            damped = curvature + damping[:, None, None] * torch.diag_embed(curvature.diagonal(dim1=1, dim2=2))
            damped += 1e-6 * torch.eye(damped.shape[1], device=damped.device)
            step = torch.linalg.solve(damped, slope[..., None])[..., 0]
            limit = 0.7 * float(self.size[2])
            step = step * (limit / step[:, :3].norm(dim=1).clamp(min=limit))[:, None]
            trial_rotations = now.rotations @ turn_by(step[:, :3])
            trial_shifts = now.shifts + step[:, 3:] if step.shape[1] > 3 else now.shifts
        return self._without_doubles(replace(now, spread=self._spread(curvature)), n)

    def _spread(self, curvature: Tensor) -> Tensor:
        """Roots of the covariances: in directions that the likelihood says little about no wider than a cell."""
        unit = torch.full((curvature.shape[1],), float(self.size[2]), device=curvature.device)
        unit[3:] = max(self.climb.shift, 1.0)
        values, vectors = torch.linalg.eigh(curvature * unit * unit[:, None])
        return unit[:, None] * vectors * values.clamp(min=1.0).rsqrt()[:, None]

    def _slopes(self, views: Views, owner: Tensor, rotations: Tensor, shifts: Tensor, m: int) -> tuple[Tensor, ...]:
        """Score (p,), its gradient (p, q) and the Gauss-Newton curvature (p, q, q)."""
        points = self.frame.points[:, :m]
        kx, ky = points
        moves = self.climb.shift > 0
        found = []
        step = max(1, CHUNK.get(self.frame.device.type, 2**16) // m)
        for start in range(0, len(owner), step):
            part = slice(start, start + step)
            mine = views[owner[part]]
            gain = mine.gain[:, :m]
            value, (gx, gy, gz) = self.table.with_slopes(rotations[part], points)
            wave = phases(shifts[part], self.frame, m) if moves else None
            by_pose = [ky * gz, -kx * gz, kx * gy - ky * gx]
            if moves:
                turns = -2j * math.pi / self.frame.width * value
                by_pose += [turns * kx, turns * ky]
            model = value * gain
            slopes = torch.stack(by_pose, 1) * gain[:, None]
            data = mine.data[:, :m] if wave is None else mine.data[:, :m] * wave.conj()
            rest = torch.view_as_real(data - model).flatten(1)
            j = torch.view_as_real(slopes).flatten(2)
            score = (torch.view_as_real(model).flatten(1) * (rest + torch.view_as_real(model).flatten(1) / 2)).sum(1)
            found.append((score, (j @ rest[..., None])[..., 0], j @ j.mT))
        return tuple(torch.cat(x) for x in zip(*found, strict=True))

    def _without_doubles(self, modes: Modes, n: int) -> Modes:
        """Each mode once: those of an image that climbed to the same top are the same."""
        order = modes.score.argsort(descending=True)
        modes = modes[order[modes.owner[order].argsort(stable=True)]]
        count = torch.bincount(modes.owner, minlength=n)
        rank = torch.arange(len(modes.owner), device=count.device) - (count.cumsum(0) - count)[modes.owner]
        kept = torch.ones_like(rank, dtype=torch.bool)
        tolerance = 1 + 2 * math.cos(0.2 * float(self.size[2]))
        for gap in range(1, int(count.max())):
            other = (torch.arange(len(rank), device=rank.device) - gap).clamp(min=0)
            relative = modes.rotations[other] @ modes.rotations.mT
            trace = torch.stack([(relative * s.T).sum((1, 2)) for s in self.group]).amax(0)
            kept &= ~((trace > tolerance) & (rank >= gap))
        return modes[kept]


def sample_slices(table: SliceTable, rotations: Tensor, frame: Frame, m: int) -> Tensor:
    """The first m coefficients of slices through all rotations (n, 3, 3)."""
    step = max(1, CHUNK.get(frame.device.type, 2**16) // m)
    return torch.cat([table.sample(part, frame.points[:, :m]) for part in rotations.split(step)])


def shift_grid(reach: float, device: torch.device) -> Tensor:
    """Shifts (s, 2) by whole pixels up to ``reach``."""
    steps = torch.arange(-math.ceil(reach), math.ceil(reach) + 1, dtype=torch.float32, device=device)
    return torch.cartesian_prod(steps, steps)


def phases(shifts: Tensor, frame: Frame, m: int, back: bool = False) -> Tensor:
    """Factors (n, m) that move images by shifts (n, 2), pixels (x, y), or back."""
    angle = (shifts @ frame.points[:, :m]) * (2 * math.pi / frame.width)
    return torch.polar(torch.ones_like(angle), angle if back else -angle)


def turn_by(vectors: Tensor) -> Tensor:
    """Rotations (n, 3, 3) about vectors (n, 3) by their length in radians."""
    x, y, z = vectors.unbind(1)
    o = torch.zeros_like(x)
    cross = torch.stack([torch.stack(r, 1) for r in ([o, -z, y], [z, o, -x], [-y, x, o])], 1)
    return torch.linalg.matrix_exp(cross)
