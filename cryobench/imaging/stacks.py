"""Image stacks on disk: what ``simulate`` writes and what the other commands read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cryobench.errors import CryobenchError
from cryobench.imaging.particles import Particles, Simulation
from cryobench.imaging.rotations import matrix_to_euler
from cryobench.specimens.mrc import read_mrc, write_mrc
from cryobench.specimens.particle_star import ParticleTable, write_particles


def read_images(path: str | Path, pixel_size: float | None = None) -> tuple[Tensor, float]:
    """Images (n, h, w) float32 of a stack or a micrograph, and the pixel size in angstrom.

    Raises BadFileError for a broken file, CryobenchError where the pixel size is neither in it nor given.
    """
    array, pixel = read_mrc(path, pixel_size)
    return torch.from_numpy(array), pixel


def clean_beside(stack: Path) -> Path:
    """The clean images of a stack: STACK_clean.mrcs in the same folder. Raises CryobenchError if missing."""
    path = stack.with_name(f"{stack.stem}_clean{stack.suffix}")
    if not path.is_file():
        raise CryobenchError(f"{stack}: this method learns from clean images, and there is no {path} beside it")
    return path


def write_particles_set(
    output: Path, particles: Particles, simulation: Simulation, origin: dict[str, Any]
) -> list[Path]:
    """Write OUT.mrcs (noisy), OUT_clean.mrcs, a STAR file for each, and OUT.json with scale, sigma and settings.

    The STAR files name the stacks as ``output`` does, from the folder where the command ran, as RELION does.
    shifts go in with RELION's sign. If anything fails, what was there before stays.
    """
    clean = output.with_name(f"{output.stem}_clean{output.suffix}")
    paths = [output, clean, output.with_suffix(".star"), clean.with_suffix(".star"), output.with_suffix(".json")]
    parts = {path: path.with_name(f".{os.getpid()}-{path.name}") for path in paths}
    try:
        write_mrc(parts[output], particles.noisy.numpy(), simulation.pixel_size, stack=True)
        write_mrc(parts[clean], particles.clean.numpy(), simulation.pixel_size, stack=True)
        for stack in (output, clean):
            write_particles(parts[stack.with_suffix(".star")], particle_table(str(stack), particles, simulation))
        facts = {
            **origin,
            "n": len(particles),
            "simulation": vars(simulation),
            "sigma": particles.sigma,
            "clean = scale * projection + offset": {"scale": particles.scale, "offset": particles.offset},
        }
        parts[paths[-1]].write_text(json.dumps(facts, indent=1))
        for path, part in parts.items():
            part.replace(path)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
    return paths


def particle_table(stack: str, particles: Particles, simulation: Simulation) -> ParticleTable:
    """The poses, shifts and CTF of simulated particles as a table for a STAR file."""
    n = len(particles)
    return ParticleTable(
        [stack] * n,
        np.arange(n),
        np.full(n, simulation.pixel_size),
        angles=matrix_to_euler(particles.rotations).numpy(),
        # RELION's origin is the move that brings the particle back to the centre
        shifts=-particles.shifts.numpy() * simulation.pixel_size,
        image_size=np.full(n, simulation.size),
        voltage=np.full(n, simulation.voltage_kv),
        cs=np.full(n, simulation.cs_mm),
        amplitude_contrast=np.full(n, simulation.amplitude_contrast),
        defocus=None if particles.defocus is None else particles.defocus.numpy(),
        subset=1 + np.arange(n) % 2,
    )
