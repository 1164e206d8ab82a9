"""The partition of SO(3): equal volumes, compact cells, one representative of each set of equivalent poses."""

import math

import pytest
import torch
from torch import Tensor

from cryobench.imaging import orientation_grid as so3
from cryobench.imaging.rotations import random_rotations, symmetry_matrices


def angles(a: Tensor, b: Tensor) -> Tensor:
    """Rotation angles in degrees between rotations of the same place."""
    traces = (a * b).sum((-2, -1))
    return torch.rad2deg(((traces - 1) / 2).clamp(-1, 1).acos())


def rotations(n: int) -> Tensor:
    return random_rotations(n, torch.Generator().manual_seed(3))


@pytest.mark.parametrize("degrees", [5.0, 7.5])
def test_cells_have_equal_volume(degrees: float) -> None:
    """Means of matrix entries and their products are those of the Haar measure: 0, 1/3 and 1/6."""
    cells, _ = so3.grid(math.radians(degrees))
    r = so3.to_matrices(cells).double()
    assert torch.allclose(r @ r.transpose(1, 2), torch.eye(3).double(), atol=1e-5)
    assert torch.allclose(torch.linalg.det(r), torch.ones(len(r)).double(), atol=1e-5)
    assert r.mean(0).abs().max() < 1e-6
    squares = torch.einsum("nij,nkl->ijkl", r, r) / len(r)
    expected = torch.einsum("ik,jl->ijkl", torch.eye(3), torch.eye(3)) / 3
    assert torch.allclose(squares, expected.double(), atol=2e-3)
    assert float((r[:, 0, 0] * r[:, 1, 1] * r[:, 2, 2]).mean()) == pytest.approx(1 / 6, rel=0.01)


def test_every_pose_is_near_a_cell() -> None:
    cells, _ = so3.grid(math.radians(10.0))
    r = so3.to_matrices(cells).flatten(1)
    nearest = (rotations(300).flatten(1) @ r.T).amax(1)
    distance = torch.rad2deg(((nearest - 1) / 2).clamp(-1, 1).acos())
    assert distance.max() < 10.0
    # most of them are well within: a lattice has its holes at about 0.87 of the spacing
    assert distance.mean() < 6.0


def test_parts_stay_near_their_cell_and_share_its_volume() -> None:
    cells, size = so3.grid(math.radians(7.5))
    parts, half = so3.split(cells, size)
    assert torch.equal(half, size / 2)
    assert torch.allclose(parts.view(-1, 8, 3).mean(1), cells, atol=1e-5)
    parents = so3.to_matrices(cells).repeat_interleave(8, 0)
    distance = angles(so3.to_matrices(parts), parents)
    assert distance.max() < 7.5  # poles and equator included
    assert distance.min() > 1.0


@pytest.mark.parametrize("name", ["C1", "C4", "D7", "O", "I"])
def test_one_of_equivalent_poses_is_in_the_domain(name: str) -> None:
    group = symmetry_matrices(name).float()
    equivalent = torch.einsum("sij,njk->nsik", group, rotations(500))
    inside = so3.in_domain(equivalent.flatten(0, 1), group).view(500, len(group))
    assert (inside.sum(1) == 1).float().mean() > 0.99  # two at most on the rim, where they tie
    assert so3.in_domain(equivalent.flatten(0, 1), group, 0.2).view(500, -1).sum(1).min() >= 1


def test_inverse() -> None:
    r = rotations(2000)
    assert torch.allclose(so3.to_matrices(so3.from_matrices(r)), r, atol=2e-5)
    cells, _ = so3.grid(math.radians(20.0))
    assert torch.allclose(so3.from_matrices(so3.to_matrices(cells)), cells, atol=1e-3)


@pytest.mark.parametrize("name", ["C1", "C4", "D7"])
def test_neighbours_are_the_cells_around(name: str) -> None:
    group = symmetry_matrices(name).float()
    cells, size = so3.grid(math.radians(7.5))
    cells = cells[so3.in_domain(so3.to_matrices(cells), group)][::23]
    near = so3.neighbours(cells, size, group)
    distance = torch.stack(
        [angles(s @ so3.to_matrices(near), so3.to_matrices(cells).repeat_interleave(6, 0)) for s in group]
    ).amin(0)
    assert distance.max() < 16.0
    assert 5.0 < distance.mean() < 10.0
    every = torch.unique(so3.numbers(so3.grid(math.radians(7.5))[0], size))
    assert torch.isin(so3.numbers(near, size), every).all()
    assert len(every) == len(so3.grid(math.radians(7.5))[0])
    inside = so3.in_domain(so3.to_matrices(near), group, 0.2)
    assert inside.all()
