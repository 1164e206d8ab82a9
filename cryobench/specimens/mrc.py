"""MRC/CCP4 files in and out: the header is compared with the file's real length before anything is allocated.

Format: A. Cheng et al., "MRC2014: Extensions to the MRC format header for electron cryo-microscopy and
tomography", J. Struct. Biol. 192 (2015), and https://www.ccpem.ac.uk/mrc_format/mrc2014.php.
"""

import gzip
import math
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cryobench.errors import BadFileError, CryobenchError
from cryobench.specimens.files import atomic_write, existing_file

_MODES = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}
_MODE_NAMES = "0 (int8), 1 (int16), 2 (float32), 6 (uint16), 12 (float16)"
_IMOD_STAMP = 1146047817  # "IMOD" in word 39: then bit 0 of word 40 tells whether mode 0 is signed
_MAX_PADDING = 4096  # zero bytes tolerated after the data: some programs fill the last disk block
_GZIP_RATIO = 1032  # deflate cannot do better, so a header that promises more is lying
_LABEL = b"written by cryobench"


@dataclass(frozen=True)
class MrcHeader:
    """What a reader needs of an MRC header.

    shape: (sections, rows, columns) as stored. dtype: of the stored numbers, with their byte order.
    offset: where the data begin, in bytes. voxel: (x, y, z) size in angstrom, 0 where the header has none.
    axes: which of x=1, y=2, z=3 runs along (columns, rows, sections). angles: of the cell, degrees.
    ispg: 0 for images, 1 for a volume. default_voxel: the voxel size is exactly 1.0 and not from us,
    which programs write when they do not know it.
    """

    shape: tuple[int, int, int]
    dtype: np.dtype
    offset: int
    voxel: tuple[float, ...]
    axes: tuple[int, ...]
    angles: tuple[float, ...]
    ispg: int
    default_voxel: bool

    @property
    def nbytes(self) -> int:
        """Bytes of header, extended header and data together (exact, however large)."""
        return self.offset + math.prod(self.shape) * self.dtype.itemsize


def read_mrc(path: str | Path, pixel_size: float | None = None) -> tuple[np.ndarray, float]:
    """Images or a volume from ``.mrc``, ``.mrcs``, ``.map``, ``.ccp4``, plain or gzipped.

    Returns a float32 array as stored, (n, height, width) or (z, y, x) (a single image is (1, h, w)), in
    the file's own values, and the pixel size in angstrom: the one given, else the header's. Both byte
    orders, a missing MAP id and up to 4096 zero bytes after the data are accepted.

    Raises BadFileError where the file is not MRC, is shorter or longer than its header says, has a mode
    of complex or packed numbers or holds NaN or infinities; CryobenchError where it cannot be opened or
    has no (or an unequal) pixel size and none is given.
    """
    array, header = load(path)
    return array, choose_pixel_size(path, header, header.voxel[:2], pixel_size)


def read_header(path: str | Path) -> MrcHeader:
    """The header alone, checked against the length of the file. Raises as :func:`read_mrc` does."""
    return _read(path, with_data=False)[1]


def load(path: str | Path) -> tuple[np.ndarray, MrcHeader]:
    """The float32 array as stored and the header. Raises as :func:`read_mrc`, but asks no pixel size."""
    array, header = _read(path, with_data=True)
    # minimum and maximum propagate NaN and infinities without a temporary array
    if not (np.isfinite(array.min()) and np.isfinite(array.max())):
        raise BadFileError(f"{path} holds NaN or infinite values; mask or replace them before using it")
    return array, header


