import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from scipy import ndimage
from torch import Tensor

from cryobench.errors import CryobenchError
from cryobench.imaging import projection
from cryobench.imaging.ctf import Optics, ctf_2d
from cryobench.imaging.projection import Projector
from cryobench.imaging.rotations import euler_to_matrix, random_rotations


class Blobs:
    """A sum of round Gaussians within 60 % of the box: volume and projections known in closed form."""

    def __init__(self, size: int, count: int = 30) -> None:
        generator = torch.Generator().manual_seed(0)
        direction = torch.randn(count, 3, generator=generator, dtype=torch.float64)
        radius = 0.3 * size * torch.rand(count, 1, generator=generator, dtype=torch.float64) ** (1 / 3)
        self.centres = direction / direction.norm(dim=1, keepdim=True) * radius
        self.sigma = 1.2 + 1.3 * torch.rand(count, generator=generator, dtype=torch.float64)
        self.axis = torch.arange(size, dtype=torch.float64) - size // 2

    def profile(self, centres: Tensor) -> Tensor:
        return torch.exp(-((self.axis - centres[..., None]) ** 2) / (2 * self.sigma[:, None] ** 2))

    def volume(self) -> Tensor:
        x, y, z = (self.profile(c) for c in self.centres.T)
        return torch.einsum("bz,by,bx->zyx", z, y, x)

    def images(self, rotations: Tensor, shifts: Tensor | float = 0.0) -> Tensor:
        moved = (self.centres @ rotations.double())[..., :2]  # R^T c, the centres in the image frame
        if isinstance(shifts, Tensor):
            moved = moved + shifts.double()[:, None]
        weight = self.sigma * math.sqrt(2 * math.pi)
        return torch.einsum("nby,nbx,b->nyx", self.profile(moved[..., 1]), self.profile(moved[..., 0]), weight)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def poses(n: int = 12) -> Tensor:
    return random_rotations(n, torch.Generator().manual_seed(2))


@pytest.mark.parametrize("size", [41, 48, 49, 64])
def test_projections_of_gaussians_are_exact_to_one_percent(size: int) -> None:
    blobs = Blobs(size)
    shifts = torch.randn(12, 2, generator=torch.Generator().manual_seed(3)) * 2
    images = Projector(blobs.volume().float()).project(poses(), shifts)
    expected = blobs.images(poses(), shifts)
    assert images.dtype == torch.float32
    assert max(relative(i, e) for i, e in zip(images, expected, strict=True)) < 0.01
    assert relative(images, expected) < 0.008


@pytest.mark.parametrize("angles", [(0, 0, 0), (0, 90, 0), (90, 90, 0), (0, 45, 0)])
@pytest.mark.parametrize("size", [48, 49])
def test_views_along_the_grid(size: int, angles: tuple[int, int, int]) -> None:
    """The ghosts of all axes fall on the same place here: the worst poses."""
    blobs = Blobs(size)
    rotation = euler_to_matrix(torch.tensor([angles], dtype=torch.float32))
    image = Projector(blobs.volume()).project(rotation)
    assert image.dtype == torch.float64
    assert relative(image, blobs.images(rotation)) < 0.01


def test_unrotated_projection_is_the_sum_along_z() -> None:
    volume = Blobs(49).volume()
    assert relative(Projector(volume).project(torch.eye(3)[None])[0], volume.sum(0)) < 0.01


def test_against_rotation_in_real_space() -> None:
    volume = Blobs(48).volume()
    rotation = poses(1)[0].double()
    # scipy turns (z, y, x) arrays: output voxel p takes the value at R p
    turn = rotation.flip(0, 1).numpy()
    centre = torch.full((3,), 24.0, dtype=torch.float64).numpy()
    turned = ndimage.affine_transform(volume.numpy(), turn, centre - turn @ centre, order=5)
    image = Projector(volume).project(rotation[None])[0]
    assert relative(image, torch.from_numpy(turned).sum(0)) < 0.01


def test_against_torch_fourier_slice() -> None:
    library = pytest.importorskip("torch_fourier_slice")
    volume = Blobs(48).volume().float()  # the library is 22 % off the closed form at 49: even sizes only
    assert relative(Projector(volume).project(poses()), library.project_3d_to_2d(volume, poses())) < 0.015


