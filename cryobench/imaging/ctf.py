"""The contrast transfer function of the microscope, with RELION's sign and units.

``CTF(k) = sin(pi lambda dz k^2 - pi/2 Cs lambda^3 k^4 + asin(Q0)) * exp(-B k^2 / 4)``

with the defocus dz = U cos^2(t - t0) + V sin^2(t - t0) at the direction t of k = (kx, ky), counted from x
towards y; positive dz is underfocus. At low frequency it is +Q0: particles stay bright on dark. (Rohou &
Grigorieff 2015, J. Struct. Biol. 192:216, equations 2-5, with the sign turned for bright particles.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cryobench.errors import CryobenchError


@dataclass(frozen=True)
class Optics:
    """What all images of a data set share: kV, mm, a fraction (RELION's Q0), angstrom per pixel."""

    voltage_kv: float = 300.0
    cs_mm: float = 2.7
    amplitude_contrast: float = 0.1
    pixel_size: float = 1.0

    def __post_init__(self) -> None:
        if not (self.voltage_kv > 0 and self.cs_mm >= 0 and self.pixel_size > 0):
            raise CryobenchError(f"impossible optics (voltage and pixel size above 0, Cs not negative): {self}")
        if not 0 <= self.amplitude_contrast < 1:
            raise CryobenchError(f"amplitude contrast must be in [0, 1), not {self.amplitude_contrast}")

    @property
    def wavelength(self) -> float:
        """Of the electrons, relativistic (de Broglie), in angstrom."""
        volts = self.voltage_kv * 1e3
        return 12.26426 / math.sqrt(volts * (1 + 0.978466e-6 * volts))


@dataclass(frozen=True)
class ContrastTransfer:
    """The CTF of each image of a stack: shared optics, defocus (n, 3) as U, V in angstrom and angle in degrees,
    and a B-factor in square angstrom."""

    optics: Optics
    defocus: Tensor
    bfactor: float = 0.0

    def __len__(self) -> int:
        return len(self.defocus)

    def __getitem__(self, part: slice | Tensor) -> ContrastTransfer:
        return replace(self, defocus=self.defocus[part])

    def images(self, size: int, device: torch.device | str = "cpu") -> Tensor:
        """CTF images (n, size, size // 2 + 1), float32, in the layout of ``torch.fft.rfft2``."""
        u, v, angle = self.defocus.to(device).unbind(1)
        return ctf_2d(u, v, angle, self.optics, size, self.bfactor).float()


def ctf_2d(
    defocus_u: Tensor, defocus_v: Tensor, angle: Tensor, optics: Optics, size: int, bfactor: float = 0.0
) -> Tensor:
    """CTF images (n, size, size // 2 + 1), float32, in the layout of ``torch.fft.rfft2``.

    defocus_u, defocus_v: (n,) angstrom, the largest and smallest defocus; angle: (n,) degrees from the x axis
    towards y to the direction of defocus_u; bfactor: square angstrom.
    """
    from torch_ctf import calculate_ctf_2d

    if not defocus_u.shape == defocus_v.shape == angle.shape or defocus_u.ndim != 1:
        raise CryobenchError("defocus_u, defocus_v and angle must be vectors of one length")
    device = defocus_u.device
    # torch-ctf takes micrometres, and has the same sign and angle
    ctf = calculate_ctf_2d(
        defocus=(defocus_u + defocus_v) / 2e4,
        astigmatism=(defocus_u - defocus_v) / 2e4,
        astigmatism_angle=angle,
        voltage=optics.voltage_kv,
        spherical_aberration=optics.cs_mm,
        amplitude_contrast=optics.amplitude_contrast,
        phase_shift=0.0,
        pixel_size=optics.pixel_size,
        image_shape=(size, size),
        rfft=True,
        fftshift=False,
    )
    return ctf * bfactor_2d(bfactor, optics.pixel_size, size, device) if bfactor else ctf


def ctf_1d(defocus: Tensor, frequencies: Tensor, optics: Optics, bfactor: float = 0.0) -> Tensor:
    """CTF without astigmatism at radial frequencies: (..., m), float64.

    defocus: (...), angstrom; frequencies: (m,) in cycles per pixel; bfactor: square angstrom.
    """
    k2 = (frequencies.double() / optics.pixel_size) ** 2
    phase = math.pi * optics.wavelength * k2 * defocus.double()[..., None]
    phase = phase - math.pi / 2 * optics.cs_mm * 1e7 * optics.wavelength**3 * k2**2
    return torch.sin(phase + math.asin(optics.amplitude_contrast)) * torch.exp(-bfactor / 4 * k2)


def bfactor_2d(bfactor: float, pixel_size: float, size: int, device: torch.device | str = "cpu") -> Tensor:
    """exp(-B k^2 / 4), (size, size // 2 + 1), in the layout of rfft2; bfactor in square angstrom."""
    ky = torch.fft.fftfreq(size, pixel_size, device=device)[:, None]
    kx = torch.fft.rfftfreq(size, pixel_size, device=device)[None, :]
    return torch.exp(-bfactor / 4 * (kx**2 + ky**2))


def random_defocus(
    n: int,
    generator: torch.Generator | None = None,
    low: float = 10000.0,
    high: float = 25000.0,
    astigmatism: float = 200.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """defocus_u, defocus_v (angstrom) and angle (degrees) of n images, each (n,), float32, on the CPU.

    The mean defocus is uniform in [low, high]; U - V is uniform in [0, 2 astigmatism]; the angle in [0, 180).
    """
    if not 0 <= low <= high:
        raise CryobenchError(f"the defocus range must be 0 <= low <= high, not {low} to {high}")
    mean, half, angle = torch.rand(3, n, generator=generator)
    mean = low + (high - low) * mean
    half = astigmatism * half
    return mean + half, mean - half, 180 * angle