def choose_pixel_size(path: str | Path, header: MrcHeader, voxel: tuple[float, ...], given: float | None) -> float:
    """The pixel size in angstrom: ``given``, else the header's if the ``voxel`` sides agree to 0.1 %."""
    if given is not None:
        if not (math.isfinite(given) and given > 0):
            raise CryobenchError(f"the pixel size must be a positive number of angstrom, not {given}")
        return float(given)
    if not all(math.isfinite(v) and 1e-3 < v < 1e5 for v in voxel):
        raise CryobenchError(f"{path} has no pixel size in its header; give it with --pixel-size A (angstrom)")
    if max(voxel) > 1.001 * min(voxel):
        sides = " x ".join(f"{v:.4g}" for v in voxel)
        raise CryobenchError(
            f"{path} has pixels of unequal sides ({sides} A); resample it, "
            "or give --pixel-size A if the header is wrong"
        )
    if header.default_voxel:
        warnings.warn(
            f"{path}: a pixel size of exactly 1.0 A is often a default; give --pixel-size A if it is one",
            stacklevel=3,
        )
    return sum(voxel) / len(voxel)


def _read(path: str | Path, with_data: bool) -> tuple[np.ndarray, MrcHeader]:
    path = existing_file(path)
    try:
        with path.open("rb") as plain:
            zipped = plain.read(2) == b"\x1f\x8b"  # by content: names lie too
            plain.seek(0)
            length = path.stat().st_size
            if not zipped:
                header = _parse(path, plain.read(1024))
                _check_length(path, header, length)
                return _data(path, plain, header, length, with_data), header
        with gzip.open(path, "rb") as file:
            header = _parse(path, file.read(1024))
            _check_length(path, header, length * _GZIP_RATIO, exact=False)
            unzipped = _stream_length(file, limit=header.nbytes + _MAX_PADDING + 1)
            _check_length(path, header, unzipped)
            return _data(path, file, header, unzipped, with_data), header
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadFileError(f"{path} is a damaged gzip file; copy or download it again") from error
    except OSError as error:
        raise CryobenchError(f"{path} cannot be read: {error.strerror or error}") from error
    except MemoryError as error:
        raise CryobenchError(f"{path} does not fit into memory; cut it into smaller stacks") from error


def _parse(path: Path, raw: bytes) -> MrcHeader:
    """The header, in the byte order that makes it the smaller file: stamps are often missing or wrong,
    while sizes below 65,536 read in the other order are above it."""
    if len(raw) < 1024:
        raise BadFileError(f"{path} is not an MRC file: {len(raw)} bytes are less than the header of 1024")
    found, other_modes = [], []
    for order in "<>":
        words = np.frombuffer(raw, order + "i4")
        mode = int(words[3])
        if words[:3].min() < 1 or words[23] < 0:
            continue
        if mode in _MODES:
            found.append(_header(words, np.frombuffer(raw, order + "f4"), raw))
        elif 0 < mode <= 101 and raw[208:211] == b"MAP":
            other_modes.append(mode)
    if found:
        return min(found, key=lambda header: header.nbytes)
    if other_modes:
        raise BadFileError(f"{path} has MRC mode {other_modes[0]}, which is not read; convert it to {_MODE_NAMES}")
    raise BadFileError(f"{path} is not an MRC file (its header has no sensible size and mode)")


def _header(words: np.ndarray, reals: np.ndarray, raw: bytes) -> MrcHeader:
    nx, ny, nz, mode = (int(w) for w in words[:4])
    dtype = np.dtype(_MODES[mode]).newbyteorder(words.dtype.byteorder)
    if mode == 0 and words[38] == _IMOD_STAMP and not words[39] & 1:
        dtype = np.dtype("u1")
    cell, intervals = reals[10:13].tolist(), words[7:10].tolist()
    voxel = tuple(c / m if m > 0 and math.isfinite(c) else 0.0 for c, m in zip(cell, intervals, strict=True))
    axes = tuple(words[16:19].tolist())
    return MrcHeader(
        shape=(nz, ny, nx),
        dtype=dtype,
        offset=1024 + int(words[23]),
        voxel=voxel,
        axes=axes if any(axes) else (1, 2, 3),  # files from before 2000 leave the order empty
        angles=tuple(reals[13:16].tolist()),
        ispg=int(words[22]),
        default_voxel=voxel[:2] == (1.0, 1.0) and not raw[224:].startswith(_LABEL),
    )


