"""Slices with slopes, and Fourier insertion, against the closed-form transforms of Gaussian blobs."""

import math

import pytest
import torch
from test_reconstruction import centres, images_of, volume_of, wavy_ctf
from torch import Tensor

from cryobench.imaging.rotations import random_rotations
from cryobench.imaging.slices import SliceTable, resized
from cryobench.methods.em_poses import Frame, turn_by
from cryobench.methods.em_refine import Collector
from cryobench.reconstruction import fourier
from cryobench.reconstruction.fourier import Backprojector


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Blobs:
    """Round Gaussians, x, y, z from the centre voxel: volume, transform and its gradient in closed form, float64."""

    def __init__(self, size: int, count: int = 12) -> None:
        self.size = size
        direction = torch.randn(count, 3, generator=generator(1), dtype=torch.float64)
        radius = 0.25 * size * torch.rand(count, 1, generator=generator(2), dtype=torch.float64) ** (1 / 3)
        self.centres = direction / direction.norm(dim=1, keepdim=True) * radius
        self.sigma = 1.1 + torch.rand(count, generator=generator(3), dtype=torch.float64)
        self.height = 0.5 + torch.rand(count, generator=generator(4), dtype=torch.float64)

    def volume(self) -> Tensor:
        axis = torch.arange(self.size, dtype=torch.float64) - self.size // 2
        x, y, z = (torch.exp(-((axis - c[:, None]) ** 2) / (2 * self.sigma[:, None] ** 2)) for c in self.centres.T)
        return torch.einsum("b,bz,by,bx->zyx", self.height, z, y, x).float()

    def transform(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """At frequencies k (..., 3) in cycles per box: (...) and the gradient by k (..., 3)."""
        k = k.double()[..., None, :] / self.size
        s2 = self.sigma**2
        envelope = self.height * (2 * math.pi * s2) ** 1.5 * torch.exp(-2 * math.pi**2 * s2 * k.square().sum(-1))
        each = torch.polar(envelope, -2 * math.pi * (k * self.centres).sum(-1))
        by_k = -4 * math.pi**2 * s2[:, None] * k - 2j * math.pi * self.centres
        return each.sum(-1), (each[..., None] * by_k).sum(-2) / self.size

    def slices(self, rotations: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        """Slices (n, m) and their derivatives (3, n, m) along the axes of the image frame."""
        k = (rotations[:, :, :2].double() @ points.double()).mT
        value, slope = self.transform(k)
        return value, torch.einsum("nma,nab->bnm", slope, rotations.to(slope.dtype))


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def views(n: int, seed: int = 5) -> Tensor:
    return random_rotations(n, generator(seed))


@pytest.mark.parametrize(("padding", "bound"), [(2.0, 0.013), (2.6, 0.009), (3.0, 0.006)])
@pytest.mark.parametrize("size", [24, 25, 38])
def test_slices_and_slopes_are_those_of_gaussians(size: int, padding: float, bound: float) -> None:
    blobs, frame, rotations = Blobs(size), Frame(size), views(30)
    table = SliceTable(blobs.volume(), padding)
    value, slopes = table.with_slopes(rotations, frame.points)
    expected, expected_slopes = blobs.slices(rotations, frame.points)
    torch.testing.assert_close(table.sample(rotations, frame.points), value)
    assert relative(value[:, 1:], expected[:, 1:]) < bound
    assert relative(value, expected) < 2.5 * bound  # on a grid point the weights smooth nothing: 5 % more mean
    assert all(relative(s, e) < 2.8 * bound for s, e in zip(slopes, expected_slopes, strict=True))


@pytest.mark.parametrize("size", [24, 27])
def test_along_the_axes_of_the_grid(size: int) -> None:
    """Samples on cells, on the plane x = 0 and on the rim of the half space are plain sums over voxels."""
    volume, frame, eye = Blobs(size).volume(), Frame(size), torch.eye(3)
    rotations = torch.stack([eye, eye.roll(1, 0), eye.roll(2, 0), torch.diag(torch.tensor([-1.0, 1, -1]))])
    value, slopes = SliceTable(volume).with_slopes(rotations, frame.points)
    axis = torch.arange(size, dtype=torch.float64) - size // 2
    kernel = torch.sinc(axis / (2 * size)) ** 2
    smoothed = volume / (kernel[:, None, None] * kernel[:, None] * kernel)
    x, y, z = (rotations[:, :, :2] @ frame.points).round().long().transpose(0, 1)

    def transform(v: Tensor) -> Tensor:
        return torch.fft.fftn(torch.fft.ifftshift(v))[z, y, x]

    assert relative(value, transform(smoothed)) < 1e-5
    moments = [smoothed * axis, smoothed * axis[:, None], smoothed * axis[:, None, None]]
    by_k = torch.stack([transform(v) for v in moments], -1) * (-2j * math.pi / size)
    expected = torch.einsum("nma,nab->bnm", by_k, rotations.to(by_k.dtype))
    assert all(relative(s, e) < 1e-5 for s, e in zip(slopes, expected, strict=True))


def test_a_small_turn_changes_the_slice_by_its_slopes() -> None:
    """What the search climbs along: R turn_by(w) moves (kx, ky, 0) by w x (kx, ky, 0)."""
    size = 24
    blobs, frame, rotations = Blobs(size), Frame(size), views(6)
    kx, ky = frame.points
    _, (gx, gy, gz) = SliceTable(blobs.volume()).with_slopes(rotations, frame.points)
    for axis, slope in enumerate((ky * gz, -kx * gz, kx * gy - ky * gx)):
        w = torch.zeros(6, 3, dtype=torch.float64)
        w[:, axis] = 1e-4
        ahead, behind = (blobs.slices(rotations.double() @ turn_by(s * w), frame.points)[0] for s in (1, -1))
        assert relative(slope, (ahead - behind) / 2e-4) < 0.05


def test_turn_by_is_rodrigues() -> None:
    w = torch.randn(5, 3, generator=generator(6), dtype=torch.float64)
    turns = turn_by(w)
    torch.testing.assert_close((turns @ w[..., None])[..., 0], w)  # the axis stays
    torch.testing.assert_close((turns.diagonal(dim1=1, dim2=2).sum(1) - 1) / 2, w.norm(dim=1).cos())
    quarter = turn_by(torch.tensor([[0.0, 0.0, math.pi / 2]]))[0]
    torch.testing.assert_close(quarter @ torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 1, 0]), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("size", "other"), [(16, 24), (16, 25), (17, 24), (17, 31), (24, 17), (25, 16)])
