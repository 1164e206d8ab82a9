"""Volumes from projections known in closed form, and the FSC against its definition in numpy."""

import dataclasses
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cryobench.errors import CryobenchError
from cryobench.imaging.ctf import Optics, ctf_2d, random_defocus
from cryobench.imaging.rotations import matrix_to_euler, random_rotations, symmetry_matrices
from cryobench.reconstruction.command import fsc_of_maps, reconstruct_star, refuse_images
from cryobench.reconstruction.fourier import Backprojector, reconstruct, reconstruct_halves
from cryobench.reconstruction.fsc import fsc, fsc_report
from cryobench.specimens.maps import read_map
from cryobench.specimens.mrc import read_mrc, write_mrc
from cryobench.specimens.particle_star import ParticleTable, find_stack, read_particles, write_particles

SIGMA = 1.0


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def centres(size: int, n: int = 12, seed: int = 0) -> Tensor:
    """Positions (n, 3) of blobs, x, y, z from the centre voxel, inside the inscribed sphere."""
    return (torch.rand(n, 3, generator=generator(seed)) - 0.5) * 0.5 * size


def volume_of(points: Tensor, size: int) -> Tensor:
    axis = torch.arange(size) - size // 2
    gauss = [torch.exp(-((axis - points[:, i, None]) ** 2) / (2 * SIGMA**2)) for i in range(3)]
    return torch.einsum("nz,ny,nx->zyx", gauss[2], gauss[1], gauss[0])


def images_of(points: Tensor, size: int, rotations: Tensor, shifts: Tensor | None = None) -> Tensor:
    """Projections in closed form: image(x, y) = sum_z V(R p), so a blob at c appears at R^T c."""
    seen = torch.einsum("kij,ni->knj", rotations, points)[..., :2]
    seen = seen if shifts is None else seen + shifts[:, None]
    axis = torch.arange(size) - size // 2
    x, y = (torch.exp(-((axis - seen[..., i, None]) ** 2) / (2 * SIGMA**2)) for i in range(2))
    return math.sqrt(2 * math.pi) * SIGMA * torch.einsum("kny,knx->kyx", y, x)


def wavy_ctf(n: int, size: int) -> Tensor:
    """A filter per image that changes sign twice and passes through zero, (n, size, size // 2 + 1)."""
    ky, kx = torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)
    defocus = torch.linspace(25, 45, n)[:, None, None]
    return torch.cos(defocus * (kx**2 + ky**2))


