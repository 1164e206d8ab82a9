"""Projection of a volume by Fourier slices: the 2D transform of a projection is a central slice of the 3D one.

``image(x, y) = sum over z of V(R p)`` with p = (x, y, z) relative to the centre voxel (index size // 2), so
the image's transform at (kx, ky) is the volume's at R (kx, ky, 0); see :mod:`cryobench.imaging.rotations`.

The volume is padded, and its transform sampled only at the frequencies of the image itself, only inside the
Nyquist circle (frequencies above are zero), from the 2 x 2 x 2 nearest grid points. Plain trilinear weights
reproduce the transform's exp(-2 pi i k x) only for density at x = 0; what they miss elsewhere comes back as
ghosts that fold into the image: 2.4 % of it at padding 2 for a ball that fills 60 % of the box. Here they are
multiplied by ``1 + (2 pi u)^2 / 2 * f (1 - f)`` on each axis (f: the fractional position in the cell), which
makes them exact to second order for density at u cycles per cell. With u at the root mean square coordinate
of the volume itself the ghosts are less than half as strong, at the same cost. The volume is divided
beforehand by the transform of this kernel, as it is by sinc^2 in the plain case.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cryobench.errors import CryobenchError

#: samples of the transform handled at once: on a CPU the working set should stay in the cache, a GPU wants many
CHUNK = {"cpu": 2**16, "cuda": 2**22}


class Projector:
    """Projects one volume in many directions.

    volume: (d, d, d) indexed z, y, x; computed in its own precision, float32 unless it is float64.
    padding: how much finer than the image's the grid of the 3D transform is, at least 1. The relative error at
    random poses is 0.6 % with 2.6 for a ball that fills 60 % of the box or T20S across 80 % of it, 1.2 % with
    2. Looking along an axis of the grid all ghosts add up, the more so at whole-number paddings: 0.8 to 1 %
    with 2.6, 2 to 3 % with 2. Density outside the sphere inscribed in the box wraps around the image.
    device: where the table is kept and the images are made (default: the volume's).

    Memory: about 4 padding^3 d^3 bytes (float32) for the table, thrice that while it is built.
    Raises CryobenchError for a volume that is not cubic.
    """

    def __init__(self, volume: Tensor, padding: float = 2.6, device: torch.device | str | None = None) -> None:
        if volume.ndim != 3 or len(set(volume.shape)) != 1:
            raise CryobenchError(f"a volume must be cubic to be projected, not {tuple(volume.shape)}: pad it")
        if padding < 1:
            raise CryobenchError(f"padding must be at least 1, not {padding}")
        self.device = volume.device if device is None else torch.device(device)
        self.dtype = torch.float64 if volume.dtype == torch.float64 else torch.float32
        self.size = volume.shape[0]
        self._padded = 2 * round(padding * self.size / 2)
        volume = volume.to(self.device, self.dtype)
        self._bend = _bend(volume, self._padded)
        self._table = _padded_transform(volume, self._padded, self._bend)
        self._pixels, self._points = _half_plane(self.size, self.device)

    @torch.no_grad()
    def project(self, rotations: Tensor, shifts: Tensor | None = None, filters: Tensor | None = None) -> Tensor:
        """Images (n, d, d) of the volume seen through rotations (n, 3, 3).

        shifts: (n, 2) pixels (x, y) by which the content of each image moves (RELION's rlnOriginXAngst is
        minus this times the pixel size). filters: (n or 1, d, d // 2 + 1) real or complex, multiplied onto
        the transforms in the layout of ``torch.fft.rfft2`` (a CTF, say).
        Raises CryobenchError for matrices that are not rotations and for shapes that do not fit.
        """
        d, n = self.size, len(rotations)
        rotations = checked_rotations(rotations).to(self.device, self.dtype)
        if shifts is not None and shifts.shape != (n, 2):
            raise CryobenchError(f"shifts must have shape ({n}, 2), not {tuple(shifts.shape)}")
        if filters is not None and (filters.shape[1:] != (d, d // 2 + 1) or len(filters) not in (1, n)):
            raise CryobenchError(f"filters must be ({n} or 1, {d}, {d // 2 + 1}), not {tuple(filters.shape)}")
        images = torch.empty(n, d, d, dtype=self.dtype, device=self.device)
        step = max(1, CHUNK.get(self.device.type, 2**16) // len(self._pixels))
        for start in range(0, n, step):
            part = slice(start, start + step)
            slices = torch.zeros(len(rotations[part]), d * (d // 2 + 1), dtype=self._table.dtype, device=self.device)
            slices[:, self._pixels] = self.sample(rotations[part], self._points)
            slices = slices.view(-1, d, d // 2 + 1)
            if filters is not None:
                slices *= (filters if len(filters) == 1 else filters[part]).to(self.device)
            if shifts is not None:
                slices *= shift_phases(shifts[part].to(self.device, self.dtype), d)
            images[part] = torch.fft.irfft2(slices, s=(d, d))
        # the transform has its origin at pixel 0; the images have it at pixel d // 2
        return torch.fft.fftshift(images, dim=(-2, -1))

    def half_plane(self) -> tuple[Tensor, Tensor]:
        """Flat indices (m,) into rfft2's layout, and frequencies (2, m), kx and ky in cycles per image, of the
        coefficients that :meth:`project` computes: those inside the Nyquist circle."""
        return self._pixels, self._points

    def sample(self, rotations: Tensor, frequencies: Tensor) -> Tensor:
        """The images' transforms at frequencies (2, m), kx and ky in cycles per image: (n, m) complex, unchecked.

        The origin of the images is their centre pixel, here. Rotations (n, 3, 3) on the projector's device.
        All n are computed at once, in some hundred bytes a coefficient.
        """
        n, d, m = len(rotations), self.size, self._padded
        points = frequencies.to(self.dtype) * (m / d)
        position = (rotations[:, :, :2].transpose(0, 1).reshape(-1, 2) @ points).view(3, -1)  # x, y, z
        # only x >= 0 is stored: elsewhere take the conjugate of the opposite point
        sign = 1 - 2 * (position[0] < 0).to(self.dtype)
        position *= sign
        position[1:] += m // 2 + 1
        corner = position.floor()
        fraction = position.sub_(corner)
        weight = (1 + self._bend[:, None].to(self.dtype) * fraction * (1 - fraction)).prod(0)
        x, y, z = corner.to(torch.int32 if self._table.numel() < 2**31 else torch.int64)
        _, ny, nx = self._table.shape
        first = (z * ny + y) * nx + x
        steps = [(k * ny + j) * nx + i for k in (0, 1) for j in (0, 1) for i in (0, 1)]
        cells = first + torch.tensor(steps, dtype=first.dtype, device=self.device)[:, None]
        value = _gather(self._table, cells)
        along_x, along_y, along_z = fraction.to(value.dtype)
        value = torch.lerp(value[:4], value[4:], along_z)
        value = torch.lerp(value[:2], value[2:], along_y)
        value = torch.lerp(value[0], value[1], along_x)
        value = torch.view_as_complex(torch.view_as_real(value).mul_(torch.stack([weight, weight * sign], 1)))
        return value.view(n, -1)


def _gather(table: Tensor, cells: Tensor) -> Tensor:
    """Elements of a complex table by flat index."""
    flat = table.view(-1)
    if flat.dtype == torch.complex64:  # index_select is some times faster on a float64 of the same bytes
        flat = torch.view_as_real(flat).view(torch.float64).view(-1)
    return flat.index_select(0, cells.view(-1)).view(table.dtype).view(cells.shape)


def _bend(volume: Tensor, padded: int) -> Tensor:
    """Strength c of the weights 1 + c f (1 - f) along x, y, z (3,), from the extent of the volume."""
    energy = volume.double().square()
    offset2 = (torch.arange(len(volume), dtype=torch.float64, device=volume.device) - len(volume) // 2) ** 2
    along = torch.stack([energy.sum((0, 1)), energy.sum((0, 2)), energy.sum((1, 2))])
    mean_square = (along @ offset2) / along.sum(1).clamp(min=1e-300)
    return (2 * torch.pi / padded) ** 2 / 2 * mean_square


def _kernel_transform(u: Tensor, bend: Tensor) -> Tensor:
    """Transform of the interpolation kernel (1 - |t|)(1 + c |t| (1 - |t|)), |t| < 1, at u (m,) cycles per cell."""
    t = torch.linspace(0, 1, 1001, dtype=torch.float64, device=u.device)
    kernel = (1 - t) * (1 + bend * t * (1 - t))
    return torch.trapezoid(2 * kernel * torch.cos(2 * torch.pi * u[:, None] * t), t, dim=1)


def _padded_transform(volume: Tensor, padded: int, bend: Tensor) -> Tensor:
    """Transform, half space x >= 0, of the zero-padded volume divided by the kernel's transform.

    Shape (padded + 3, padded + 3, padded // 2 + 2): z and y run from -padded/2 - 1 to padded/2 + 1, x from 0
    to padded/2 + 1, so that a sample at Nyquist that rounding has pushed outwards still finds its neighbours.
    """
    offset = torch.arange(len(volume), dtype=torch.float64, device=volume.device) - len(volume) // 2
    k = torch.arange(-(padded // 2) - 1, padded // 2 + 2, dtype=torch.float64, device=volume.device)
    phase = -2 * torch.pi / padded * k[:, None] * offset
    # a matrix product per axis: most of the padding is zeros, so that this is no slower than an FFT
    x, y, z = (
        torch.polar((1 / _kernel_transform(offset / padded, c)).expand_as(phase), phase).to(
            torch.complex128 if volume.dtype == torch.float64 else torch.complex64
        )
        for c in bend
    )
    # far tails of a density are denormal numbers, which slow a CPU down twentyfold
    negligible = volume.abs() < volume.abs().max() * torch.finfo(volume.dtype).eps ** 2
    transform = y @ (volume.masked_fill(negligible, 0).to(x.dtype) @ x[padded // 2 + 1 :].T)
    return (z @ transform.flatten(1)).view(len(k), len(k), -1)


def _half_plane(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Flat indices (m,) and frequencies (2, m) as (kx, ky) of the rfft2 pixels inside the Nyquist circle."""
    ky = torch.fft.fftfreq(size, 1 / size, dtype=torch.float64, device=device)[:, None]
    kx = torch.arange(size // 2 + 1, dtype=torch.float64, device=device)[None, :]
    inside = (4 * (kx**2 + ky**2) <= size**2).nonzero()
    y, x = inside.unbind(1)
    return y * (size // 2 + 1) + x, torch.stack([kx[0, x], ky[y, 0]])


def shift_phases(shifts: Tensor, size: int) -> Tensor:
    """Factors (n, d, d // 2 + 1) that move the content of images by shifts (n, 2), pixels (x, y)."""
    ky = torch.fft.fftfreq(size, device=shifts.device, dtype=shifts.dtype)
    kx = torch.arange(size // 2 + 1, device=shifts.device, dtype=shifts.dtype) / size
    y = torch.exp(-2j * torch.pi * ky * shifts[:, 1:])
    x = torch.exp(-2j * torch.pi * kx * shifts[:, :1])
    return y[:, :, None] * x[:, None, :]


def checked_rotations(rotations: Tensor) -> Tensor:
    if rotations.ndim != 3 or rotations.shape[1:] != (3, 3):
        raise CryobenchError(f"rotations must have shape (n, 3, 3), not {tuple(rotations.shape)}")
    double = rotations.double()
    deviation = double @ double.transpose(1, 2) - torch.eye(3, dtype=torch.float64, device=rotations.device)
    if len(rotations) and not float(deviation.abs().max()) < 1e-3:
        raise CryobenchError("rotations must be orthonormal matrices: at least one is not")
    return rotations
