"""What em3d found besides its images: the map and its halves, the poses as a STAR file, and a summary to read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cryobench.errors import CryobenchError
from cryobench.imaging.ctf import ContrastTransfer, Optics
from cryobench.imaging.rings import resolution
from cryobench.imaging.rotations import matrix_to_euler
from cryobench.outputs import refuse_clashes
from cryobench.specimens.mrc import write_mrc
from cryobench.specimens.particle_star import ParticleTable, write_particles

#: halves that agree in fewer rings than this share no structure. Nor do those whose first volumes, made before they
#: shared anything, correlate less than this: of pure noise they reach 0.5; of particles at SNR 0.01 still 0.93. (What
#: the halves agree on later is no proof: at low frequencies their references are one.)
FEW_RINGS, CHANCE = 4, 0.6


def check_outputs(
    method: str,
    weights: str | None,
    train_on: Iterable[str],
    volume: Path | None,
    star: Path | None,
    output: Path,
    inputs: Iterable[str | None],
) -> None:
    """Raises CryobenchError where a map (``volume``) or a STAR file is asked of what cannot give it, or in the place of
    another output or an input."""
    wanted = [option for option, path in (("--map", volume), ("--star", star)) if path is not None]
    if wanted and method != "em3d":
        raise CryobenchError(f"{wanted[0]} is for em3d, which makes a map of the images: {method} makes none")
    if star is not None and (weights or train_on):
        why = "--weights" if weights else "--train-on"
        raise CryobenchError(f"--star needs a fit to these images, and with {why} there is none: drop one of both")
    mine = [output, *([] if volume is None else map_paths(volume)), *([] if star is None else [star])]
    refuse_clashes(mine, inputs)


def map_paths(volume: Path) -> list[Path]:
    """OUT.mrc, OUT_half1.mrc and OUT_half2.mrc."""
    return [volume, *(volume.with_name(f"{volume.stem}_half{i}{volume.suffix}") for i in (1, 2))]


def write_maps(volume: Path, state: Mapping[str, Tensor], pixel_size: float) -> list[Path]:
    """Write the map of a fit's state and its halves, (d, d, d) with voxels of ``pixel_size`` angstrom."""
    paths = map_paths(volume)
    for path, name in zip(paths, ("volume", "half1", "half2"), strict=True):
        write_mrc(path, state[name].cpu().numpy(), pixel_size, stack=False)
    return paths


def write_poses(
    star: Path,
    stack: str,
    rotations: Tensor,
    shifts: Tensor,
    subset: Tensor,
    size: int,
    pixel_size: float,
    ctf: ContrastTransfer | None = None,
) -> None:
    """Write the images of a stack, named as ``stack``, with rotations (n, 3, 3), shifts (n, 2) in pixels by which the
    particles are off-centre, the half (n,), 1 or 2, and optics and defocus of the CTF."""
    n = len(rotations)
    # without optics RELION 3.1 reads no file; where nothing corrects a CTF, any will do
    optics = Optics() if ctf is None else ctf.optics
    table = ParticleTable(
        [stack] * n,
        np.arange(n),
        np.full(n, pixel_size),
        angles=matrix_to_euler(rotations.cpu()).numpy(),
        # RELION's origin is the move that brings the particle back to the centre
        shifts=-shifts.cpu().numpy() * pixel_size,
        image_size=np.full(n, size),
        voltage=np.full(n, optics.voltage_kv),
        cs=np.full(n, optics.cs_mm),
        amplitude_contrast=np.full(n, optics.amplitude_contrast),
        defocus=None if ctf is None else ctf.defocus.cpu().numpy(),
        subset=subset.cpu().numpy(),
    )
    write_particles(star, table)


def summary(info: Mapping[str, Any]) -> list[str]:
    """Lines on a fit's facts: resolution of the halves, what the images are; and a warning where there is no map."""
    curve, classes = torch.tensor(info["fsc"]), info["classes"]
    reached = resolution(curve, info["pixel_size"], (info["size"],) * 3, 0.143)
    kinds = f"images: {classes['view']:.0%} views, {classes['junk']:.0%} junk, {classes['empty']:.0%} empty"
    kinds = kinds.replace("%", " %")
    if info["reach"] >= FEW_RINGS and info["start_correlation"] >= CHANCE:
        return [f"em3d: the halves agree to {reached:.2f} A (FSC 0.143); {kinds}"]
    return [
        f"em3d: the halves agree no better than chance would have it; {kinds}",
        "em3d: warning: the two halves do not agree: there may be no common structure in these images; the output is "
        "shrunk to (nearly) nothing",
    ]
