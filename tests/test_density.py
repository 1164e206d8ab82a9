"""Density of atoms against the closed form, its place in the box, and boxes that are too small."""

import gemmi
import numpy as np
import pytest

from cryobench.errors import CryobenchError
from cryobench.specimens.atoms import Atoms
from cryobench.specimens.density import atoms_to_density, default_pixel_size


def cluster(n: int = 6, spread: float = 5.0, seed: int = 0) -> Atoms:
    rng = np.random.default_rng(seed)
    elements = ["C", "N", "O", "S", "P", "Zn"] * (n // 6 + 1)
    b_iso, occupancy = rng.uniform(15, 150, n), rng.uniform(0.3, 1, n)
    return Atoms(rng.normal(size=(n, 3)) * spread, elements[:n], b_iso, occupancy)


def closed_form(atoms: Atoms, size: int, pixel_size: float, resolution: float) -> np.ndarray:
    """Sum over atoms of scattering factor x B-factor x phase on every frequency below Nyquist."""
    k = np.fft.fftfreq(size, pixel_size)
    kz, ky, kx = np.meshgrid(k, k, k, indexing="ij")
    k2 = kx**2 + ky**2 + kz**2
    spectrum = np.zeros(k2.shape, complex)
    places = atoms.positions - atoms.centre() + (size // 2) * pixel_size
    for (x, y, z), element, b, occ in zip(places, atoms.elements, atoms.b_iso, atoms.occupancy, strict=True):
        c = gemmi.Element(element).c4322
        factor = sum(a_i * np.exp(-(b_i + b) * k2 / 4) for a_i, b_i in zip(c.a, c.b, strict=True))
        spectrum += occ * factor * np.exp(-2j * np.pi * (kx * x + ky * y + kz * z))
    spectrum *= np.exp(-(resolution**2) * k2) * (np.sqrt(k2) < 0.5 / pixel_size - 1e-9)
    return np.fft.ifftn(spectrum).real * 47.878 / pixel_size**3


@pytest.mark.parametrize(
    ("size", "pixel_size", "resolution"),
    [(48, 1.0, None), (47, 1.0, 4.0), (32, 2.0, 0.0), (33, 2.5, 3.0), (21, 3.0, None)],
)
def test_matches_the_closed_form(size, pixel_size, resolution):
    atoms = cluster()
    volume = atoms_to_density(atoms, size, pixel_size, resolution).numpy()
    expected = closed_form(atoms, size, pixel_size, 2 * pixel_size if resolution is None else resolution)
    assert volume.dtype == np.float32
    assert np.abs(volume - expected).max() < 2e-3 * expected.max()


def test_closed_form_in_real_space():
    """One atom that is wide enough to need no band limit: five Gaussians, in volts, at the centre voxel."""
    atoms = Atoms(np.array([[7.0, 8, 9]]), ["C"], np.array([60.0]), np.ones(1))
    volume = atoms_to_density(atoms, 24, 1.0, resolution=4.0).numpy()
    c = gemmi.Element("C").c4322
    z, y, x = np.indices(volume.shape) - 12
    expected = np.zeros(volume.shape)
    for a, b in zip(c.a, c.b, strict=True):
        width = b + 60 + 4 * 4.0**2
        expected += 47.878 * a * (4 * np.pi / width) ** 1.5 * np.exp(-4 * np.pi**2 * (x**2 + y**2 + z**2) / width)
    assert np.abs(volume - expected).max() < 0.01 * expected.max()


def test_axes_are_z_y_x():
    # three heavy atoms out along x, y, z at different distances, balanced by their mirror images
    arms = np.diag([6.0, 9.0, 12.0])
    atoms = Atoms(np.concatenate([arms, -arms]), ["Zn"] * 6, np.full(6, 20.0), np.ones(6))
    volume = atoms_to_density(atoms, 36, 1.0).numpy()
    level = 0.8 * volume[18, 18, 24]
    assert volume[18, 27, 18] > level
    assert volume[30, 18, 18] > level
    assert max(volume[24, 18, 18], volume[18, 24, 18], volume[18, 18, 30]) < 0.1 * level


def test_translation_and_centring():
    atoms = cluster()
    moved = Atoms(atoms.positions + np.array([100, -50, 3000]), atoms.elements, atoms.b_iso, atoms.occupancy)
    a, b = atoms_to_density(atoms, 40, 1.5), atoms_to_density(moved, 40, 1.5)
    assert (a - b).abs().max() < 1e-3 * a.max()


def test_strange_b_factors_are_limited():
    atoms = cluster()
    zero = Atoms(atoms.positions, atoms.elements, np.zeros(6), atoms.occupancy)
    ten = Atoms(atoms.positions, atoms.elements, np.full(6, 10.0), atoms.occupancy)
    huge = Atoms(atoms.positions, atoms.elements, np.full(6, 1e6), atoms.occupancy)
    sharp, same, wide = (atoms_to_density(a, 40, 1.5) for a in (zero, ten, huge))
    assert sharp.equal(same)
    assert 0 < wide.max() < 0.5 * sharp.max()
    assert wide.sum() == pytest.approx(float(sharp.sum()), rel=1e-3)


def test_too_small_a_box_names_what_would_do():
    atoms = cluster(60, spread=12)
    with pytest.raises(CryobenchError, match=r"use size \d+ or a pixel size of [\d.]+ A") as caught:
        atoms_to_density(atoms, 20, 1.5)
    words = str(caught.value).split()
    size, pixel = int(words[words.index("size") + 1]), float(words[-2])
    atoms_to_density(atoms, size, 1.5)
    atoms_to_density(atoms, 20, pixel)


@pytest.mark.parametrize(
    ("size", "pixel_size", "resolution"), [(0, 1.0, None), (32, 0.0, None), (32, float("nan"), None), (32, 3.0, -1.0)]
)
def test_nonsense_is_refused(size, pixel_size, resolution):
    with pytest.raises(CryobenchError):
        atoms_to_density(cluster(), size, pixel_size, resolution)


def test_default_pixel_size_fills_the_box():
    atoms = cluster(300, spread=15)
    for size in (31, 32, 64):
        share = 2 * atoms.radius() / (size * default_pixel_size(atoms, size))
        assert 0.55 < share < 0.62
        atoms_to_density(atoms, size, default_pixel_size(atoms, size))
