import math

import pytest
import torch
from scipy import stats
from scipy.spatial.transform import Rotation

from cryobench.errors import CryobenchError
from cryobench.imaging.rotations import euler_to_matrix, matrix_to_euler, random_rotations, symmetry_matrices


def relion_matrix(rot: float, tilt: float, psi: float) -> torch.Tensor:
    """RELION's Euler_angles2matrix, element by element (its A; the package's R is the transpose)."""
    ca, cb, cg = (math.cos(math.radians(a)) for a in (rot, tilt, psi))
    sa, sb, sg = (math.sin(math.radians(a)) for a in (rot, tilt, psi))
    cc, cs, sc, ss = cb * ca, cb * sa, sb * ca, sb * sa
    return torch.tensor(
        [
            [cg * cc - sg * sa, cg * cs + sg * ca, -cg * sb],
            [-sg * cc - cg * sa, -sg * cs + cg * ca, sg * sb],
            [sc, ss, cb],
        ],
        dtype=torch.float64,
    )


def random_angles(n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(n, 3, generator=generator, dtype=torch.float64) - 0.5) * torch.tensor([720, 720, 720])


def test_euler_matrices_are_relions_transposed() -> None:
    angles = random_angles(20)
    expected = torch.stack([relion_matrix(*a).T for a in angles.tolist()])
    torch.testing.assert_close(euler_to_matrix(angles), expected, atol=1e-12, rtol=0)


def test_euler_matrices_agree_with_scipy() -> None:
    angles = random_angles(20)
    expected = Rotation.from_euler("ZYZ", angles.numpy(), degrees=True).as_matrix()
    torch.testing.assert_close(euler_to_matrix(angles), torch.from_numpy(expected), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_angles_come_back_as_the_same_matrix(dtype: torch.dtype) -> None:
    poles = torch.tensor([[30, 0, 50], [30, 180, 50], [0, 0, 0], [10, 1e-9, 20], [-170, 179.99999999, 3], [0, 90, 180]])
    matrices = euler_to_matrix(torch.cat([random_angles(50), poles.double()]).to(dtype))
    angles = matrix_to_euler(matrices)
    assert angles.dtype == dtype
    assert (angles[:, 1] >= 0).all()
    assert (angles[:, 1] <= 180).all()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(euler_to_matrix(angles), matrices, atol=tolerance, rtol=0)


def test_angles_in_range_are_kept() -> None:
    angles = torch.tensor([[10.0, 20, 30], [-170, 90, 170], [179, 179, -179]], dtype=torch.float64)
    torch.testing.assert_close(matrix_to_euler(euler_to_matrix(angles)), angles)


def test_at_the_poles_rot_is_zero() -> None:
    angles = matrix_to_euler(euler_to_matrix(torch.tensor([[30.0, 0, 50], [30, 180, 50]], dtype=torch.float64)))
    torch.testing.assert_close(angles[:, 0].abs(), torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(angles[:, 2], torch.tensor([80.0, 20.0], dtype=torch.float64))


def test_random_rotations_are_uniform() -> None:
    r = random_rotations(20000, torch.Generator().manual_seed(3)).double()
    torch.testing.assert_close(r @ r.transpose(1, 2), torch.eye(3).double().expand_as(r), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.linalg.det(r), torch.ones(20000).double(), atol=1e-5, rtol=0)
    # Haar measure: each element has mean 0 and variance 1/3, different elements are uncorrelated
    elements = r.flatten(1)
    assert elements.mean(0).abs().max() < 0.02
    torch.testing.assert_close(elements.T @ elements / 20000, torch.eye(9).double() / 3, atol=0.015, rtol=0)
    # the cosine of the tilt is uniform, the angle of the rotation has the density (1 - cos t) / pi
    assert stats.kstest(r[:, 2, 2].numpy(), stats.uniform(-1, 2).cdf).pvalue > 0.01
    angle = torch.arccos(((r.diagonal(dim1=1, dim2=2).sum(1) - 1) / 2).clamp(-1, 1))
    assert stats.kstest(angle.numpy(), lambda t: (t - torch.sin(torch.as_tensor(t)).numpy()) / math.pi).pvalue > 0.01
    euler = matrix_to_euler(r)
    for column in (0, 2):
        assert stats.kstest(euler[:, column].numpy(), stats.uniform(-180, 360).cdf).pvalue > 0.01


def test_random_rotations_follow_the_seed() -> None:
    first, again, other = (random_rotations(5, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert first.dtype == torch.float32
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


@pytest.mark.parametrize(
    ("group", "order"), [("C1", 1), ("C4", 4), ("C13", 13), ("D2", 4), ("d7", 14), ("T", 12), ("O", 24), ("I", 60)]
)
def test_symmetry_matrices_form_a_group(group: str, order: int) -> None:
    s = symmetry_matrices(group)
    assert s.shape == (order, 3, 3)
    torch.testing.assert_close(s[0], torch.eye(3).double())
    torch.testing.assert_close(torch.linalg.det(s), torch.ones(order).double())
    products = (s[:, None] @ s[None]).view(-1, 1, 9)
    assert ((products - s.view(1, -1, 9)).abs().amax(2) < 1e-9).sum(1).eq(1).all()  # closed, no element twice


def test_symmetry_axes() -> None:
    quarter = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]).double()
    assert any(torch.allclose(s, quarter) for s in symmetry_matrices("C4"))
    for group in ("D3", "I"):
        assert any(
            torch.allclose(s, torch.diag(torch.tensor([1.0, -1, -1]).double())) for s in symmetry_matrices(group)
        )


@pytest.mark.parametrize("call", [lambda: symmetry_matrices("X3"), lambda: symmetry_matrices("C0")])
def test_unknown_symmetry(call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(CryobenchError, match="symmetry"):
        call()


def test_wrong_shapes() -> None:
    with pytest.raises(CryobenchError, match=r"\(n, 3\)"):
        euler_to_matrix(torch.zeros(3))
    with pytest.raises(CryobenchError, match=r"\(n, 3, 3\)"):
        matrix_to_euler(torch.zeros(3, 3))