def test_more_padding_is_more_exact() -> None:
    blobs = Blobs(48)
    errors = [relative(Projector(blobs.volume(), p).project(poses()), blobs.images(poses())) for p in (1.5, 2, 3)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[1] < 0.013  # plain trilinear weights have 0.024
    assert errors[2] < 0.006


def test_whole_shifts_move_whole_pixels() -> None:
    projector = Projector(Blobs(40).volume().float())
    still, moved = projector.project(poses(2)), projector.project(poses(2), torch.tensor([[3.0, -2.0], [0.0, 1.0]]))
    torch.testing.assert_close(moved[0], still[0].roll((-2, 3), (0, 1)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(moved[1], still[1].roll(1, 0), atol=1e-4, rtol=1e-4)


def test_filters_multiply_the_transform() -> None:
    projector = Projector(Blobs(33).volume().float())
    filters = ctf_2d(torch.tensor([9000.0, 15000.0]), torch.tensor([8000.0, 15000.0]), torch.zeros(2), Optics(), 33)
    plain, filtered = projector.project(poses(2)), projector.project(poses(2), filters=filters)
    expected = torch.fft.irfft2(torch.fft.rfft2(plain) * filters, s=(33, 33))
    torch.testing.assert_close(filtered, expected, atol=1e-4, rtol=1e-4)
    same = projector.project(poses(2), filters=filters[:1])
    torch.testing.assert_close(same[0], filtered[0])


def test_chunks_and_precision_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    volume = Blobs(32).volume()
    shifts, filters = torch.rand(12, 2), torch.rand(12, 32, 17)
    whole = Projector(volume.float()).project(poses(), shifts, filters)
    monkeypatch.setitem(projection.CHUNK, "cpu", 1000)
    torch.testing.assert_close(Projector(volume.float()).project(poses(), shifts, filters), whole)
    double = Projector(volume).project(poses(), shifts, filters)
    assert relative(whole, double) < 1e-5


def test_turning_the_volume_is_turning_the_pose_from_the_left() -> None:
    volume = Blobs(49).volume()
    turned = volume.rot90(1, (1, 2))  # turned[z, y, x] = volume[z, x, -y]: V'(p) = V(S p), S a quarter turn
    quarter = euler_to_matrix(torch.tensor([[90.0, 0.0, 0.0]]))
    torch.testing.assert_close(
        Projector(turned).project(poses()), Projector(volume).project(quarter @ poses()), atol=1e-4, rtol=1e-4
    )


def test_none_and_one_and_empty() -> None:
    projector = Projector(torch.zeros(16, 16, 16))
    assert projector.project(torch.zeros(0, 3, 3)).shape == (0, 16, 16)
    assert torch.equal(projector.project(poses(1)), torch.zeros(1, 16, 16))


def test_wrong_input() -> None:
    with pytest.raises(CryobenchError, match="cubic"):
        Projector(torch.zeros(8, 8, 9))
    with pytest.raises(CryobenchError, match="padding"):
        Projector(torch.zeros(8, 8, 8), padding=0.5)
    projector = Projector(torch.zeros(8, 8, 8))
    with pytest.raises(CryobenchError, match="orthonormal"):
        projector.project(2 * poses(1))
    with pytest.raises(CryobenchError, match="orthonormal"):
        projector.project(torch.full((1, 3, 3), math.nan))
    with pytest.raises(CryobenchError, match=r"\(n, 3, 3\)"):
        projector.project(torch.eye(3))
    with pytest.raises(CryobenchError, match="shifts"):
        projector.project(poses(2), torch.zeros(1, 2))
    with pytest.raises(CryobenchError, match="filters"):
        projector.project(poses(2), filters=torch.ones(2, 8, 8))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_gives_the_same_images() -> None:
    volume, shifts = Blobs(48).volume().float(), torch.rand(12, 2)
    images = Projector(volume, device="cuda").project(poses(), shifts)
    assert images.is_cuda
    assert relative(images.cpu(), Projector(volume).project(poses(), shifts)) < 1e-4


@pytest.mark.peers
@pytest.mark.skipif(shutil.which("relion_project") is None, reason="RELION is not installed")
@pytest.mark.parametrize("with_ctf", [False, True])
def test_against_relion(tmp_path: Path, with_ctf: bool) -> None:
    """Same orientation, hand, sign of the CTF and of astigmatism; RELION's origin is minus our shift."""
    import mrcfile

    size, pixel_size, n = 48, 1.5, 12
    blobs = Blobs(size)
    generator = torch.Generator().manual_seed(4)
    angles = torch.rand(n, 3, generator=generator) * torch.tensor([360.0, 180.0, 360.0])
    shifts = torch.randn(n, 2, generator=generator) * 2
    u = 12000 + 4000 * torch.rand(n, generator=generator)
    v, turn = u - 3000, 180 * torch.rand(n, generator=generator)
    with mrcfile.new(tmp_path / "volume.mrc") as mrc:
        mrc.set_data(blobs.volume().float().numpy())
        mrc.voxel_size = pixel_size
    names = "ImageName OpticsGroup AngleRot AngleTilt AnglePsi OriginXAngst OriginYAngst DefocusU DefocusV DefocusAngle"
    rows = torch.cat([angles, -shifts * pixel_size, torch.stack([u, v, turn], 1)], dim=1).tolist()
    (tmp_path / "poses.star").write_text(
        "data_optics\n\nloop_\n_rlnOpticsGroup\n_rlnVoltage\n_rlnSphericalAberration\n_rlnAmplitudeContrast\n"
        "_rlnImagePixelSize\n_rlnImageSize\n_rlnImageDimensionality\n"
        f"1 300 2.7 0.1 {pixel_size} {size} 2\n\ndata_particles\n\nloop_\n"
        + "".join(f"_rln{name}\n" for name in names.split())
        + "".join(f"{i + 1:06d}@x.mrcs 1 " + " ".join(f"{x:.6f}" for x in row) + "\n" for i, row in enumerate(rows))
    )
    command = ["relion_project", "--i", "volume.mrc", "--ang", "poses.star", "--angpix", str(pixel_size), "--pad", "2"]
    subprocess.run(
        [*command, "--o", "out", *(["--ctf"] if with_ctf else [])], cwd=tmp_path, check=True, capture_output=True
    )
    relion = torch.from_numpy(mrcfile.read(tmp_path / "out.mrcs"))
    optics = Optics(300, 2.7, 0.1, pixel_size)
    filters = ctf_2d(u, v, turn, optics, size) if with_ctf else None
    images = Projector(blobs.volume().float()).project(euler_to_matrix(angles), shifts, filters)
    assert relative(relion, images) < 0.03  # RELION's own error is 2 % here
