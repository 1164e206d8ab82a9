"""From a name or a file to a structure: built-in phantoms, archive entries that were fetched, the user's files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from cryobench.errors import CryobenchError

if TYPE_CHECKING:
    from torch import Tensor

    from cryobench.specimens.atoms import Atoms

MODEL_SUFFIXES = (".pdb", ".ent", ".cif", ".mmcif")
MAP_SUFFIXES = (".mrc", ".map", ".ccp4", ".rec")
#: the built-in structures (symmetry, what they look like); made by phantoms.py
BUILT_IN = {
    "channel": ("C4", "tetrameric membrane channel with a cytoplasmic domain, about the size of HCN1"),
    "transporter": ("C2", "dimeric membrane transporter, about the size of prestin"),
}
#: names of the papers' own specimens and the archive entry that holds each
ARCHIVE = {
    "hcn1": ("EMD-8511", "C4", "HCN1 channel (Zhang et al.)"),
    "prestin": ("EMD-24928", "C2", "prestin (Zhang et al.)"),
    "ribosome-70s": ("EMD-0406", "C1", "70S ribosome (Tang et al.)"),
    "emd-23579": ("EMD-23579", "C1", "EMD-23579 (Tang et al.; identity unconfirmed)"),
}


@dataclass(frozen=True)
class Structure:
    """A named structure that can become a density volume of any size and pixel size.

    fingerprint identifies its content; notes say what was done to a file when it was read.
    """

    name: str
    symmetry: str
    source: str
    fingerprint: str
    load: Callable[[], Atoms | tuple[Tensor, float]] = field(repr=False)

    def lacks_pixel_size(self) -> bool:
        """Whether it is a map that states none, so that one must be given."""
        if not self.source.removesuffix(".gz").endswith(MAP_SUFFIXES):
            return False
        from cryobench.specimens.mrc import read_header

        return not all(read_header(self.source).voxel)

    def pixel_size(self, size: int) -> float:
        """Pixel size in angstrom at which the particle fills about 60 % of a box of ``size`` pixels."""
        content = self.load()
        if isinstance(content, tuple):
            volume, pixel = content
            return round(volume.shape[0] * pixel / size, 4)
        from cryobench.specimens.density import default_pixel_size

        return default_pixel_size(content, size)

    def density(self, size: int, pixel_size: float, resolution: float | None = None) -> tuple[Tensor, list[str]]:
        """Density (size, size, size) float32 and the notes of its making; resolution in angstrom."""
        content = self.load()
        if isinstance(content, tuple):
            from cryobench.specimens.maps import resample

            volume, pixel = content
            if resolution is not None:
                raise CryobenchError("--resolution is for atomic models; filter the map first")
            return resample(volume, pixel, size, pixel_size), [f"map of {volume.shape[0]} px at {pixel:g} A resampled"]
        from cryobench.specimens.density import atoms_to_density

        return atoms_to_density(content, size, pixel_size, resolution), list(content.notes)


def resolve(name: str, data_dir: Path | None = None, pixel_size: float | None = None) -> Structure:
    """The structure of that name or file.

    pixel_size (angstrom) is for a map whose header states none. Raises CryobenchError for an unknown
    name, an entry that was not fetched or a file of another kind; BadFileError for a broken file.
    """
    if name in BUILT_IN:
        return Structure(name, BUILT_IN[name][0], "built-in", _phantom_code(), partial(_phantom, name))
    if name in ARCHIVE:
        path = _fetched(name, data_dir)
        return _from_file(path, name, ARCHIVE[name][1], pixel_size)
    path = Path(name)
    if path.exists() or path.suffix:
        return _from_file(path, specimen_name(name), "C1", pixel_size)
    raise CryobenchError(
        f"no structure {name!r}: give a .pdb/.cif/.mrc/.map file or one of {', '.join([*BUILT_IN, *ARCHIVE])}"
    )


@cache
def _phantom(name: str) -> Atoms:
    from cryobench.specimens import phantoms

    made: Atoms = getattr(phantoms, name)()
    return made


@cache
def _phantom_code() -> str:
    from cryobench.specimens import phantoms

    return hashlib.sha256(Path(phantoms.__file__).read_bytes()).hexdigest()


def specimen_name(name: str) -> str:
    """The short name of a specimen: what tables and records call it. For a file its stem, and where that could be
    taken for another specimen or another file, part of a hash of its place."""
    if name in BUILT_IN or name in ARCHIVE:
        return name
    place = hashlib.sha256(str(Path(name).resolve()).encode()).hexdigest()[:6]
    return f"{_stem(Path(name))}-{place}"


def available(name: str, data_dir: Path | None = None) -> bool:
    """Whether a table can use this specimen now, without a download."""
    if name in BUILT_IN:
        return True
    try:
        return _fetched(name, data_dir).exists() if name in ARCHIVE else Path(name).exists()
    except CryobenchError:
        return False


def _fetched(name: str, data_dir: Path | None) -> Path:
    from cryobench.paths import data_dir as default_data_dir
    from cryobench.specimens.manifest import load_manifest

    entry = ARCHIVE[name][0]
    record = load_manifest()[entry]
    path = (data_dir or default_data_dir()) / record.files[0].path
    if not path.exists():
        raise CryobenchError(f"{name} ({entry}) is not on this machine: run `cryobench fetch {entry}` first")
    return path


def _stem(path: Path) -> str:
    name = path.name[:-3] if path.name.endswith(".gz") else path.name
    return Path(name).stem


def _from_file(path: Path, name: str, symmetry: str, pixel_size: float | None) -> Structure:
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if not path.is_file():
        raise CryobenchError(f"{path}: no such file")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if suffix in MODEL_SUFFIXES:
        from cryobench.specimens.atoms import read_atoms

        return Structure(name, symmetry, str(path), digest, cache(lambda: read_atoms(path)))
    if suffix in MAP_SUFFIXES:
        from cryobench.specimens.maps import read_map

        content = f"{digest} {pixel_size}"
        return Structure(name, symmetry, str(path), content, cache(lambda: read_map(path, pixel_size)))
    raise CryobenchError(f"{path}: {suffix or 'no suffix'} is not a structure; give .pdb, .cif, .mrc or .map (or .gz)")