def test_resized_keeps_fourier_coefficients(size: int, other: int) -> None:
    volume = torch.randn(size, size, size, generator=generator(7))
    changed = resized(volume, other)
    assert changed.shape == (other,) * 3
    reach = (min(size, other) - 1) // 2
    k = torch.arange(-reach, reach + 1)

    def coefficients(v: Tensor) -> Tensor:
        return torch.fft.fftn(torch.fft.ifftshift(v))[k][:, k][:, :, k]

    torch.testing.assert_close(coefficients(changed), coefficients(volume), atol=1e-3, rtol=1e-4)
    if other > size and size % 2:  # of an even size the Nyquist planes are gone
        torch.testing.assert_close(resized(changed, size), volume, atol=1e-5, rtol=1e-5)
    again = resized(resized(changed, size), other)
    torch.testing.assert_close(resized(resized(again, size), other), again, atol=1e-5, rtol=1e-5)
    assert resized(volume, size) is volume


def test_resized_is_the_same_function_on_another_grid() -> None:
    """Slices in cycles per box are the same, so that a small volume can be compared with large images."""
    volume = Blobs(24).volume()
    frame, rotations = Frame(24), views(8)
    few = frame.points[:, : frame.within(10)]
    larger = SliceTable(resized(volume, 36)).sample(rotations, few)
    assert relative(larger[:, 1:], Blobs(24).slices(rotations, few)[0][:, 1:]) < 0.015


