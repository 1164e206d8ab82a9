"""Bessel functions and the Fourier-Bessel basis: against scipy, against the definition, against rotated images."""

import math

import numpy as np
import pytest
import torch
from scipy.special import jn_zeros, jv

from cryobench.errors import CryobenchError
from cryobench.imaging.bessel import BesselTable, bessel
from cryobench.imaging.ctf import ContrastTransfer, Optics, ctf_1d, ctf_2d
from cryobench.imaging.steerable import SteerableBasis


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blobs(size, angle=0.0, mirrored=False):
    """Gaussian blobs (1, size, size) about the centre, turned by an angle from x towards y, after a mirror at y = 0."""
    grid = torch.arange(size, dtype=torch.float64) - size // 2
    image = torch.zeros(size, size, dtype=torch.float64)
    for x, y, width in ((0.20, 0.05, 0.05), (-0.1, 0.15, 0.07), (0.0, -0.2, 0.06)):
        y = -y if mirrored else y
        u = size * (x * math.cos(angle) - y * math.sin(angle))
        v = size * (x * math.sin(angle) + y * math.cos(angle))
        image += torch.exp(-((grid - u) ** 2 + (grid[:, None] - v) ** 2) / (2 * (width * size) ** 2))
    return image.float()[None]


def test_bessel_functions_and_zeros_are_those_of_scipy():
    x = torch.tensor([0.0, 1e-3, 0.5, 3.0, 40.0, 123.4])
    np.testing.assert_allclose(bessel(90, x), jv(np.arange(90)[:, None], x.double().numpy()), atol=1e-13)
    table = BesselTable(105, 100.0)
    order, at = torch.tensor([0, 1, 17, 90]), torch.tensor([0.0, 2.3, 99.99, 100.0], dtype=torch.float64)
    np.testing.assert_allclose(table(order, at), jv(order.numpy(), at.numpy()), atol=1e-8)
    orders, zeros = table.zeros(100.0)
    for k in (0, 1, 30, 80):
        expected = jn_zeros(k, 40)
        np.testing.assert_allclose(zeros[orders == k], expected[expected <= 100], atol=1e-7)
    assert int(orders.max()) == max(k for k in range(100) if jn_zeros(k, 1)[0] <= 100)


