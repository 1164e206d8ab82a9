"""Electron-scattering density of atoms on a grid: the volume whose projections a microscope would record."""

import math

import numpy as np
import torch
from torch import Tensor

from cryobench.errors import CryobenchError
from cryobench.specimens.atoms import B_RANGE, Atoms

VOLT_ANGSTROM_SQUARED = 47.878
"""h^2 / (2 pi m e) in V A^2: turns scattering factors in A, per A^3, into volts (Kirkland 2010, eq. C.12)."""
MARGIN = 3.0
"""Free space in angstrom between the particle and the edge of the box, for the width of an atom."""
OVERSAMPLING = 1.5
"""Fine grid on which atoms are laid down, in voxels per voxel."""
BLUR = 40.0
"""Extra B of atoms on the fine grid, in squared voxels of the result, taken out again in Fourier space.

An atom of this width aliases by exp(-3/16 * 40) = 6e-4 at Nyquist at OVERSAMPLING 1.5, and by less below.
"""


def default_pixel_size(atoms: Atoms, size: int) -> float:
    """Pixel size in angstrom at which the particle's diameter (about its mass centre) is 62 % of the box."""
    return 2 * (atoms.radius() + MARGIN) / (0.62 * size)


def atoms_to_density(atoms: Atoms, size: int, pixel_size: float, resolution: float | None = None) -> Tensor:
    """Electrostatic potential of atoms in vacuum, with their mass centre at voxel size//2.

    Each atom is the sum of five Gaussians of its electron scattering factor (Peng 1996, the C4322 table of
    the International Tables, as gemmi has it) spread by its B-factor, which is held within 10..200 A^2. The
    sum is laid on a finer grid by gemmi, then Fourier-cropped: the result is band-limited to the sphere
    |k| < Nyquist, without aliasing. No ice is displaced: the lowest frequencies are stronger than in ice.

    Args:
        atoms: the particle.
        size: voxels per side, odd or even.
        pixel_size: voxel size in angstrom.
        resolution: in angstrom; amplitudes are multiplied by the Gaussian exp(-resolution^2 k^2), which is
            1/e at k = 1/resolution and B = 4 resolution^2 (ChimeraX's molmap). Default 2 * pixel_size, the
            finest the grid holds; 0 leaves the atoms as sharp as their B-factors make them.

    Returns:
        (size, size, size) float32, axes (z, y, x), in volts; protein without hydrogens is about 6 V inside,
        the background near 0.

    Raises:
        CryobenchError: the particle does not fit in the box in every orientation, or a value makes no sense.
    """
    if not (size >= 4 and pixel_size > 0 and math.isfinite(pixel_size)):
        raise CryobenchError(f"no box of {size} voxels of {pixel_size} A; give size >= 4 and pixel size > 0")
    if resolution is None:
        resolution = 2 * pixel_size
    if not (resolution >= 0 and math.isfinite(resolution)):
        raise CryobenchError(f"resolution {resolution} A cannot be; give a number of angstrom, 0 for no blur")
    # the shorter side of an even box is size/2 - 1 voxels from the centre
    reach = ((size - 1) // 2) * pixel_size
    needed = atoms.radius() + MARGIN
    if needed > reach:
        larger, wider = 2 * math.ceil(needed / pixel_size) + 2, needed / ((size - 1) // 2)
        raise CryobenchError(
            f"a particle {2 * atoms.radius():.0f} A across does not fit {size} voxels of {pixel_size:g} A; "
            f"use size {larger} or a pixel size of {math.ceil(100 * wider) / 100:.2f} A"
        )
    fine = _lay_down(atoms, size, pixel_size)
    return _crop(fine, size, pixel_size, resolution)


def _lay_down(atoms: Atoms, size: int, pixel_size: float) -> np.ndarray:
    """Density, widened by BLUR, on the fine grid (x, y, z) of the same box; the centre as in the result."""
    import gemmi

    positions = atoms.positions - atoms.centre() + (size // 2) * pixel_size
    b_iso = np.clip(atoms.b_iso, *B_RANGE)
    fine = _even_fft_size(math.ceil(OVERSAMPLING * size))
    calculator = gemmi.DensityCalculatorE()
    calculator.blur = BLUR * pixel_size**2
    side = size * pixel_size
    calculator.grid.set_unit_cell(gemmi.UnitCell(side, side, side, 90, 90, 90))
    calculator.grid.set_size(fine, fine, fine)
    elements = {e: gemmi.Element(e) for e in set(atoms.elements)}
    atom = gemmi.Atom()
    for position, element, b, occ in zip(positions, atoms.elements, b_iso, atoms.occupancy, strict=True):
        atom.pos = gemmi.Position(*position)
        atom.element = elements[element]
        atom.b_iso = b
        atom.occ = occ
        calculator.add_atom_density_to_grid(atom)
    return calculator.grid.array


def _crop(fine: np.ndarray, size: int, pixel_size: float, resolution: float) -> Tensor:
    """Fourier-crop to the wanted grid, take BLUR out and the resolution in."""
    n = fine.shape[0]
    spectrum = torch.fft.rfftn(torch.from_numpy(fine).permute(2, 1, 0).contiguous())
    index = torch.fft.fftfreq(size, 1 / size).round().long()
    half = index[: size // 2 + 1].abs()
    spectrum = spectrum[index % n][:, index % n][:, :, half]
    k2 = (index[:, None, None] ** 2 + index[None, :, None] ** 2 + half**2) / (size * pixel_size) ** 2
    gain = torch.exp((BLUR * pixel_size**2 / 4 - resolution**2) * k2)
    # Nyquist itself is left out: on an even grid it holds the real part only
    gain[k2 >= (0.5 / pixel_size) ** 2] = 0
    volume = torch.fft.irfftn(spectrum * gain, s=(size, size, size)) * (size / n) ** 3
    return (VOLT_ANGSTROM_SQUARED * volume).to(torch.float32)


def _even_fft_size(n: int) -> int:
    """Smallest even number from n on whose only factors are 2, 3 and 5."""
    n += n % 2
    while True:
        rest = n
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return n
        n += 2