def to_three_pixels(curve: Tensor, size: int) -> Tensor:
    return curve[: size // 3 + 1]


@pytest.mark.parametrize("size", [24, 27])
def test_clean_projections_give_the_volume_back(size: int) -> None:
    points = centres(size)
    rotations = random_rotations(300, generator(1))
    found = reconstruct(images_of(points, size, rotations), rotations)
    truth = volume_of(points, size)
    assert to_three_pixels(fsc(found, truth), size).min() > 0.99
    assert (found - truth).norm() / truth.norm() < 0.08
    assert float((found * truth).sum() / truth.square().sum()) == pytest.approx(1, abs=0.01)


def test_gridding_is_corrected_at_the_edge_of_the_box() -> None:
    size = 24
    points = torch.tensor([[8.0, 0.0, 0.0], [0.0, -8.0, 0.0], [0.0, 0.0, 8.0], [5.0, 5.0, 5.0]])
    rotations = random_rotations(400, generator(2))
    found = reconstruct(images_of(points, size, rotations), rotations)
    for x, y, z in points.int() + size // 2:
        assert found[z, y, x].item() == pytest.approx(1, abs=0.05)


def test_shifts_and_ctf_are_undone() -> None:
    size, n = 20, 300
    points = centres(size, seed=3)
    rotations = random_rotations(n, generator(3))
    shifts = torch.rand(n, 2, generator=generator(4)) * 4 - 2
    ctf = wavy_ctf(n, size)
    images = images_of(points, size, rotations, shifts)
    images = torch.fft.irfft2(torch.fft.rfft2(images) * ctf, s=(size, size))
    truth = volume_of(points, size)
    found = reconstruct(images, rotations, shifts, ctf)
    assert to_three_pixels(fsc(found, truth), size).min() > 0.97
    assert (found - truth).norm() / truth.norm() < 0.15
    assert to_three_pixels(fsc(reconstruct(images, rotations, shifts), truth), size).min() < 0.5
    assert to_three_pixels(fsc(reconstruct(images, rotations, -shifts, ctf), truth), size).min() < 0.5
    one = torch.fft.irfft2(torch.fft.rfft2(images_of(points, size, rotations)) * ctf[:1], s=(size, size))
    assert torch.allclose(
        reconstruct(one, rotations, ctf=ctf[:1]), reconstruct(one, rotations, ctf=ctf[:1].expand(n, -1, -1)), atol=1e-4
    )


def test_symmetry_multiplies_the_views() -> None:
    size = 24
    turns = symmetry_matrices("C4").float()
    points = torch.einsum("sij,nj->sni", turns, centres(size, 4, seed=5)).reshape(-1, 3)
    rotations = random_rotations(25, generator(5))
    images = images_of(points, size, rotations)
    truth = volume_of(points, size)
    found = reconstruct(images, rotations, symmetry="C4")
    with_symmetry = to_three_pixels(fsc(found, truth), size)
    without = to_three_pixels(fsc(reconstruct(images, rotations), truth), size)
    assert with_symmetry.min() > 0.95
    assert with_symmetry.mean() > without.mean() + 0.01
    # odd coordinates from the centre voxel: a quarter turn about z maps (y, x) to (x, -y)
    inner = found[1:, 1:, 1:]
    assert torch.allclose(inner, inner.rot90(1, (1, 2)), atol=0.02)


@pytest.mark.parametrize("size", [20, 21])
@pytest.mark.parametrize(
    ("group", "inserted"), [("C4", 1), ("C3", 3), ("D2", 1), ("D7", 7), ("T", 1), ("O", 1), ("I", 5)]
)
def test_a_symmetry_counts_as_all_equivalent_poses(group: str, inserted: int, size: int) -> None:
    rotations = random_rotations(40, generator(11))
    images = torch.randn(40, size, size, generator=generator(12))
    ctf = wavy_ctf(40, size)
    # the outermost cells, at the Nyquist frequency, are both ends of their axis: no sample shall reach them
    kx, ky = torch.arange(size // 2 + 1), torch.fft.fftfreq(size, 1 / size)[:, None]
    ctf = ctf * (torch.hypot(kx, ky) < size / 2 - 1)
    elements = symmetry_matrices(group).float()
    every = (elements[:, None] @ rotations).flatten(0, 1)
    copies = len(elements)
    expected = reconstruct(images.repeat(copies, 1, 1), every, ctf=ctf.repeat(copies, 1, 1))
    collected = Backprojector(size, group)
    collected.insert(images, rotations, ctf=ctf)
    assert len(collected._symmetry) == inserted  # the rest is turning the grid
    found = collected.volume()
    assert float((found - expected).norm() / expected.norm()) < 1e-3
    plain = Backprojector(size)
    plain.insert(images.repeat(copies, 1, 1), every, ctf=ctf.repeat(copies, 1, 1))
    assert torch.allclose(collected.shell_weights(), plain.shell_weights(), rtol=1e-3)


def test_half_maps_are_the_halves() -> None:
    size, n = 20, 120
    points, rotations = centres(size, seed=6), random_rotations(n, generator(6))
    images = images_of(points, size, rotations)
    images = images + images.std() * torch.randn(images.shape, generator=generator(7))
    subsets = torch.tensor([1, 2, 2] * 40)
    whole, first, second = reconstruct_halves(images, rotations, subsets=subsets)
    assert torch.allclose(first, reconstruct(images[subsets == 1], rotations[subsets == 1]), atol=1e-4)
    assert torch.allclose(second, reconstruct(images[subsets == 2], rotations[subsets == 2]), atol=1e-4)
    assert torch.allclose(whole, reconstruct(images, rotations), atol=1e-4)
    truth = volume_of(points, size)
    assert fsc(whole, truth)[2:7].mean() > fsc(first, truth)[2:7].mean()


def test_noise_near_the_zeros_of_one_ctf_is_not_blown_up() -> None:
    size, n = 20, 100
    rotations = random_rotations(n, generator(8))
    noise = torch.randn(n, size, size, generator=generator(9))
    collected = Backprojector(size)
    collected.insert(noise, rotations, ctf=wavy_ctf(1, size))
    assert collected.volume().std() < 0.8 * collected.volume(floor=1e-6).std()


def test_the_result_does_not_depend_on_the_order_or_pieces() -> None:
    size, n = 15, 40
    points, rotations = centres(size, seed=10), random_rotations(n, generator(10))
    images = images_of(points, size, rotations)
    pieces = Backprojector(size)
    for part in (slice(30, 40), slice(0, 30)):
        pieces.insert(images[part], rotations[part])
    assert torch.allclose(pieces.volume(), reconstruct(images, rotations), atol=1e-4)


def test_wrong_input_is_refused_in_one_line() -> None:
    images, rotations = torch.zeros(4, 8, 8), torch.eye(3).expand(4, 3, 3)
    bad = images.clone()
    bad[2, 3, 3] = math.nan
    for call in (
        lambda: reconstruct(torch.zeros(4, 8, 9), rotations),
        lambda: reconstruct(images, rotations[:3]),
        lambda: reconstruct(images, 2 * rotations),
        lambda: reconstruct(images, rotations, shifts=torch.zeros(4, 3)),
        lambda: reconstruct(images, rotations, ctf=torch.ones(4, 8, 8)),
        lambda: reconstruct(bad, rotations),
        lambda: reconstruct(images, rotations, symmetry="Q7"),
        lambda: reconstruct_halves(images, rotations, subsets=torch.ones(4)),
        lambda: fsc(torch.zeros(4, 4, 4), torch.zeros(4, 4, 5)),
        lambda: fsc(torch.full((4, 4, 4), math.inf), torch.zeros(4, 4, 4)),
    ):
        with pytest.raises(CryobenchError) as error:
            call()
        assert "\n" not in str(error.value)


def numpy_fsc(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    fa, fb = np.fft.fftn(a.astype(float)), np.fft.fftn(b.astype(float))
    axes = [np.fft.fftfreq(n) for n in a.shape]
    radius = np.sqrt(sum(g**2 for g in np.meshgrid(*axes, indexing="ij")))
    shell = np.round(radius * min(a.shape)).astype(int)
    out = []
    for k in range(min(a.shape) // 2 + 1):
        x, y = fa[shell == k], fb[shell == k]
        out.append((x * y.conj()).sum().real / np.sqrt((abs(x) ** 2).sum() * (abs(y) ** 2).sum()))
    return np.array(out)


@pytest.mark.parametrize("shape", [(12, 12, 12), (11, 11, 11), (9, 12, 14)])
def test_fsc_is_the_definition(shape: tuple[int, ...]) -> None:
    a = torch.rand(shape, generator=generator(11))
    b = a + torch.rand(shape, generator=generator(12))
    assert np.allclose(fsc(a, b).numpy(), numpy_fsc(a.numpy(), b.numpy()), atol=1e-9)
    mask = torch.rand(shape, generator=generator(13))
    expected = numpy_fsc((a * mask).double().numpy(), (b * mask).double().numpy())
    assert np.allclose(fsc(a, b, mask).numpy(), expected, atol=1e-6)


def test_report_gives_the_resolution_of_a_low_pass() -> None:
    size, pixel_size = 32, 1.7
    a, other = torch.randn(2, size, size, size, generator=generator(14))
    axis = torch.fft.fftfreq(size)
    radius = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + torch.fft.rfftfreq(size) ** 2).sqrt()
    mixed = torch.where(radius * size < 9.5, torch.fft.rfftn(a), torch.fft.rfftn(other))
    report = fsc_report(a, torch.fft.irfftn(mixed, s=(size,) * 3), pixel_size)
    # equal up to shell 9, independent from shell 10 on
    for threshold in ("0.143", "0.5"):
        assert pixel_size * size / 10 < report["resolution"][threshold] < pixel_size * size / 9
    assert report["resolution"]["0.5"] > report["resolution"]["0.143"]
    assert report["frequency"][16] == pytest.approx(1 / (2 * pixel_size))
    assert fsc_report(a, -a, pixel_size)["resolution"]["0.143"] is None


@pytest.fixture(scope="module")
def particles_on_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shifted particles with CTF of two microscopes in a STAR file, and the volume they show."""
    folder, size, n, pixel = tmp_path_factory.mktemp("star"), 24, 240, 2.0
    points, rotations = centres(size, seed=15), random_rotations(n, generator(15))
    shifts = torch.rand(n, 2, generator=generator(16)) * 4 - 2
    voltage = np.where(np.arange(n) < 100, 200.0, 300.0)
    u, v, angle = random_defocus(n, generator(17))
    ctf = torch.cat(
        [
            ctf_2d(u[part], v[part], angle[part], Optics(kv, 2.7, 0.1, pixel), size)
            for kv, part in ((200.0, slice(0, 100)), (300.0, slice(100, n)))
        ]
    )
    images = torch.fft.irfft2(torch.fft.rfft2(images_of(points, size, rotations, shifts)) * ctf, s=(size, size))
    write_mrc(folder / "x.mrcs", images.numpy(), pixel)
    table = ParticleTable(
        ["x.mrcs"] * n,
        np.arange(n),
        np.full(n, pixel),
        angles=matrix_to_euler(rotations.double()).numpy(),
        shifts=-pixel * shifts.numpy(),
        defocus=torch.stack([u, v, angle], 1).numpy(),
        voltage=voltage,
        cs=np.full(n, 2.7),
        amplitude_contrast=np.full(n, 0.1),
        image_size=np.full(n, size),
    )
    write_particles(folder / "x.star", table)
    write_mrc(folder / "truth.mrc", volume_of(points, size).numpy(), pixel, stack=False)
    return folder


@pytest.mark.parametrize(
    "engine",
    [
        "fourier",
        pytest.param(
            "relion",
            marks=[
                pytest.mark.peers,
                pytest.mark.skipif(shutil.which("relion_reconstruct") is None, reason="RELION is not installed"),
            ],
        ),
    ],
)
def test_from_a_star_file_to_maps(particles_on_disk: Path, engine: str) -> None:
    output = particles_on_disk / f"{engine}.mrc"
    paths = reconstruct_star(particles_on_disk / "x.star", output, engine)
    assert [p.name for p in paths] == [f"{engine}.mrc", f"{engine}_half1.mrc", f"{engine}_half2.mrc"]
    curve = fsc_of_maps(paths[0], particles_on_disk / "truth.mrc")["fsc"]
    assert min(curve[1:9]) > 0.95
    halves = fsc_of_maps(paths[1], paths[2])
    assert 4 <= halves["resolution"]["0.143"] < 6
    assert halves["resolution"]["0.143"] <= halves["resolution"]["0.5"]


def test_a_background_is_not_taken_for_the_particle(particles_on_disk: Path, tmp_path: Path) -> None:
    star = particles_on_disk / "x.star"
    images, pixel = read_mrc(particles_on_disk / "x.mrcs")
    write_mrc(tmp_path / "x.mrcs", images + 2 * images.max(), pixel)
    (tmp_path / "x.star").write_text(star.read_text())
    for folder in (particles_on_disk, tmp_path):
        reconstruct_star(folder / "x.star", folder / "m.mrc")
    found, expected = (read_map(folder / "m.mrc")[0] for folder in (tmp_path, particles_on_disk))
    assert float(abs(found - expected).max()) < 1e-3 * float(expected.max())


def test_what_a_star_leaves_out_or_contradicts_is_said(particles_on_disk: Path, tmp_path: Path) -> None:
    star = particles_on_disk / "x.star"
    table = read_particles(star)
    stacks = [str(find_stack(name, star).resolve()) for name in table.stacks]
    said: list[str] = []
    for changes in ({"defocus": None}, {"pixel_size": 1.5 * table.pixel_size}):
        write_particles(tmp_path / "c.star", dataclasses.replace(table, stacks=stacks, **changes))  # type: ignore[arg-type]
        reconstruct_star(tmp_path / "c.star", tmp_path / "map.mrc", say=said.append)
    assert any("no CTF is corrected" in line for line in said)
    assert any("--pixel-size" in line for line in said)


def test_commands_refuse_what_cannot_be_right(particles_on_disk: Path, tmp_path: Path) -> None:
    poseless = tmp_path / "y.star"
    one = (particles_on_disk / "x.mrcs").resolve()
    write_particles(poseless, ParticleTable([str(one)], np.array([0]), np.array([2.0])))
    write_mrc(tmp_path / "other.mrc", np.zeros((12, 12, 12), np.float32), 2.0, stack=False)
    write_mrc(tmp_path / "scale.mrc", np.zeros((24, 24, 24), np.float32), 3.0, stack=False)
    for call in (
        lambda: reconstruct_star(poseless, tmp_path / "map.mrc"),
        lambda: fsc_of_maps(particles_on_disk / "truth.mrc", tmp_path / "other.mrc"),
        lambda: fsc_of_maps(particles_on_disk / "truth.mrc", tmp_path / "scale.mrc"),
        lambda: fsc_of_maps(particles_on_disk / "truth.mrc", particles_on_disk / "truth.mrc", tmp_path / "other.mrc"),
    ):
        with pytest.raises(CryobenchError) as error:
            call()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "map.mrc").exists()
    with pytest.raises(CryobenchError, match=r"is a stack of \d+ images of 24 x 24 pixels, not a map"):
        fsc_of_maps(particles_on_disk / "truth.mrc", one)
    write_mrc(tmp_path / "micrograph.mrc", np.zeros((1, 40, 48), np.float32), 2.0)
    with pytest.raises(CryobenchError, match="is one image of 48 x 40 pixels, not a map"):
        refuse_images(tmp_path / "micrograph.mrc")
    write_mrc(tmp_path / "long.mrc", np.zeros((100, 24, 24), np.float32), 2.0, stack=False)  # calls itself a map
    with pytest.raises(CryobenchError, match="is a stack of 100 images"):
        refuse_images(tmp_path / "long.mrc")
    for shape in ((24, 24, 24), (20, 24, 28)):  # maps of old programs are marked as stacks
        write_mrc(tmp_path / "old.mrc", np.zeros(shape, np.float32), 2.0)
        refuse_images(tmp_path / "old.mrc")
