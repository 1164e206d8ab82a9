"""Particles in STAR files of RELION 3.0 (one block) and 3.1 or newer (data_optics and data_particles)."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cryobench.errors import BadFileError, CryobenchError
from cryobench.specimens.mrc import load
from cryobench.specimens.star import read_star, write_star


@dataclass(frozen=True)
class ParticleTable:
    """n particles; every array has length n, and what a file does not say is None.

    stacks: image files as written. indices: place in the stack, from 0. pixel_size: (n,) angstrom.
    angles: (n, 3) rot, tilt, psi in degrees. shifts: (n, 2) x, y in angstrom with RELION's sign: the move
    that brings the particle to the centre of its image. defocus: (n, 3) U, V in angstrom and angle in
    degrees. phase_shift: degrees. voltage: kV. cs: mm. image_size: pixels. subset: half set, 1 or 2.
    """

    stacks: list[str]
    indices: np.ndarray
    pixel_size: np.ndarray
    angles: np.ndarray | None = None
    shifts: np.ndarray | None = None
    defocus: np.ndarray | None = None
    phase_shift: np.ndarray | None = None
    voltage: np.ndarray | None = None
    cs: np.ndarray | None = None
    amplitude_contrast: np.ndarray | None = None
    image_size: np.ndarray | None = None
    subset: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.stacks)

    def select(self, which: np.ndarray) -> "ParticleTable":
        """The particles at the given places (an integer or boolean array)."""
        which = np.arange(len(self))[which]
        fields: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields = {k: v if v is None else v[which] for k, v in fields.items() if k != "stacks"}
        return ParticleTable([self.stacks[i] for i in which], **fields)


def read_particles(path: str | Path, pixel_size: float | None = None) -> ParticleTable:
    """The particles of a STAR file; ``pixel_size`` (A) overrides the file's.

    RELION 3.0's pixel size is rlnDetectorPixelSize / rlnMagnification, and its origins are in pixels.
    Raises BadFileError where a value is missing, no number, NaN, or names no optics group, and
    CryobenchError where there are no images or no pixel size in it and none is given.
    """
    blocks = read_star(path)
    with_images = [name for name, block in blocks.items() if block.get("rlnImageName")]
    if not with_images:
        raise CryobenchError(f"{path} names no particle images (no rlnImageName); give the STAR of a stack")
    name = "particles" if "particles" in with_images else with_images[0]
    columns = _Columns(path, blocks[name], blocks.get("optics"))
    pixel = columns.pixel_size(pixel_size)
    shifts = columns.together("rlnOriginXAngst", "rlnOriginYAngst")
    if shifts is None and (in_pixels := columns.together("rlnOriginX", "rlnOriginY")) is not None:
        shifts = in_pixels * pixel[:, None]
    stacks, indices = _image_names(path, blocks[name]["rlnImageName"])
    return ParticleTable(
        stacks,
        indices,
        pixel,
        angles=columns.together("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi", some=True),  # 2D: psi alone
        shifts=shifts,
        defocus=columns.together("rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle"),
        phase_shift=columns.get("rlnPhaseShift"),
        voltage=columns.get("rlnVoltage"),
        cs=columns.get("rlnSphericalAberration"),
        amplitude_contrast=columns.get("rlnAmplitudeContrast"),
        image_size=columns.integers("rlnImageSize"),
        subset=columns.integers("rlnRandomSubset"),
    )


def write_particles(path: str | Path, table: ParticleTable) -> None:
    """Writes a RELION 3.1 STAR file, atomically; particles with equal optics share an optics group."""
    n = len(table)
    given = {
        "rlnVoltage": table.voltage,
        "rlnSphericalAberration": table.cs,
        "rlnAmplitudeContrast": table.amplitude_contrast,
        "rlnImagePixelSize": table.pixel_size,
        "rlnImageSize": table.image_size,
    }
    names = [name for name, values in given.items() if values is not None]
    per_particle = np.column_stack([np.asarray(given[name], np.float64) for name in names])
    if per_particle.shape[0] != n or n == 0:
        raise CryobenchError(f"{path}: a table of {n} particles with {per_particle.shape[0]} rows of optics")
    groups, group = np.unique(per_particle, axis=0, return_inverse=True)
    numbers = range(1, len(groups) + 1)
    optics: dict[str, list] = {
        "rlnOpticsGroupName": [f"opticsGroup{i}" for i in numbers],
        "rlnOpticsGroup": list(numbers),
        **{name: groups[:, i].tolist() for i, name in enumerate(names)},
        "rlnImageDimensionality": [2] * len(groups),
    }
    if "rlnImageSize" in optics:
        optics["rlnImageSize"] = [round(size) for size in optics["rlnImageSize"]]
    images = [f"{i + 1:06d}@{stack}" for stack, i in zip(table.stacks, table.indices.tolist(), strict=True)]
    particles: dict[str, list] = {"rlnImageName": images, "rlnOpticsGroup": (group.reshape(-1) + 1).tolist()}
    for labels, values in (
        (("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"), table.angles),
        (("rlnOriginXAngst", "rlnOriginYAngst"), table.shifts),
        (("rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle"), table.defocus),
        (("rlnPhaseShift",), table.phase_shift),
        (("rlnRandomSubset",), table.subset),
    ):
        if values is not None:
            particles.update(zip(labels, np.asarray(values).reshape(n, -1).T.tolist(), strict=True))
    write_star(path, {"optics": optics, "particles": particles})


def find_stack(name: str, star: str | Path) -> Path:
    """The file of a stack named in a STAR file: as written (from the current folder), else from the STAR's folder or
    the nearest of two above it: RELION names stacks from the project's folder, with STAR files in Job/job001 there."""
    for folder in (Path(), *Path(star).resolve().parents[:3]):
        if (folder / name).is_file():
            return folder / name
    raise CryobenchError(
        f"{star} names the images {name}, which are neither in the current folder nor beside it nor two folders above; "
        "fetch them, or run from the folder that the names start from"
    )


