"""MRC in and out, against mrcfile and against files that lie."""

import gzip
import struct
import tracemalloc
import warnings
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch

from cryobench.errors import BadFileError, CryobenchError
from cryobench.specimens.mrc import load, read_header, read_mrc, write_mrc


def _bytes(data: np.ndarray, mode: int, pixel: float = 1.5, order: str = "<", stamp: bool = True) -> bytearray:
    """An MRC file made with struct alone, after the format's own table."""
    nz, ny, nx = data.shape
    header = bytearray(1024)
    struct.pack_into(order + "4i", header, 0, nx, ny, nz, mode)
    struct.pack_into(order + "3i", header, 28, nx, ny, nz)
    struct.pack_into(order + "6f", header, 40, nx * pixel, ny * pixel, nz * pixel, 90, 90, 90)
    struct.pack_into(order + "3i", header, 64, 1, 2, 3)
    if stamp:
        header[208:214] = b"MAP " + (b"\x44\x44" if order == "<" else b"\x11\x11")
    return header + data.astype(data.dtype.newbyteorder(order)).tobytes()


def _save(path: Path, raw: bytes) -> Path:
    path.write_bytes(raw)
    return path


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(3, 7, 10)).astype(np.float32)


@pytest.mark.parametrize("name", ["a.mrcs", "a.mrc", "a.map", "a.mrc.gz", "a.ccp4.gz"])
@pytest.mark.parametrize("stack", [True, False])
def test_written_files_are_valid_for_mrcfile_and_come_back(
    tmp_path: Path, images: np.ndarray, name: str, stack: bool
) -> None:
    path = tmp_path / name
    write_mrc(path, torch.from_numpy(images), 1.37, stack=stack)
    with mrcfile.open(path) as peer:
        np.testing.assert_array_equal(peer.data, images)
        assert peer.voxel_size.x == pytest.approx(1.37)
        assert peer.voxel_size.z == pytest.approx(1.37)
        assert bool(peer.is_image_stack()) is stack
        assert peer.header.dmean == pytest.approx(images.mean(dtype=np.float64), abs=1e-6)
        assert peer.header.rms == pytest.approx(images.std(dtype=np.float64), abs=1e-6)
    assert mrcfile.validate(path)
    back, pixel = read_mrc(path)
    np.testing.assert_array_equal(back, images)
    assert back.dtype == np.float32
    assert pixel == pytest.approx(1.37)
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("stamp", [True, False])
@pytest.mark.parametrize(("mode", "dtype"), [(0, "i1"), (1, "i2"), (2, "f4"), (6, "u2"), (12, "f2")])
def test_every_mode_in_both_byte_orders_with_and_without_map_id(
    tmp_path: Path, order: str, stamp: bool, mode: int, dtype: str
) -> None:
    limits = np.iinfo(dtype) if dtype[0] in "iu" else np.finfo(dtype)
    data = np.zeros((2, 5, 3), dtype)
    data[0, 0, :2] = limits.min, limits.max
    data[1] = np.arange(15).reshape(5, 3)
    back, pixel = read_mrc(_save(tmp_path / "x.mrc", _bytes(data, mode, 2.5, order, stamp)))
    np.testing.assert_array_equal(back, data.astype(np.float32))
    assert pixel == pytest.approx(2.5)


@pytest.mark.parametrize(("flags", "expected"), [(0, 200.0), (1, -56.0)])
def test_imod_flag_decides_the_sign_of_mode_0(tmp_path: Path, flags: int, expected: float) -> None:
    raw = _bytes(np.full((1, 2, 2), 200, np.uint8), 0)
    struct.pack_into("<2i", raw, 152, 1146047817, flags)
    assert read_mrc(_save(tmp_path / "x.mrc", raw))[0].max() == expected


def test_single_image_and_extended_header(tmp_path: Path, images: np.ndarray) -> None:
    write_mrc(tmp_path / "one.mrc", images[0], 2.0)
    assert read_mrc(tmp_path / "one.mrc")[0].shape == (1, 7, 10)
    with mrcfile.new(tmp_path / "ext.mrc") as file:
        file.set_data(images)
        file.set_extended_header(np.ones(77, "V1"))
        file.voxel_size = 3.0
    np.testing.assert_array_equal(read_mrc(tmp_path / "ext.mrc")[0], images)


def test_pixel_size_is_asked_for_and_never_guessed(tmp_path: Path, images: np.ndarray) -> None:
    for bad in (0.0, -1.0, np.nan, np.inf):
        path = _save(tmp_path / "x.mrc", _bytes(images, 2, bad))
        with pytest.raises(CryobenchError, match="--pixel-size"):
            read_mrc(path)
        assert read_mrc(path, 4.2)[1] == 4.2
        with pytest.raises(CryobenchError, match="positive"):
            read_mrc(path, bad)
    raw = _bytes(images, 2, 1.5)
    struct.pack_into("<f", raw, 44, 7 * 1.8)
    with pytest.raises(CryobenchError, match="unequal"):
        read_mrc(_save(path, raw))


