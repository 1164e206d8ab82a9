"""Density maps: read into (z, y, x) cubes, and brought to another pixel size without interpolation error."""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cryobench.errors import BadFileError, CryobenchError
from cryobench.specimens.mrc import choose_pixel_size, load


def read_map(path: str | Path, pixel_size: float | None = None) -> tuple[Tensor, float]:
    """A map as a float32 cube (z, y, x), bright = density in the file's own units, and its pixel size in A.

    The header's axis order is undone, and a box that is not a cube is padded to one with its background
    (the median over its faces). The middle of the box, voxel size // 2 along each axis, is the centre
    about which the structure is later turned: origin and start indices place a map among others, and
    are not used.

    Raises what :func:`cryobench.specimens.mrc.read_mrc` raises, and BadFileError for an impossible axis
    order or a cell without right angles.
    """
    array, header = load(path)
    if sorted(header.axes) != [1, 2, 3]:
        raise BadFileError(f"{path} has the impossible axis order {header.axes}; write the map again")
    if any(angle not in (0.0, 90.0) for angle in header.angles):
        raise BadFileError(f"{path} has a cell with angles {header.angles}; resample it on a right-angled grid")
    pixel = choose_pixel_size(path, header, header.voxel, pixel_size)
    stored = header.axes[::-1]  # the axis of the sections, rows, columns
    array = array.transpose([stored.index(axis) for axis in (3, 2, 1)])
    volume = torch.from_numpy(np.ascontiguousarray(array))
    return centred(volume, max(volume.shape)), pixel


def resample(volume: Tensor, pixel_size_in: float, size: int, pixel_size_out: float) -> Tensor:
    """The volume (z, y, x) on a cube of ``size`` voxels of ``pixel_size_out`` angstrom, float32.

    Fourier cropping or padding to any ratio of the pixel sizes: along each axis, the Fourier series of
    the input box is cut at the lower of the two Nyquist frequencies and evaluated at the new positions.
    That is exact for maps without power above it. The centre voxel size // 2 stays the centre, values
    stay on their scale (they are densities, not sums over a voxel), and what lies outside the input box
    is its background. Raises CryobenchError for sizes that are not positive.
    """
    if not (size >= 1 and all(math.isfinite(p) and p > 0 for p in (pixel_size_in, pixel_size_out))):
        raise CryobenchError(
            f"cannot resample to {size} voxels of {pixel_size_out} A from {pixel_size_in} A: sizes must be positive"
        )
    level = _background(volume)
    result = volume.float() - level
    for _ in range(3):  # each product takes the last axis and puts it first; after three all are back
        matrix = _fourier_series(result.shape[-1], size, pixel_size_out / pixel_size_in).to(result.device)
        result = torch.tensordot(matrix, result, dims=([1], [2]))
    return result + level


def centred(volume: Tensor, size: int) -> Tensor:
    """Crops or pads (with the background) each axis to ``size``, keeping voxel n // 2 in the middle."""
    result = volume.new_full((size,) * volume.ndim, _background(volume))
    source, target = [], []
    for n in volume.shape:
        shift = size // 2 - n // 2  # from an index in the input to one in the output
        source.append(slice(max(0, -shift), min(n, size - shift)))
        target.append(slice(max(0, shift), min(size, n + shift)))
    result[tuple(target)] = volume[tuple(source)]
    return result


def _background(volume: Tensor) -> float:
    """The median over the faces of the box."""
    faces = [volume.select(axis, side).flatten() for axis in range(volume.ndim) for side in (0, -1)]
    return float(torch.cat(faces).median())


def _fourier_series(n: int, size: int, step: float) -> Tensor:
    """Matrix (size, n), float32: values at n points -> values ``step`` points apart, about the centre.

    sum_k exp(2 pi i k (u_j - i) / n) / n over the frequencies |k| / n <= min(1, 1 / step) / 2, where u_j is
    the position of output j in input points. Those at the very edge count half with either sign, so
    that the result is real. Rows outside the input box are zero.
    """
    u = (torch.arange(size, dtype=torch.float64) - size // 2) * step + n // 2
    edge = n * min(1.0, 1.0 / step) / 2
    k = torch.arange(1, math.floor(edge + 1e-9) + 1, dtype=torch.float64)
    weight = torch.where(k > edge - 1e-9, 1.0, 2.0)
    # cos(a - b) = cos a cos b + sin a sin b makes the sum over k a matrix product
    a = 2 * torch.pi / n * u[:, None] * k
    b = 2 * torch.pi / n * torch.arange(n, dtype=torch.float64)[:, None] * k
    matrix = (1 + (a.cos() * weight) @ b.cos().T + (a.sin() * weight) @ b.sin().T) / n
    inside = (u > -0.5 - 1e-9) & (u < n - 0.5 + 1e-9)
    return (matrix * inside[:, None]).float()
