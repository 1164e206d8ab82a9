"""Two volumes of one particle brought together: turned, moved and, if need be, mirrored.

Images say nothing about a volume's orientation nor its hand, so that every reconstruction from them has its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cryobench.imaging import orientation_grid as so3
from cryobench.imaging.rotations import random_rotations
from cryobench.imaging.slices import SliceTable
from cryobench.methods.em_poses import Frame, phases, sample_slices, turn_by
from cryobench.reconstruction.fourier import Backprojector

#: planes on which volumes are compared
PLANES = 32


@dataclass(frozen=True)
class Move:
    """Where to sample the second volume: at turn (3, 3) times the frequency, after moving it by shift (3,) pixels of
    the images (x, y, z), after mirroring it along x if ``mirrored``. correlation: with the first volume."""

    turn: Tensor
    shift: Tensor
    mirrored: bool
    correlation: float

    def apply(self, volume: Tensor) -> Tensor:
        """The second volume (d, d, d) in the place of the first."""
        d = len(volume)
        frame = Frame(d, volume.device)
        planes = random_rotations(max(200, 8 * d), torch.Generator().manual_seed(0), volume.device)
        table = SliceTable(mirrored(volume) if self.mirrored else volume)
        slices = sample_slices(table, self.turn @ planes, frame, len(frame.radius))
        slices = slices * wave(planes, self.turn, self.shift, frame, len(frame.radius))
        back = Backprojector(d, device=volume.device)
        back.insert_slices(slices, torch.ones_like(slices.real), planes, frame.points)
        return back.volume().to(volume.device)


def wave(planes: Tensor, turn: Tensor, shift: Tensor, frame: Frame, m: int) -> Tensor:
    """Factors (n, m) of a shift (3,) of the second volume, on planes of the first."""
    in_plane = torch.einsum("nab,a->nb", turn @ planes, shift)[:, :2]
    return phases(in_plane, frame, m)


def align(first: Tensor, second: Tensor, band: float, spacing: float = 15.0, shifts: bool = False) -> Move:
    """How to bring ``second`` to ``first``, both (d, d, d), comparing frequencies up to ``band`` cycles per image."""
    frame, device = Frame(len(first), first.device), first.device
    m = frame.within(band)
    planes = random_rotations(PLANES, torch.Generator().manual_seed(0), device)
    wanted = sample_slices(SliceTable(first), planes, frame, m) * frame.multiplicity[:m].sqrt()
    wanted[:, 0] = 0  # the mean says nothing of the orientation
    found = []
    grid = so3.to_matrices(so3.grid(math.radians(spacing), device)[0])
    few = frame.within(min(band, 6.0))
    for flip in (False, True):
        table = SliceTable(mirrored(second) if flip else second)
        score = torch.zeros(len(grid), device=device)
        for plane, target in zip(planes[:8], wanted[:8], strict=True):
            slices = sample_slices(table, grid @ plane, frame, few) * frame.multiplicity[:few].sqrt()
            slices[:, 0] = 0
            score += (slices.conj() * target[:few]).real.sum(1)
        for start in grid[score.topk(6).indices]:
            found.append(_climb(wanted, planes, table, frame, m, start, flip, shifts))
    return max(found, key=lambda move: move.correlation)


def _climb(wanted: Tensor, planes: Tensor, table: SliceTable, frame: Frame, m: int, turn: Tensor, flip: bool,
           shifts: bool) -> Move:  # fmt: skip
    """Gauss-Newton for turn and shift from one start."""
    shift = torch.zeros(3, device=turn.device)
    root, points = frame.multiplicity[:m].sqrt(), frame.points[:, :m]
    kx, ky = points
    best = Move(turn, shift, flip, -1.0)
    for _ in range(12):
        value, (gx, gy, gz) = table.with_slopes(turn @ planes, points)
        shifted = wave(planes, turn, shift, frame, m) * root
        slopes = torch.stack([ky * gz, -kx * gz, kx * gy - ky * gx]) * shifted  # about the axes of each plane
        slopes = torch.einsum("bnm,nab->anm", slopes, planes.to(slopes.dtype))  # about those of the first volume
        value = value * shifted
        value[:, 0] = 0
        if shifts:
            k = torch.einsum("nab,bm->anm", (turn @ planes)[:, :, :2], points)
            slopes = torch.cat([slopes, -2j * math.pi / frame.width * k * value])
        correlation = float((value.conj() * wanted).real.sum() / (value.norm() * wanted.norm()).clamp(min=1e-30))
        if correlation > best.correlation:
            best = Move(turn, shift, flip, correlation)
        scale = (value.conj() * wanted).real.sum() / value.abs().square().sum().clamp(min=1e-30)
        j = torch.view_as_real(slopes.flatten(1) * scale).flatten(1)
        rest = torch.view_as_real(wanted - value * scale).flatten()
        h = j @ j.T
        step = torch.linalg.solve(
            h + 1e-3 * torch.diag(h.diagonal()) + 1e-30 * torch.eye(len(h), device=h.device), j @ rest
        )
        turn = turn @ turn_by(step[None, :3].clamp(-0.2, 0.2))[0]
        if shifts:
            shift = shift + step[3:].clamp(-2, 2)
    return best


def to_axes(volume: Tensor, group: Tensor, band: float, spacing: float = 10.0) -> tuple[Tensor, float]:
    """The rotation A (3, 3) for which volume(A x) has the symmetry ``group`` (order, 3, 3) about that group's own axes,
    as far as it has any; and how far: what part of equivalent views' power their mean has."""
    frame, device = Frame(len(volume), volume.device), volume.device
    few = frame.within(band)
    planes = random_rotations(8, torch.Generator().manual_seed(0), device)
    table, root = SliceTable(volume), frame.multiplicity[:few].sqrt()
    turns = (group.to(planes)[:, None] @ planes).flatten(0, 1)  # (order * planes, 3, 3)

    def score(rotations: Tensor) -> Tensor:
        found = []
        for some in rotations.split(64):
            slices = sample_slices(table, (some[:, None] @ turns).flatten(0, 1), frame, few) * root
            slices = slices.view(len(some), len(group), len(planes), few)[..., 1:]
            found.append(slices.mean(1).abs().square().sum((1, 2)) / slices.abs().square().mean(1).sum((1, 2)))
        return torch.cat(found)

    cells, size = so3.grid(math.radians(spacing), device)
    grid = so3.to_matrices(cells)
    best = grid[score(grid).topk(8).indices]
    width = float(size[2])
    steps = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0], device=device)] * 3)
    for _ in range(7):
        width /= 2
        around = (best[:, None] @ turn_by(width * steps)).flatten(0, 1)
        scores = score(around)
        best = around[scores.topk(4).indices]
    return best[0], float(scores.max())


def mirrored(volume: Tensor) -> Tensor:
    """The volume with x turned round about its centre voxel."""
    flipped = volume.flip(-1)
    return flipped.roll(1, -1) if len(volume) % 2 == 0 else flipped