def read_particle_images(table: ParticleTable, star: str | Path) -> np.ndarray:
    """The images (n, h, w), float32, in the table's order; each stack is read once.

    All stacks are found before any is read. Raises BadFileError for an image that a stack does not have
    and for images of unequal sizes.
    """
    files = {name: find_stack(name, star) for name in dict.fromkeys(table.stacks)}
    names = np.array(table.stacks)
    images: np.ndarray | None = None
    for name, file in files.items():
        stack = load(file)[0]
        rows = np.flatnonzero(names == name)
        wanted = table.indices[rows]
        if wanted.max() >= len(stack):
            raise BadFileError(f"{star} asks for image {wanted.max() + 1} of {file}, which has {len(stack)}")
        if images is None:
            images = np.empty((len(table), *stack.shape[1:]), np.float32)
        if stack.shape[1:] != images.shape[1:]:
            raise BadFileError(f"{file} has images of {stack.shape[1:]} pixels, others in {star} differ")
        images[rows] = stack[wanted]
    if images is None:
        raise CryobenchError(f"{star} holds no particles")
    return images


class _Columns:
    """Numbers of the particles: their own column, else that of their optics group."""

    def __init__(self, path: str | Path, particles: dict[str, list[str]], optics: dict[str, list[str]] | None):
        self.path, self.particles, self.optics = path, particles, optics or {}
        self.n = len(particles["rlnImageName"])
        self.rows = np.zeros(self.n, int)
        if self.optics:
            numbers = {v: i for i, v in enumerate(self.optics.get("rlnOpticsGroup", ["1"]))}
            groups = particles.get("rlnOpticsGroup", ["1"] * self.n)
            if missing := set(groups) - set(numbers):
                raise BadFileError(f"{path} has particles of optics group {missing.pop()}, which is not in it")
            self.rows = np.array([numbers[group] for group in groups])

    def get(self, label: str) -> np.ndarray | None:
        if label in self.particles:
            return self._numbers(label, self.particles[label])
        if label in self.optics:
            return self._numbers(label, self.optics[label])[self.rows]
        return None

    def pixel_size(self, given: float | None) -> np.ndarray:
        if given is not None and not (np.isfinite(given) and given > 0):
            raise CryobenchError(f"the pixel size must be a positive number of angstrom, not {given}")
        pixel = self.get("rlnImagePixelSize") if given is None else np.full(self.n, float(given))
        if pixel is None:
            detector, magnification = self.get("rlnDetectorPixelSize"), self.get("rlnMagnification")
            if detector is not None and magnification is not None:  # micrometers: 1e4 A
                pixel = 1e4 * detector / np.where(magnification > 0, magnification, np.inf)
        if pixel is None or not (pixel > 0).all():
            raise CryobenchError(f"{self.path} has no pixel size; give it with --pixel-size A (angstrom)")
        return pixel

    def together(self, *labels: str, some: bool = False) -> np.ndarray | None:
        """(n, len(labels)), or None where none is there; unless ``some`` may be missing, that is an error."""
        found = {label: values for label in labels if (values := self.get(label)) is not None}
        if len(found) == len(labels):
            return np.stack(list(found.values()), axis=1)
        if found and not some:
            missing = ", ".join(label for label in labels if label not in found)
            raise BadFileError(f"{self.path} has {', '.join(found)} but not {missing}")
        return None

    def integers(self, label: str) -> np.ndarray | None:
        values = self.get(label)
        return None if values is None else np.rint(values).astype(int)

    def _numbers(self, label: str, texts: list[str]) -> np.ndarray:
        try:
            values = np.array(texts, dtype=np.float64)
        except ValueError as error:
            raise BadFileError(f"{self.path}: {label} holds something that is no number ({error})") from error
        if not np.isfinite(values).all():
            raise BadFileError(f"{self.path}: {label} holds NaN or infinite values; remove those particles")
        return values


def _image_names(path: str | Path, names: list[str]) -> tuple[list[str], np.ndarray]:
    """``000012@stack.mrcs`` -> stack and place from 0; a name without @ is a file of one image."""
    stacks, indices = [], []
    for text in names:
        number, at, stack = text.partition("@")
        if at and not (number.isdecimal() and int(number) > 0 and stack):
            raise BadFileError(f"{path}: {text!r} is not an image name (number@stack, from 1)")
        stacks.append(stack if at else text)
        indices.append(int(number) - 1 if at else 0)
    return stacks, np.array(indices)
