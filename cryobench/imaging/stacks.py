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
from cryobench.imaging.ctf import ContrastTransfer, Optics
from cryobench.imaging.particles import Particles, Simulation
from cryobench.imaging.rotations import matrix_to_euler
from cryobench.specimens.mrc import read_header, read_mrc, write_mrc
from cryobench.specimens.particle_star import ParticleTable, read_particles, write_particles


def read_images(
    path: str | Path, pixel_size: float | None = None, star: str | Path | None = None
) -> tuple[Tensor, float]:
    """Images (n, h, w) float32 of a stack or a micrograph, and the pixel size in angstrom.

    star: of the images; its pixel size counts where none is given and the stack has none of its own (or 1.0, which
    programs write that know none). Raises BadFileError for a broken file, CryobenchError for a map and where the pixel
    size is neither in it nor given.
    """
    header = read_header(path)
    if header.ispg == 1 and len(set(header.shape)) == 1 and ".mrcs" not in Path(path).suffixes:
        raise CryobenchError(
            f"{path} is a map (its ISPG is 1) of {header.shape[0]}^3 voxels: `simulate` makes images of it"
        )
    if pixel_size is None and star is not None:
        if header.default_voxel or min(header.voxel[:2]) <= 0:
            pixel_size = float(_rows_of(path, star).pixel_size[0])
    array, pixel = read_mrc(path, pixel_size)
    return torch.from_numpy(array), pixel


def read_ctf(
    star: str | Path, stack: str | Path, images: Tensor, pixel_size: float, given: float | None = None
) -> ContrastTransfer:
    """The CTF of the images (n, size, size) of a stack, in its order, from a STAR file.

    Rows belong to the images that rlnImageName numbers. Where the file names several stacks, those of the stack's
    name count; a single stack may have another name by now. pixel_size: of the images, angstrom; given: replaces that
    of the STAR file. Raises CryobenchError unless each image has one row, all share optics and pixel size, and the
    images are square; also as :func:`contrast_transfers` and ``read_particles`` do.
    """
    n, height, width = images.shape
    if height != width:
        raise CryobenchError(f"{stack} has images of {width} x {height} pixels: for a CTF they must be square")
    table = _rows_of(stack, star, given)
    order = np.argsort(table.indices)
    if not np.array_equal(table.indices[order], np.arange(n)):
        raise CryobenchError(
            f"{star} must have one row for each image of {stack}, 1 to {n}; it has {len(table)} rows for "
            f"{len(set(table.indices.tolist()) & set(range(n)))} of these"
        )
    table = table.select(order)
    if (np.abs(table.pixel_size / pixel_size - 1) > 1e-3).any():
        raise CryobenchError(
            f"{star} has {table.pixel_size[0]:g} A pixels, {stack} {pixel_size:g} A: say which with --pixel-size"
        )
    groups = contrast_transfers(table, star)
    if len(groups) > 1:
        raise CryobenchError(f"{star} has {len(groups)} sets of optics for {stack}: split it into one stack for each")
    return groups[0][1]


def _rows_of(stack: str | Path, star: str | Path, pixel_size: float | None = None) -> ParticleTable:
    """The rows of a STAR file that belong to a stack."""
    table = read_particles(star, pixel_size)
    if len(set(table.stacks)) > 1:
        table = table.select(np.array([Path(name).name == Path(stack).name for name in table.stacks]))
    if not len(table):
        raise CryobenchError(f"{star} names several stacks, and none is {Path(stack).name}")
    return table


def contrast_transfers(table: ParticleTable, star: str | Path) -> list[tuple[Tensor, ContrastTransfer]]:
    """Which particles (indices), and their CTF, for each set of optics in the table of a STAR file.

    Raises CryobenchError where defocus or optics are missing and for phase plates.
    """
    if table.defocus is None:
        raise CryobenchError(f"{star} has no defocus (rlnDefocusU, rlnDefocusV, rlnDefocusAngle): estimate it first")
    columns = [c for c in (table.voltage, table.cs, table.amplitude_contrast) if c is not None]
    if len(columns) < 3:
        raise CryobenchError(f"{star} has defocus but not rlnVoltage, rlnSphericalAberration and rlnAmplitudeContrast")
    if table.phase_shift is not None and np.any(table.phase_shift):
        raise CryobenchError(f"{star} has phase shifts (a phase plate): only reconstruct --engine relion knows these")
    defocus = torch.from_numpy(table.defocus).float()
    # some programs write U < V, the same ellipse a quarter turn on; the CTF wants U, its long axis, first
    u, v, angle = defocus.unbind(1)
    defocus = torch.where((u < v)[:, None], torch.stack([v, u, angle + 90], 1), defocus)
    optics, group = np.unique(np.column_stack(columns), axis=0, return_inverse=True)
    found = []
    for i, (voltage, cs, contrast) in enumerate(optics.tolist()):
        members = torch.from_numpy(np.flatnonzero(group.reshape(-1) == i))
        shared = Optics(voltage, cs, contrast, float(table.pixel_size[0]))
        found.append((members, ContrastTransfer(shared, defocus[members])))
    return found


def clean_name(stack: Path) -> Path:
    """Where the clean images of a stack are: STACK_clean.mrcs in the same folder."""
    return stack.with_name(f"{stack.stem}_clean{stack.suffix}")


def clean_beside(stack: Path) -> Path:
    """The clean images of a stack (:func:`clean_name`). Raises CryobenchError if missing."""
    path = clean_name(stack)
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
    clean = clean_name(output)
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