def _check_length(path: Path, header: MrcHeader, length: int, exact: bool = True) -> None:
    """Refuses a file of ``length`` bytes that is shorter, or much longer, than its header says."""
    says = "x".join(str(n) for n in header.shape) + f" {header.dtype.name}, {header.nbytes:,} bytes"
    if length < header.nbytes:
        has = f"the file has {length:,}" if exact else "the file is far too short for that"
        raise BadFileError(f"{path} is truncated or its header lies: it says {says}; {has}; copy or download it again")
    if exact and length > header.nbytes + _MAX_PADDING:
        raise BadFileError(
            f"{path} is longer than its header says ({says}), so the header is wrong; "
            "write the file again with the program it comes from"
        )


def _stream_length(file: Any, limit: int) -> int:
    """Bytes in an unzipped stream, counted up to ``limit`` without keeping them; rewinds."""
    length = 1024
    while length < limit and (chunk := file.read(min(1 << 20, limit - length))):
        length += len(chunk)
    file.seek(0)
    return length


def _data(path: Path, file: Any, header: MrcHeader, length: int, wanted: bool) -> np.ndarray:
    """The data behind the header as float32, once ``length`` is known to hold them."""
    if not wanted:
        return np.empty(0, np.float32)
    file.seek(header.offset)
    raw = np.empty(header.nbytes - header.offset, np.uint8)
    for start in range(0, raw.size, 1 << 24):  # in pieces: gzip makes a copy of each
        piece = raw[start : start + (1 << 24)].data
        if file.readinto(piece) != len(piece):
            raise BadFileError(f"{path} ended while it was read; wait until it is written completely")
    if any(file.read(length - header.nbytes)):
        raise BadFileError(f"{path} has other bytes behind the data than its header says; its header is wrong")
    return raw.view(header.dtype).reshape(header.shape).astype(np.float32, copy=False)


def write_mrc(path: str | Path, array: Any, pixel_size: float, stack: bool = True) -> None:
    """Writes float32 images (n, h, w) or (h, w) (``stack``), or a volume (z, y, x); atomically.

    pixel_size in angstrom. Stacks get space group 0 and one section per image, volumes space group 1.
    A name that ends in ``.gz`` is compressed. Raises CryobenchError for NaN, infinities, an empty or
    wrongly shaped array, a pixel size that is not positive, or a place that cannot be written; nothing
    is left there then.
    """
    data = np.ascontiguousarray(array, dtype="<f4")
    if data.ndim == 2:
        data = data[None]
    if data.ndim != 3 or data.size == 0:
        raise CryobenchError(f"{path}: an array of shape {data.shape} is neither images nor a volume")
    if not (math.isfinite(pixel_size) and pixel_size > 0):
        raise CryobenchError(f"{path}: the pixel size must be a positive number of angstrom, not {pixel_size}")
    low, high = float(data.min()), float(data.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise CryobenchError(f"{path} is not written: the array holds NaN or infinite values")
    mean = float(data.mean(dtype=np.float64))
    # section by section, so that double precision needs no second copy of the whole
    spread = math.sqrt(np.mean([np.mean((section.astype(np.float64) - mean) ** 2) for section in data]))

    nz, ny, nx = data.shape
    intervals = (nx, ny, 1 if stack else nz)
    words = np.zeros(256, "<i4")
    reals = words.view("<f4")
    words[:4] = nx, ny, nz, 2
    words[7:10] = intervals
    reals[10:13] = [pixel_size * m for m in intervals]
    reals[13:16] = 90.0
    words[16:19] = 1, 2, 3
    reals[19:22] = low, high, mean
    words[22] = 0 if stack else 1
    words[27] = 20141
    header = bytearray(words.tobytes())
    header[208:216] = b"MAP \x44\x44\x00\x00"
    header[216:220] = np.float32(spread).astype("<f4").tobytes()
    header[220:224] = np.int32(1).astype("<i4").tobytes()
    header[224:304] = _LABEL.ljust(80)
    with atomic_write(path) as file:
        if str(path).endswith(".gz"):
            with gzip.GzipFile(filename="", fileobj=file, mode="wb", compresslevel=6, mtime=0) as packed:
                packed.write(header)
                packed.write(data.data)
        else:
            file.write(header)
            file.write(data.data)
