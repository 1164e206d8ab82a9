"""Orientations: rotation matrices, RELION's Euler angles, uniform sampling, point groups.

The convention of the whole package, stated once:

* Vectors are (x, y, z) columns relative to the centre (voxel or pixel index size // 2 on every axis). Arrays
  are indexed the other way round: volumes ``V[z, y, x]``, images ``I[y, x]``.
* A pose is a matrix R, and the image is ``I(x, y) = sum over z of V(R (x, y, z))``: R takes directions of the
  image frame into the volume. The view is along R's third column; R's first two columns are the image's x and
  y axes as seen in the volume.
* Euler angles are RELION's (rot, tilt, psi) in degrees, intrinsic ZYZ. RELION's matrix is
  ``A = Rz(psi) Ry(tilt) Rz(rot)`` with the passive elementary rotations
  ``Rz(a) = [[cos a, sin a, 0], [-sin a, cos a, 0], [0, 0, 1]]`` and
  ``Ry(a) = [[cos a, 0, -sin a], [0, 1, 0], [sin a, 0, cos a]]``; A takes the volume frame into the image
  frame, hence ``R = A^T``. (Heymann, Chagoyen & Belnap 2005, J. Struct. Biol. 151:196.)
* Acting on R from the left turns the volume: ``R`` and ``S R`` show the same image when S is a symmetry of V.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

from cryobench.errors import CryobenchError


def euler_to_matrix(angles: Tensor) -> Tensor:
    """Pose matrices R (n, 3, 3) of RELION's rot, tilt, psi: angles (n, 3) in degrees."""
    if angles.ndim != 2 or angles.shape[1] != 3:
        raise CryobenchError(f"Euler angles must have shape (n, 3), not {tuple(angles.shape)}")
    rot, tilt, psi = torch.deg2rad(angles).unbind(1)
    return _about_z(rot) @ _about_y(tilt) @ _about_z(psi)


def matrix_to_euler(matrices: Tensor) -> Tensor:
    """RELION's rot, tilt, psi (n, 3) in degrees of pose matrices R (n, 3, 3).

    tilt is in [0, 180], rot and psi in [-180, 180]. At tilt 0 and 180 only one in-plane angle is defined:
    there rot is 0.
    """
    if matrices.ndim != 3 or matrices.shape[1:] != (3, 3):
        raise CryobenchError(f"rotation matrices must have shape (n, 3, 3), not {tuple(matrices.shape)}")
    x, y, z = matrices[:, :, 2].unbind(1)  # the viewing direction
    sine = torch.hypot(x, y)
    tilt = torch.atan2(sine, z)
    # at the poles x and y are rounding noise: rot is chosen 0, and psi read from the upper left 2 x 2 block
    pole = sine < 16 * torch.finfo(matrices.dtype).eps
    rot = torch.where(pole, 0.0, torch.atan2(y, x))
    # Rz(-rot) R has psi in its second row, whatever the tilt
    row = torch.cos(rot)[:, None] * matrices[:, 1, :2] - torch.sin(rot)[:, None] * matrices[:, 0, :2]
    psi = torch.atan2(row[:, 0], row[:, 1])
    return torch.rad2deg(torch.stack([rot, tilt, psi], dim=1))


def random_rotations(n: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu") -> Tensor:
    """Matrices (n, 3, 3), float32, uniform on SO(3) (Haar measure), from normalised Gaussian quaternions.

    generator: a CPU generator; the result is the same on every device. (Shoemake 1992, Graphics Gems III.)
    """
    q = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    w, x, y, z = (q / q.norm(dim=1, keepdim=True)).unbind(1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, dim=1) for row in rows], dim=1).to(device, torch.float32)


def symmetry_matrices(group: str) -> Tensor:
    """The rotations (order, 3, 3), float64, of a point group named as in RELION: Cn, Dn, T, O or I.

    The identity is first. Cn turns about z; Dn has a further twofold axis along x; T and O have twofold
    (fourfold for O) axes along x, y and z; I is RELION's I2, with twofold axes along x, y and z.
    Raises CryobenchError for any other name.
    """
    match = re.fullmatch(r"([CD])([1-9]\d*)|[TOI]", group.strip().upper())
    if match is None:
        raise CryobenchError(f"unknown symmetry {group!r}: use Cn, Dn (as C4, D7), T, O or I")
    if match[1]:
        generators = [_turn([0, 0, 1], 2 * math.pi / int(match[2]))]
        if match[1] == "D":
            generators.append(_turn([1, 0, 0], math.pi))
    else:
        golden = (1 + math.sqrt(5)) / 2
        generators = [_turn([1, 1, 1], 2 * math.pi / 3), _turn([0, 0, 1], math.pi)]
        if group.strip().upper() == "O":
            generators.append(_turn([0, 0, 1], math.pi / 2))
        if group.strip().upper() == "I":
            generators.append(_turn([1, 0, golden], 2 * math.pi / 5))
    return _closure(generators)


def _closure(generators: list[Tensor]) -> Tensor:
    """All products of the generators."""
    elements = [torch.eye(3, dtype=torch.float64)]
    for element in elements:  # grows while it is walked through
        for generator in generators:
            product = generator @ element
            if all((product - known).abs().max() > 1e-6 for known in elements):
                elements.append(product)
    return torch.stack(elements)


def _turn(axis: list[float], angle: float) -> Tensor:
    """Active rotation by an angle (radians) about an axis (Rodrigues' formula)."""
    x, y, z = (torch.tensor(axis, dtype=torch.float64) / math.hypot(*axis)).tolist()
    cross = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)
    return torch.eye(3, dtype=torch.float64) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross


def _about_z(angle: Tensor) -> Tensor:
    """Transposes of RELION's passive Rz: active rotations (n, 3, 3), angle (n,) in radians."""
    c, s, o, i = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    return torch.stack([c, -s, o, s, c, o, o, o, i], dim=1).view(-1, 3, 3)


def _about_y(angle: Tensor) -> Tensor:
    """Transposes of RELION's passive Ry: active rotations (n, 3, 3), angle (n,) in radians."""
    c, s, o, i = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    return torch.stack([c, o, s, o, i, o, -s, o, c], dim=1).view(-1, 3, 3)