@pytest.mark.parametrize("size", [16, 17])
def test_functions_are_the_inverse_transforms_of_the_definition(size):
    """g(x) = integral over the disc of f_kq(xi) exp(2 pi i xi x), by a rule in polar coordinates."""
    basis, c = SteerableBasis(size), 0.5
    nodes, weights = np.polynomial.legendre.leggauss(60)
    rho, weights = c * (nodes + 1) / 2, c * weights / 2
    theta = np.arange(160) * 2 * np.pi / 160
    pixels = np.array([[0, 0], [3, -2], [-(size // 2), 4], [5, 5], [-4, 0], [0, 6]])  # x, y
    wave = np.exp(
        2j
        * np.pi
        * rho[:, None, None]
        * (np.cos(theta)[:, None] * pixels[:, 0] + np.sin(theta)[:, None] * pixels[:, 1])
    )
    for k, q in ((0, 0), (0, 4), (1, 0), (2, 3), (3, 1), (4, 2), (6, 0), (7, 1)):
        zero = jn_zeros(k, q + 1)[-1]
        norm = math.sqrt(2) / (c * abs(jv(k + 1, zero)) * math.sqrt(math.pi * (2 if k == 0 else 1)))
        for sine in (0, 1) if k else (0,):
            angular = np.sin(k * theta) if sine else np.cos(k * theta)
            f = norm * jv(k, zero * rho / c)[:, None] * angular
            g = np.einsum("rt,rtp,r->p", f, wave, weights * rho) * 2 * np.pi / len(theta) / 1j**k
            coefficients = torch.zeros(1, *basis.shape)
            coefficients[0, k, sine, q] = 1
            image = basis.evaluate(coefficients)[0].numpy()
            found = image[pixels[:, 1] + size // 2, pixels[:, 0] + size // 2]
            np.testing.assert_allclose(found, g.real, atol=2e-6, err_msg=f"{k} {q} {sine}")


@pytest.mark.parametrize("size", [15, 16, 33, 48])
def test_expand_is_the_transpose_of_evaluate(size):
    basis = SteerableBasis(size)
    images, coefficients = normal(3, size, size), normal(3, *basis.shape, seed=1)
    left = (basis.expand(images).double() * coefficients).sum((1, 2, 3))
    right = (images.double() * basis.evaluate(coefficients)).sum((1, 2))
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-3)
    empty = torch.arange(basis.shape[2]) >= basis.counts[:, None]
    assert not basis.expand(images)[:, empty[:, None].expand(basis.shape)].any()
    assert not basis.expand(images)[:, 0, 1].any()


@pytest.mark.parametrize("size", [32, 45])
def test_an_image_within_the_disc_comes_back(size):
    basis, image = SteerableBasis(size), blobs(size)
    error = basis.evaluate(basis.expand(image)) - image
    assert error.norm() < 1e-3 * image.norm()
    assert float(basis.expand(image).norm()) == pytest.approx(float(image.norm()), rel=1e-3)


@pytest.mark.parametrize("size", [40, 41])
def test_a_rotation_mixes_cosine_and_sine(size):
    basis, angle = SteerableBasis(size), 0.7
    cosine, sine = basis.expand(blobs(size))[0].unbind(1)
    turned = basis.expand(blobs(size, angle))[0]
    k = torch.arange(basis.shape[0])[:, None] * angle
    expected = torch.stack([k.cos() * cosine - k.sin() * sine, k.sin() * cosine + k.cos() * sine], 1)
    assert (turned - expected).norm() < 1e-4 * expected.norm()
    mirrored = basis.expand(blobs(size, mirrored=True))[0]
    assert (mirrored - torch.stack([cosine, -sine], 1)).norm() < 1e-4 * expected.norm()


def test_chosen_frequencies_are_those_of_the_whole():
    images, chosen = normal(2, 30, 30), (0, 3, 4, 10)
    whole, part = SteerableBasis(30).expand(images), SteerableBasis(30, frequencies=chosen).expand(images)
    torch.testing.assert_close(part, whole[:, list(chosen), :, : part.shape[3]])


def test_fewer_functions_with_a_lower_band_limit():
    full, half = SteerableBasis(48), SteerableBasis(48, band_limit=0.25)
    assert len(half.k) == pytest.approx(len(full.k) / 4, rel=0.1)
    image = blobs(48)
    assert (half.evaluate(half.expand(image)) - image).norm() < 1e-3 * image.norm()


@pytest.mark.parametrize("size", [48, 49])
def test_a_radial_filter_is_a_matrix_per_frequency(size):
    basis, image = SteerableBasis(size), blobs(size)
    optics, defocus = Optics(pixel_size=4.0), torch.tensor([12000.0])
    ctf = ContrastTransfer(optics, torch.tensor([[12000.0, 12000.0, 0.0]])).images(size)
    filtered = torch.fft.irfft2(torch.fft.rfft2(image) * ctf, s=(size, size))
    matrices = basis.radial_matrices(ctf_1d(defocus, basis.nodes, optics)[0])
    coefficients = torch.einsum("nksq,kqp->nksp", basis.expand(image).double(), matrices).float()
    assert (basis.evaluate(coefficients) - filtered).norm() < 1e-3 * filtered.norm()
    one = basis.radial_matrix(5, ctf_1d(defocus, basis.nodes, optics))[0]
    torch.testing.assert_close(one, matrices[5, : len(one), : len(one)])


def test_radial_ctf_is_a_line_of_the_image_of_the_ctf():
    optics, defocus = Optics(200.0, 2.0, 0.07, 1.7), torch.tensor([9000.0, 21000.0])
    line = ctf_2d(defocus, defocus, 0 * defocus, optics, 64, bfactor=80.0)[:, 0]
    found = ctf_1d(defocus, torch.fft.rfftfreq(64), optics, bfactor=80.0)
    assert (found - line).abs().max() < 1e-3


def test_what_cannot_be_is_said():
    with pytest.raises(CryobenchError, match="no Fourier-Bessel"):
        SteerableBasis(3)
    with pytest.raises(CryobenchError, match="no Fourier-Bessel"):
        SteerableBasis(32, band_limit=0.6)
    with pytest.raises(CryobenchError, match="bin the images"):
        SteerableBasis(4000)
