"""Maps against closed forms (Gaussians sampled on either grid), gemmi's axis order, and two real files."""

from pathlib import Path

import gemmi
import numpy as np
import pytest
import torch
from torch import Tensor

from cryobench.errors import BadFileError, CryobenchError
from cryobench.specimens.maps import centred, read_map, resample
from cryobench.specimens.mrc import write_mrc

# centres (x, y, z) in A, widths in A (band-limited on all the grids below), heights
BLOBS = [((0.0, 0.0, 0.0), 5.0, 1.0), ((9.0, -4.0, 6.0), 4.2, 0.7), ((-7.3, 8.1, -10.2), 4.5, -0.4)]


def _gaussians(shape: tuple[int, int, int], pixel: float) -> Tensor:
    z, y, x = (pixel * (torch.arange(n) - n // 2).double() for n in shape)
    total = torch.zeros(shape, dtype=torch.float64)
    for (cx, cy, cz), width, height in BLOBS:
        parts = [torch.exp(-((a - c) ** 2) / (2 * width**2)) for a, c in ((z, cz), (y, cy), (x, cx))]
        total += height * torch.einsum("i,j,k->ijk", *parts)
    return total.float()


@pytest.mark.parametrize(
    ("shape", "pixel_in", "size", "pixel_out"),
    [
        ((48, 48, 48), 2.0, 32, 3.0),  # down, commensurate
        ((49, 49, 49), 2.0, 33, 3.1),  # odd, any ratio
        ((49, 49, 49), 2.0, 30, 2.71828),
        ((36, 36, 36), 2.7, 61, 1.37),  # up
        ((40, 40, 40), 2.5, 40, 2.5),  # nothing to do
        ((47, 50, 54), 2.0, 31, 2.9),  # not a cube
        ((48, 48, 48), 2.0, 60, 2.4),  # a box larger than the input
    ],
)
def test_resampling_is_exact_for_band_limited_maps(
    shape: tuple[int, int, int], pixel_in: float, size: int, pixel_out: float
) -> None:
    result = resample(_gaussians(shape, pixel_in), pixel_in, size, pixel_out)
    expected = _gaussians((size,) * 3, pixel_out)
    assert result.dtype == torch.float32
    assert (result - expected).abs().max() < 1e-3 * expected.max()


def test_halving_the_size_is_plain_fourier_cropping() -> None:
    volume = torch.randn(24, 24, 24, generator=torch.Generator().manual_seed(0))
    volume[0], volume[-1] = 0, 0
    volume[:, 0], volume[:, -1] = 0, 0
    volume[..., 0], volume[..., -1] = 0, 0  # background 0
    spectrum = torch.fft.fftshift(torch.fft.fftn(volume.double()))[6:19, 6:19, 6:19]
    for axis in range(3):  # the Nyquist planes of the smaller box, once at either end
        spectrum.select(axis, 0).mul_(0.5)
        spectrum.select(axis, 12).mul_(0.5)
    folded = torch.zeros(12, 12, 12, dtype=torch.complex128)
    where = torch.arange(-6, 7) % 12
    folded.index_put_(torch.meshgrid(where, where, where, indexing="ij"), spectrum, accumulate=True)
    expected = torch.fft.ifftn(folded).real / 8
    torch.testing.assert_close(resample(volume, 1.0, 12, 2.0), expected.float(), atol=2e-5, rtol=0)


def test_a_lone_frequency_above_the_new_nyquist_is_removed_and_one_below_kept() -> None:
    i = torch.arange(40).double() - 20
    for cycles, kept in ((9, 1.0), (11, 0.0)):  # new Nyquist: 40 / 2 / 2 = 10 cycles per box
        wave = torch.cos(2 * torch.pi * cycles * i / 40)
        volume = wave.expand(40, 40, 40).float()
        volume = volume - volume[:, :, :1].median()
        result = resample(volume, 1.0, 20, 2.0)
        assert result[10, 10].std() == pytest.approx(kept * wave[::2].std().item(), abs=1e-4)


def test_scale_offset_and_background_are_kept() -> None:
    volume = _gaussians((48, 48, 48), 2.0)
    result = resample(3 * volume + 7, 2.0, 70, 1.7)
    torch.testing.assert_close(result, 3 * resample(volume, 2.0, 70, 1.7) + 7, atol=1e-4, rtol=0)
    assert result[0, 0, 0] == pytest.approx(7, abs=1e-3)


@pytest.mark.parametrize(("n", "size"), [(8, 12), (9, 12), (8, 13), (9, 13), (12, 8), (12, 9), (13, 8), (13, 9)])
def test_centre_voxel_stays_the_centre(n: int, size: int) -> None:
    volume = torch.zeros(n, n, n)
    volume[n // 2, n // 2, n // 2 + 1] = 1
    result = centred(volume, size)
    assert result.shape == (size,) * 3
    assert result.nonzero().tolist() == [[size // 2, size // 2, size // 2 + 1]]


def test_impossible_sizes_are_refused() -> None:
    for size, pixel in ((0, 1.0), (8, 0.0), (8, -1.0), (8, float("nan"))):
        with pytest.raises(CryobenchError, match="positive"):
            resample(torch.zeros(4, 4, 4), 1.0, size, pixel)


@pytest.mark.parametrize("axes", [(1, 2, 3), (3, 2, 1), (2, 1, 3), (3, 1, 2), (2, 3, 1), (1, 3, 2)])
def test_axis_order_as_gemmi_reads_it(tmp_path: Path, axes: tuple[int, int, int]) -> None:
    path = tmp_path / "x.ccp4"
    data = np.random.default_rng(0).normal(size=(5, 6, 7)).astype(np.float32)  # sections, rows, columns
    extent = dict(zip(axes, (7, 6, 5), strict=True))  # columns run along axes[0]
    write_mrc(path, data, 1.5, stack=False)
    raw = bytearray(path.read_bytes())
    along = np.array([extent[1], extent[2], extent[3]], "<i4")
    raw[16:28] = np.array([3, -2, 4], "<i4").tobytes()  # start indices do not move the density
    raw[28:40] = along.tobytes()
    raw[40:52] = (1.5 * along).astype("<f4").tobytes()
    raw[64:76] = np.array(axes, "<i4").tobytes()
    path.write_bytes(raw)

    volume, pixel = read_map(path)
    assert pixel == pytest.approx(1.5)
    raw[16:28] = bytes(12)
    (tmp_path / "zero.ccp4").write_bytes(raw)
    peer = gemmi.read_ccp4_map(str(tmp_path / "zero.ccp4"), setup=True)
    expected = torch.from_numpy(np.array(peer.grid, copy=True).transpose(2, 1, 0).copy())
    assert tuple(expected.shape) == tuple(int(n) for n in along[::-1])
    torch.testing.assert_close(volume, centred(expected, 7))


def test_bad_axes_angles_and_voxels_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.mrc"
    write_mrc(path, np.zeros((4, 4, 4), np.float32), 1.5, stack=False)
    whole = path.read_bytes()
    for place, value, error, pattern in [
        (64, np.int32(2), BadFileError, "axis order"),
        (52, np.float32(70), BadFileError, "angles"),
        (48, np.float32(9), CryobenchError, "unequal"),
        (48, np.float32(0), CryobenchError, "--pixel-size"),
    ]:
        raw = bytearray(whole)
        raw[place : place + 4] = value.tobytes()
        path.write_bytes(raw)
        with pytest.raises(error, match=pattern):
            read_map(path)


def test_real_maps(shared: Path) -> None:
    channel, pixel = read_map(shared / "data/emd-6824-map/6824.mrc")
    assert channel.shape == (70, 70, 70)
    assert pixel == pytest.approx(2.64)
    assert channel.std() == pytest.approx(1.0, abs=1e-3)
    # to a finer grid of the same extent and back, nothing is lost
    finer = resample(channel, pixel, 84, pixel * 70 / 84)
    torch.testing.assert_close(resample(finer, pixel * 70 / 84, 70, pixel), channel, atol=0.01, rtol=0)

    path = shared / "data/ribosome-70s-map/clean70SRibosome_vol_65p.mrc"
    with pytest.raises(CryobenchError, match="--pixel-size"):
        read_map(path)
    ribosome, pixel = read_map(path, 4.5)
    assert pixel == 4.5
    small = resample(ribosome, pixel, 48, 6.3)
    grid = torch.arange(65) - 32.0
    coarse = torch.arange(48) - 24.0
    for axis in range(3):  # the centre of mass stays where it was, in angstrom
        others = [a for a in range(3) if a != axis]
        before = (ribosome.sum(others) * grid).sum() / ribosome.sum() * 4.5
        after = (small.sum(others) * coarse).sum() / small.sum() * 6.3
        assert float(after) == pytest.approx(float(before), abs=0.2)
    assert float(small.sum() * 6.3**3) == pytest.approx(float(ribosome.sum() * 4.5**3), rel=0.01)