def test_the_default_of_one_angstrom_is_remarked_on_unless_it_is_ours(tmp_path: Path, images: np.ndarray) -> None:
    with pytest.warns(UserWarning, match="exactly 1.0"):
        read_mrc(_save(tmp_path / "x.mrc", _bytes(images, 2, 1.0)))
    write_mrc(tmp_path / "y.mrc", images, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_mrc(tmp_path / "y.mrc")[1] == 1.0
        assert read_mrc(tmp_path / "x.mrc", 1.0)[1] == 1.0


def test_bad_files_give_one_clear_line(tmp_path: Path, images: np.ndarray) -> None:
    whole = bytes(_bytes(images, 2))
    nan, inf = images.copy(), images.copy()
    nan[1, 2, 3], inf[0, 0, 0] = np.nan, -np.inf
    complex_mode, huge = bytearray(whole), bytearray(whole)
    struct.pack_into("<i", complex_mode, 12, 4)
    struct.pack_into("<3i", huge, 0, 60000, 60000, 60000)
    cases = {
        "empty": (b"", "empty"),
        "short header": (whole[:500], "not an MRC"),
        "truncated": (whole[:-1], "truncated"),
        "too long": (whole + whole[1024:] * 10, "longer"),
        "same bytes behind": (whole + b"abc", "other bytes"),
        "nan": (bytes(_bytes(nan, 2)), "NaN"),
        "inf": (bytes(_bytes(inf, 2)), "NaN or infinite"),
        "complex": (bytes(complex_mode), "mode 4"),
        "terabytes": (bytes(huge), "truncated or its header lies"),
        "text": (b"data_\nloop_\n" * 200, "not an MRC"),
        "png": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 8, "not an MRC"),
        "damaged gzip": (gzip.compress(whole)[:-20], "damaged gzip"),
        "truncated inside gzip": (gzip.compress(whole[:-4]), "truncated"),
        "terabytes in gzip": (gzip.compress(bytes(huge)), "header lies"),
        "gzip of nothing": (gzip.compress(b""), "not an MRC"),
    }
    for name, (raw, pattern) in cases.items():
        path = _save(tmp_path / "x.mrc", raw)
        with pytest.raises(BadFileError, match=pattern) as caught:
            read_mrc(path, 1.0)
        message = str(caught.value)
        assert str(path) in message, name
        assert "\n" not in message, name
    np.testing.assert_array_equal(read_mrc(_save(path, whole + b"\0" * 300))[0], images)
    for missing in (tmp_path / "no.mrc", tmp_path, tmp_path / "x.mrc" / "y", Path("/dev/zero"), "a\0b"):
        with pytest.raises(CryobenchError):
            read_mrc(missing)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, images: np.ndarray) -> None:
    path = tmp_path / "x.mrcs"
    write_mrc(path, images, 1.5)
    before = path.read_bytes()
    for bad in (images * np.nan, images[:0], np.zeros((2, 2, 2, 2))):
        with pytest.raises(CryobenchError):
            write_mrc(path, bad, 1.5)
    for pixel in (0.0, -1.0, float("nan")):
        with pytest.raises(CryobenchError):
            write_mrc(path, images, pixel)
    with pytest.raises(CryobenchError, match="does not exist"):
        write_mrc(tmp_path / "no" / "x.mrc", images, 1.5)
    with pytest.raises(CryobenchError, match="not a regular file"):
        write_mrc("/dev/null", images, 1.5)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_corrupted_headers_never_crash_nor_allocate_beyond_the_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    data = rng.normal(size=(4, 50, 60)).astype(np.float32)
    whole = _bytes(data, 2)
    path = tmp_path / "fuzz.mrc"
    lines: list[str] = []
    valid = 0
    tracemalloc.start()
    for trial in range(600):
        raw = bytearray(whole)
        for _ in range(rng.integers(1, 6)):
            # mostly in the words that decide size and mode
            where = rng.integers(0, 100 if rng.random() < 0.7 else 1024)
            raw[where] = rng.integers(0, 256)
        if rng.random() < 0.2:
            raw = raw[: rng.integers(0, len(raw))]
        size = len(raw)
        path.write_bytes(gzip.compress(raw, 1) if trial % 4 == 0 else raw)
        del raw
        tracemalloc.reset_peak()
        base = tracemalloc.get_traced_memory()[0]
        try:
            array = load(path)[0]
        except CryobenchError as error:
            lines.append(str(error))
        else:
            assert array.dtype == np.float32
            assert np.isfinite(array).all()
            valid += 1
            del array
        peak = tracemalloc.get_traced_memory()[1] - base
        # int8 grows fourfold on conversion; gzip has a piece of 1 MB and its own buffers
        assert peak < 5 * size + 2_000_000
    tracemalloc.stop()
    assert not any("\n" in line for line in lines)
    assert min(valid, len(lines)) > 50


def test_real_files(shared: Path) -> None:
    particles = shared / "data/ribosome-50s-empiar-10076-particles/empiar_10076_7.mrc"
    with pytest.raises(CryobenchError, match="--pixel-size"):
        read_mrc(particles)
    images, pixel = read_mrc(particles, 1.31)
    assert images.shape == (7, 320, 320)
    assert pixel == 1.31
    assert images.std() == pytest.approx(1.005, abs=1e-3)
    with pytest.raises(CryobenchError, match="--pixel-size"):
        read_mrc(shared / "data/ribosome-70s-map/clean70SRibosome_vol_65p.mrc")
    field = shared / "data/contaminated-micrograph-ucsf/Ucsf_stack_1142_DW.mrc"
    with pytest.warns(UserWarning, match="often a default"):
        image, _ = read_mrc(field)
    assert image.shape == (1, 927, 959)
    assert image.mean(dtype=np.float64) == pytest.approx(6802.1, abs=0.1)
    assert read_header(shared / "data/emd-6824-map/6824.mrc").voxel[0] == pytest.approx(2.64)
