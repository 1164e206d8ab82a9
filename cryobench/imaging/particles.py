"""Simulated particle images: orientations, projection, CTF, one affine scale per data set, noise.

The order is that of the microscope: project, shift, contrast, CTF, then noise. The clean images (after the
CTF) of one data set share one affine scale that brings their range to [0, 1]; noise is added unclipped.
SNR = var(clean) / var(noise) over all pixels of the stack.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from cryobench.errors import CryobenchError
from cryobench.imaging.ctf import ContrastTransfer, Optics, bfactor_2d, random_defocus
from cryobench.imaging.noise import add_noise, vary_contrast
from cryobench.imaging.projection import Projector
from cryobench.imaging.rotations import random_rotations


@dataclass(frozen=True)
class Simulation:
    """How images are made; plain data, so that it can be hashed and written into a record.

    size in pixels; pixel_size in angstrom; snr as defined above; noise one of "white", "coloured",
    "poisson"; defocus in angstrom (drawn uniformly, with astigmatism up to the value given); shift in
    pixels (uniform in +-shift); contrast: standard deviation of each particle's gain around 1; bfactor in
    angstrom^2.
    """

    size: int
    pixel_size: float
    snr: float = 0.1
    noise: str = "white"
    ctf: bool = False
    defocus: tuple[float, float] = (10_000.0, 25_000.0)
    astigmatism: float = 500.0
    voltage_kv: float = 300.0
    cs_mm: float = 2.7
    amplitude_contrast: float = 0.1
    shift: float = 0.0
    contrast: float = 0.0
    bfactor: float = 0.0

    def __post_init__(self) -> None:
        if self.size < 8:
            raise CryobenchError(f"images of {self.size} pixels are too small: ask for at least 8 (--size)")
        if not self.snr > 0 or not self.pixel_size > 0:
            raise CryobenchError("the SNR and the pixel size must be positive (--snr, --pixel-size)")

    @property
    def optics(self) -> Optics:
        return Optics(self.voltage_kv, self.cs_mm, self.amplitude_contrast, self.pixel_size)


@dataclass(frozen=True)
class Particles:
    """A simulated stack. Images (n, size, size); rotations (n, 3, 3); shifts (n, 2) in pixels, x then y;
    defocus (n, 3): U and V in angstrom, angle in degrees, or None without CTF."""

    clean: Tensor
    noisy: Tensor
    rotations: Tensor
    shifts: Tensor
    defocus: Tensor | None
    sigma: float
    scale: float
    offset: float

    def __len__(self) -> int:
        return len(self.clean)

    def split(self, n_train: int) -> tuple[Particles, Particles]:
        """The first n_train particles and the rest, on the same scale and with the same noise level."""
        return self._part(slice(None, n_train)), self._part(slice(n_train, None))

    def _part(self, part: slice) -> Particles:
        defocus = None if self.defocus is None else self.defocus[part]
        return Particles(
            self.clean[part],
            self.noisy[part],
            self.rotations[part],
            self.shifts[part],
            defocus,
            self.sigma,
            self.scale,
            self.offset,
        )


def stream_seed(*names: object) -> int:
    """A 63-bit seed from plain names, so that each use of randomness has its own stream."""
    digest = hashlib.sha256(repr(names).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class Simulator:
    """Makes images of one volume (size, size, size), bright density, as a :class:`Simulation` says.

    symmetry: point group of the volume as far as it is known; nothing is made symmetric by it.
    """

    def __init__(
        self, volume: Tensor, simulation: Simulation, device: str | torch.device = "cpu", symmetry: str = "C1"
    ) -> None:
        if volume.shape != (simulation.size,) * 3:
            raise CryobenchError(f"the volume is {tuple(volume.shape)}, the images are to be {simulation.size} px")
        self.simulation = simulation
        self.device = torch.device(device)
        self.volume, self.symmetry = volume, symmetry
        self.projector = Projector(volume.to(self.device))

    def draw(self, n: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """n noise-free images in the volume's units, with rotations, shifts and defocus; same seed, same images."""
        sim = self.simulation
        generator = torch.Generator().manual_seed(seed)
        rotations = random_rotations(n, generator)
        shifts = (torch.rand(n, 2, generator=generator) * 2 - 1) * sim.shift
        drawn = random_defocus(n, generator, *sim.defocus, sim.astigmatism) if sim.ctf else None
        defocus = None if drawn is None else torch.stack(drawn, dim=1)
        images = self.projector.project(
            rotations, shifts.to(self.device) if sim.shift else None, self._filters(defocus)
        )
        if sim.contrast:
            images = vary_contrast(images, sim.contrast, generator)
        return images, rotations, shifts, defocus

    def contrast_transfer(self, defocus: Tensor | None) -> ContrastTransfer | None:
        """The CTF of images with this defocus (n, 3); None where the simulation has none."""
        return None if defocus is None else ContrastTransfer(self.simulation.optics, defocus, self.simulation.bfactor)

    def _filters(self, defocus: Tensor | None) -> Tensor | None:
        """CTF (n, size, size // 2 + 1), or the B-factor alone, or nothing."""
        sim, ctf = self.simulation, self.contrast_transfer(defocus)
        if ctf is not None:
            return ctf.images(sim.size, self.device)
        return bfactor_2d(sim.bfactor, sim.pixel_size, sim.size, self.device)[None] if sim.bfactor else None

    def simulate(self, n: int, seed: int) -> Particles:
        """A data set of n particles: range of the clean images [0, 1], noise at the wanted SNR."""
        images, rotations, shifts, defocus = self.draw(n, stream_seed(seed, "poses"))
        low, high = float(images.min()), float(images.max())
        if not high > low:
            raise CryobenchError("the structure projects to nothing: is the map empty?")
        clean = (images - low) / (high - low)
        noisy, sigma = self.noisy(clean, stream_seed(seed, "noise"))
        return Particles(
            clean.cpu(), noisy.cpu(), rotations, shifts, defocus, sigma, 1 / (high - low), -low / (high - low)
        )

    def noisy(
        self, clean: Tensor, seed: int, sigma: float | None = None, device: str | torch.device = "cpu"
    ) -> tuple[Tensor, float]:
        """Another exposure of clean images; sigma fixes the noise level instead of the stack's own SNR.

        device: where the noise is drawn; a seed gives other noise on another kind of device.
        """
        generator = torch.Generator(device).manual_seed(seed)
        return add_noise(clean, self.simulation.snr, self.simulation.noise, generator, sigma)
