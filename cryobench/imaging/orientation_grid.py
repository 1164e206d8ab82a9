"""A partition of SO(3) into cells of equal volume that can be halved along each side, again and again.

A pose is a viewing direction and a turn within the image. Each hemisphere of directions is a square, mapped to a
disc (Shirley & Chiu 1997, J. Graphics Tools 2:45) and on to the sphere (Lambert's azimuthal projection); both keep
areas. The turn is counted from an axis carried along the meridian from the pole of the same hemisphere, so that
points near each other in a cell are rotations near each other, at the poles too. The volume element of SO(3) is
du dv da up to a constant: a sum over cells of one size is an integral over poses.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def grid(spacing: float, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Centres (n, 3) of cells over all of SO(3), as (u, v, a), and their size (3,); spacing in radians.

    v in [-1, 1]; u in [-1, 1] in the northern hemisphere and in [1, 3] in the southern; a in [0, 2 pi).
    """
    n, turns = math.ceil(math.sqrt(2 * math.pi) / spacing), math.ceil(2 * math.pi / spacing)
    size = torch.tensor([2 / n, 2 / n, 2 * math.pi / turns], device=device)
    u, v, a = ((torch.arange(k, device=device) + 0.5) * s for k, s in zip((2 * n, n, turns), size, strict=True))
    return torch.cartesian_prod(u - 1, v - 1, a), size


def split(cells: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """The eight parts (8 n, 3) of each cell (n, 3), one after the other, and their size (3,)."""
    half = torch.tensor([-0.25, 0.25], device=cells.device)
    offsets = torch.cartesian_prod(half, half, half) * size
    return (cells[:, None] + offsets).flatten(0, 1), size / 2


def to_matrices(cells: Tensor) -> Tensor:
    """Rotation matrices (n, 3, 3) of points (n, 3) given as (u, v, a)."""
    u, v, a = cells.unbind(1)
    south = u > 1
    u = torch.where(south, u - 2, u)
    # square to disc: the larger coordinate is the radius, the ratio is an angle
    wide = u.abs() > v.abs()
    radius = torch.where(wide, u, v)
    ratio = torch.where(wide, v, u) / torch.where(radius == 0, 1.0, radius) * (math.pi / 4)
    phi = torch.where(wide, ratio, math.pi / 2 - ratio)
    # disc to hemisphere: the distance from the centre is sqrt(2) sin(tilt / 2)
    tilt = 2 * torch.asin(radius / math.sqrt(2))
    tilt, backwards = torch.where(south, math.pi - tilt, tilt), torch.where(south, 1.0, -1.0)
    return _about(phi, 2) @ _about(tilt, 1) @ _about(a + backwards * phi, 2)


def from_matrices(rotations: Tensor) -> Tensor:
    """Points (n, 3), as (u, v, a), of rotation matrices (n, 3, 3): the inverse of :func:`to_matrices`."""
    x, y, z = rotations[:, :, 2].unbind(1)  # the viewing direction
    south = z < 0
    # sqrt(2) sin(tilt / 2), of the supplement in the south; x and y are proportional to sin(tilt)
    radius = torch.hypot(x, y) / (1 + z.abs()).sqrt()
    wide = x.abs() > y.abs()
    larger, smaller = torch.where(wide, x, y), torch.where(wide, y, x)
    first = torch.where(larger < 0, -radius, radius)
    second = first * torch.atan(smaller / torch.where(larger == 0, 1.0, larger)) * (4 / math.pi)
    u, v = torch.where(wide, first, second), torch.where(wide, second, first)
    points = torch.stack([torch.where(south, u + 2, u), v, torch.zeros_like(u)], 1)
    turn = to_matrices(points).transpose(1, 2) @ rotations
    points[:, 2] = torch.atan2(turn[:, 1, 0], turn[:, 0, 0]) % (2 * math.pi)
    return points


def neighbours(cells: Tensor, size: Tensor, group: Tensor) -> Tensor:
    """The six cells (6 n, 3) around each cell (n, 3), each in the domain of ``group`` (:func:`in_domain`)."""
    turns = torch.cat([_about(float(size[2]) * sign * torch.ones(1, device=cells.device), 2) for sign in (1, -1)])
    # turn about the image's z, x and y axes: cycling the axes cycles rows and columns
    turns = torch.cat([turns, turns.roll((1, 1), (1, 2)), turns.roll((2, 2), (1, 2))])
    moved = (to_matrices(cells)[:, None] @ turns).flatten(0, 1)
    traces = moved.flatten(1) @ group.to(moved).transpose(1, 2).flatten(1).T
    points = from_matrices(group.to(moved)[traces.argmax(1)] @ moved)
    start = torch.tensor([-1.0, -1.0, 0.0], device=cells.device)
    return ((points - start) / size).floor() * size + start + size / 2


def numbers(cells: Tensor, size: Tensor) -> Tensor:
    """A number (n,) for each cell of this size (3,), its own."""
    start = torch.tensor([-1.0, -1.0, 0.0], device=cells.device)
    i, j, k = ((cells - start) / size).long().unbind(1)
    rows, turns = round(2 / float(size[1])), round(2 * math.pi / float(size[2]))
    return (i * (rows + 1) + j) * (turns + 1) + k


def in_domain(rotations: Tensor, group: Tensor, margin: float = 0.0) -> Tensor:
    """Which rotations (n, 3, 3) are, of all S R with S in ``group`` (order, 3, 3), the one nearest to the identity.

    One pose of each set of equivalent ones passes. margin (radians) lets pass those that miss by no more, so that
    no cell is lost whose centre lies just outside.
    """
    if len(group) == 1:
        return torch.ones(len(rotations), dtype=torch.bool, device=rotations.device)
    traces = rotations.flatten(1) @ group.to(rotations).transpose(1, 2).flatten(1).T  # of S R, (n, order)
    angles = ((traces - 1) / 2).clamp(-1, 1).acos()
    return angles[:, 0] <= angles[:, 1:].amin(1) + margin


def _about(angle: Tensor, axis: int) -> Tensor:
    """Active rotations (n, 3, 3) by angles (n,) about y (axis 1) or z (axis 2)."""
    i, j = {1: (2, 0), 2: (0, 1)}[axis]
    turn = torch.zeros(len(angle), 3, 3, device=angle.device)
    turn[:, axis, axis] = 1
    turn[:, i, i] = turn[:, j, j] = angle.cos()
    turn[:, j, i] = angle.sin()
    turn[:, i, j] = -angle.sin()
    return turn
