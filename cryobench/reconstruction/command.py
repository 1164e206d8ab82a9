"""What ``cryobench reconstruct`` and ``cryobench fsc`` do: from files to files."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cryobench.errors import CryobenchError
from cryobench.imaging.rotations import euler_to_matrix
from cryobench.imaging.stacks import contrast_transfers
from cryobench.outputs import refuse_clashes
from cryobench.reconstruction.fourier import reconstruct_halves
from cryobench.reconstruction.fsc import fsc_report
from cryobench.specimens.maps import read_map
from cryobench.specimens.mrc import read_header, write_mrc
from cryobench.specimens.particle_star import (
    ParticleTable,
    find_stack,
    read_particle_images,
    read_particles,
    write_particles,
)


def reconstruct_star(
    star: Path,
    output: Path,
    engine: str = "fourier",
    symmetry: str = "C1",
    pixel_size: float | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Path]:
    """The map of the particles in a STAR file at OUTPUT, and half maps at OUTPUT_half1, OUTPUT_half2.

    Poses are taken as they are; the CTF is corrected where the file has a defocus. The halves are those of
    rlnRandomSubset, else every second particle. engine: "fourier" (ours; the mean along the images' borders counts as
    background) or "relion" (relion_reconstruct).
    ``say`` announces what is missing or contradicts itself. Raises CryobenchError where poses or optics are missing,
    pixel sizes differ, RELION cannot be run, or an output would replace a stack.
    """
    table = read_particles(star, pixel_size)
    if table.angles is None:
        raise CryobenchError(
            f"{star} has no poses (rlnAngleRot, rlnAngleTilt, rlnAnglePsi): refine the particles first"
        )
    if np.ptp(table.pixel_size) > 1e-3 * table.pixel_size.min():
        raise CryobenchError(f"{star} mixes pixel sizes: bring the images to one first")
    if table.subset is None:
        table = dataclasses.replace(table, subset=np.arange(len(table)) % 2 + 1)
    stacks = [find_stack(name, star) for name in dict.fromkeys(table.stacks)]
    for stack in stacks if pixel_size is None else []:
        header, own = read_header(stack), float(table.pixel_size[0])
        stated = 0.0 if header.default_voxel else header.voxel[0]
        if stated > 0 and abs(stated / own - 1) > 1e-2:
            say(f"{stack} says {stated:g} A pixels, {star} {own:g} A, which is taken (--pixel-size says otherwise)")
    if table.defocus is None:
        say(f"{star} has no defocus: no CTF is corrected")
    paths = [output, *(output.with_name(f"{output.stem}_half{i}{output.suffix}") for i in (1, 2))]
    refuse_clashes(paths, [star, *stacks])
    pixel = float(table.pixel_size[0])
    maps = (_with_relion if engine == "relion" else _with_fourier)(table, star, symmetry)
    for path, volume in zip(paths, maps, strict=True):
        write_mrc(path, volume.numpy(), pixel, stack=False)
    return paths


def fsc_of_maps(
    a: str | Path, b: str | Path, mask: str | Path | None = None, pixel_size: float | None = None
) -> dict[str, Any]:
    """:func:`fsc_report` of two map files. Raises CryobenchError for stacks, unequal boxes or pixel sizes."""
    for path in (a, b, mask):
        if path is not None:
            refuse_images(path)
    first, pixel = read_map(a, pixel_size)
    others = [(path, *read_map(path, pixel_size)) for path in (b, mask) if path is not None]
    for path, volume, other_pixel in others:
        if volume.shape != first.shape or abs(other_pixel - pixel) > 1e-3 * pixel:
            raise CryobenchError(
                f"{path} is {volume.shape[0]} voxels of {other_pixel:.4g} A, {a} is {first.shape[0]} of {pixel:.4g} A: "
                "maps to compare must share their grid"
            )
    return fsc_report(first, others[0][1], pixel, others[1][1] if mask is not None else None)


def refuse_images(path: str | Path) -> None:
    """Raises CryobenchError where an MRC file holds images, no map, by its name, header or shape: many stacks call
    themselves maps, and old maps stacks."""
    header = read_header(path)
    images, height, width = header.shape
    stack = header.ispg == 0 and height == width != images
    odd = 4 * images < min(height, width) or images > 4 * max(height, width)
    if stack or odd or ".mrcs" in Path(path).suffixes:
        held = "one image" if images == 1 else f"a stack of {images} images"
        raise CryobenchError(
            f"{path} is {held} of {width} x {height} pixels, not a map (in whose header ISPG is 1, should it be one)"
        )


def _with_fourier(table: ParticleTable, star: Path, symmetry: str) -> tuple[Tensor, Tensor, Tensor]:
    images = torch.from_numpy(read_particle_images(table, star))
    if images.shape[1] != images.shape[2]:
        raise CryobenchError(f"{star} has images of {images.shape[2]} x {images.shape[1]} pixels: they must be square")
    rotations = euler_to_matrix(torch.from_numpy(table.angles)).float()
    # RELION's origin is the move that centres the particle; ours is the one it has made
    shifts = None if table.shifts is None else -torch.from_numpy(table.shifts / table.pixel_size[:, None]).float()
    subsets = torch.from_numpy(np.asarray(table.subset))
    # a CTF lets little of the mean through: its correction would blow up the background, gridding spread it over shells
    border = torch.ones(images.shape[1:], dtype=torch.bool)
    border[1:-1, 1:-1] = False
    images -= images[:, border].mean()
    return reconstruct_halves(images, rotations, shifts, _ctf(table, star, images.shape[1]), symmetry, subsets)


def _ctf(table: ParticleTable, star: Path, size: int) -> Tensor | None:
    """CTF (n, size, size // 2 + 1) of the particles, None where the file has no defocus."""
    if table.defocus is None:
        return None
    images = torch.empty(len(table), size, size // 2 + 1)
    for members, ctf in contrast_transfers(table, star):
        images[members] = ctf.images(size)
    return images


def _with_relion(table: ParticleTable, star: Path, symmetry: str) -> tuple[Tensor, Tensor, Tensor]:
    program = shutil.which("relion_reconstruct")
    if program is None:
        raise CryobenchError("relion_reconstruct is not installed (Debian: apt install relion): use --engine fourier")
    with tempfile.TemporaryDirectory() as folder:
        stacks = [str(find_stack(name, star).resolve()) for name in table.stacks]
        write_particles(Path(folder) / "particles.star", dataclasses.replace(table, stacks=stacks))
        command = [program, "--i", "particles.star", "--sym", symmetry, "--pad", "2"]
        command += [] if table.defocus is None else ["--ctf"]
        maps = []
        for number in (-1, 1, 2):
            done = subprocess.run(
                [*command, "--o", "map.mrc", "--subset", str(number)], cwd=folder, capture_output=True, text=True
            )
            if done.returncode != 0:
                said = (done.stderr or done.stdout).strip().splitlines()
                raise CryobenchError(
                    f"relion_reconstruct failed on {star}: {said[-1] if said else 'without a message'}"
                )
            maps.append(read_map(Path(folder) / "map.mrc")[0])
        return maps[0], maps[1], maps[2]