@pytest.mark.parametrize("size", [20, 21])
@pytest.mark.parametrize("with_ctf", [False, True])
@pytest.mark.parametrize("nearest", [False, True])
def test_slices_are_inserted_as_images_are(size: int, with_ctf: bool, nearest: bool) -> None:
    rotations, frame = views(40), Frame(size)
    images = images_of(centres(size), size, rotations)
    ctf = wavy_ctf(40, size) if with_ctf else torch.ones(1, size, size // 2 + 1)
    by_image, by_slice = (Backprojector(size, "C2", nearest=nearest) for _ in range(2))
    by_image.insert(images, rotations, ctf=ctf if with_ctf else None)
    gain = ctf.flatten(1)[:, frame.pixels].expand(40, -1)
    by_slice.insert_slices(frame.transform(images) * gain, gain.square(), rotations, frame.points)
    torch.testing.assert_close(by_slice.volume(), by_image.volume(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(by_slice.shell_weights(), by_image.shell_weights())


def collected(size: int, n: int, nearest: bool = False, padding: float = 2) -> tuple[Backprojector, Tensor]:
    points, rotations = centres(size), views(n, 8)
    back = Backprojector(size, padding=padding, nearest=nearest)
    back.insert(images_of(points, size, rotations), rotations)
    return back, volume_of(points, size)


@pytest.mark.parametrize("size", [20, 23])
def test_the_nearest_cell_is_as_good_with_many_views(size: int) -> None:
    (near, truth), (spread, _) = (collected(size, 1200, nearest) for nearest in (True, False))
    error = relative(near.volume(), truth)
    assert error < 0.08
    assert error < 2 * relative(spread.volume(), truth)
    assert relative(near.volume(), spread.volume()) < 0.1


def test_the_prior_is_a_wiener_filter() -> None:
    back, _ = collected(20, 300)
    weights = back.shell_weights()
    assert weights.shape == (11,)
    plain, half = back.volume(prior=torch.zeros(11)), back.volume(prior=weights)
    assert relative(plain, back.volume()) < 1e-3
    assert float(back.volume(prior=torch.full((11,), math.inf)).abs().max()) == 0
    # cells of a shell have not all the mean weight: half on average
    assert float((half * plain).sum() / plain.square().sum()) == pytest.approx(0.5, abs=0.04)
    # shells do not mix: each alone, they add up to all
    alone = [back.volume(prior=torch.full((11,), math.inf).index_fill(0, torch.tensor(k), 0.0)) for k in range(11)]
    torch.testing.assert_close(torch.stack(alone).sum(0), plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [16, 20, 27])
def test_the_mean_of_a_volume_is_right(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cells beside the origin get no sample: without being filled in they cost a good part of the sum."""
    back, truth = collected(size, 500)
    mean = float(truth.sum())
    assert float(back.volume().sum()) == pytest.approx(mean, rel=0.03)
    # the refinement's two grids
    rotations, frame = views(500, 8), Frame(size)
    sums = Collector(frame, "C1")
    data = frame.transform(images_of(centres(size), size, rotations))
    sums.insert(data, torch.ones_like(data.real), rotations)
    found = sums.volume()
    assert float(found.sum()) == pytest.approx(mean, rel=0.04)
    assert relative(found, truth) < 0.12
    monkeypatch.setattr(fourier, "_fill_beside_origin", lambda transform: None)
    assert float(back.volume().sum()) < 0.95 * mean
    assert float(sums.volume().sum()) < 0.95 * mean


def test_what_is_filled_in_is_smooth() -> None:
    """The cells beside the origin against the transform of blobs, sampled on the padded grid."""
    size = 24
    blobs, m = Blobs(size), 2 * size
    ky, kx = torch.fft.fftfreq(m, 1 / m), torch.arange(m // 2 + 1.0)
    k = torch.stack(torch.meshgrid(ky, ky, kx, indexing="ij")[::-1], -1) * (size / m)
    expected = blobs.transform(k)[0].to(torch.complex64)
    near = k.norm(dim=-1) < 1
    near[0, 0, 0] = False
    holed = expected.clone()
    holed[near] = 0
    fourier._fill_beside_origin(holed)
    assert relative(holed[near], expected[near]) < 0.01
    assert torch.equal(holed[~near], expected[~near])
