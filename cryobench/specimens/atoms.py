"""Atomic models from PDB and mmCIF files: what a microscope would see, with every choice put in words."""

import gzip
import re
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cryobench.errors import BadFileError, CryobenchError

if TYPE_CHECKING:
    import gemmi

SUFFIXES = (".pdb", ".ent", ".cif", ".mmcif")
MORE_WATERS = {"TIP", "TIP3", "TP3", "T3P", "SPC", "SOL"}
"""Names that simulation packages give to water, besides those gemmi knows."""
B_UNKNOWN = 20.0
"""B-factor (A^2) for atoms whose own is no displacement (not a number, or AlphaFold's confidence)."""

B_RANGE = (10.0, 200.0)
"""B-factors (A^2) that density is made with; 0 in a file means "not refined", 500 "do not look here"."""


@dataclass(frozen=True)
class Atoms:
    """Atoms of a whole particle, without hydrogens."""

    positions: np.ndarray
    """(n, 3) float64, x, y, z in angstrom."""
    elements: list[str]
    """n chemical symbols, as "C"."""
    b_iso: np.ndarray
    """(n,) float64 isotropic B-factors in A^2, as in the file."""
    occupancy: np.ndarray
    """(n,) float64 in (0, 1]."""
    notes: list[str] = field(default_factory=list)
    """What was done to the file's atoms, in plain words."""

    def __len__(self) -> int:
        return len(self.elements)

    def masses(self) -> np.ndarray:
        """(n,) masses in dalton."""
        import gemmi

        table = {e: gemmi.Element(e).weight for e in set(self.elements)}
        return np.array([table[e] for e in self.elements])

    def centre(self) -> np.ndarray:
        """(3,) centre of mass in angstrom, occupancy counted."""
        return np.average(self.positions, axis=0, weights=self.masses() * self.occupancy)

    def radius(self) -> float:
        """Distance in angstrom from the centre of mass to the farthest atom."""
        return float(np.linalg.norm(self.positions - self.centre(), axis=1).max())


def read_atoms(path: str | Path, assembly: str | None = "1") -> Atoms:
    """Read the biological assembly of a structure file.

    Kept: the first model; of alternate conformers of a residue the one with the highest occupancy (the first
    of equals); ligands, ions, sugars and nucleic acids. Removed: waters, hydrogens and deuterium, atoms with
    zero occupancy. Where the file states biological assemblies (mmCIF, or REMARK 350 of PDB) the wanted one
    is built; a file that states none is taken as it stands. `notes` of the result says what applied.

    Args:
        path: a .pdb, .ent, .cif or .mmcif file, gzipped or not.
        assembly: name of the assembly; None takes the atoms of the file as they stand.

    Raises:
        BadFileError: missing or truncated file, not a structure, no atoms left, broken coordinates.
        CryobenchError: the file states assemblies, but not the one asked for.
    """
    path = Path(path)
    structure = _load(path)
    if len(structure) == 0:
        raise BadFileError(f"{path}: no atoms in this file; give a PDB or mmCIF file with a model in it")
    notes: list[str] = []
    if len(structure) > 1:
        notes.append(f"first of {len(structure)} models used")

    atoms, where = _select(structure[0], notes)
    if not atoms:
        raise BadFileError(f"{path}: no atoms left without waters and hydrogens; give a whole structure")
    positions = np.array([a.pos.tolist() for a in atoms])
    if not (np.isfinite(positions).all() and np.abs(positions).max() < 1e5):
        raise BadFileError(f"{path}: some coordinates are not numbers or absurd; mend or drop those atoms")
    elements = _elements([a.element.name for a in atoms], notes)
    b_iso = _b_factors(np.array([a.b_iso for a in atoms]), structure, notes)
    occupancy = _occupancies(np.array([a.occ for a in atoms]), notes)

    index, positions = _expand(structure, where, positions, assembly, path, notes)
    keep = occupancy[index] > 0
    if not keep.all():
        notes.append(f"{(~keep).sum()} atoms with zero occupancy removed")
    index = index[keep]
    notes.append(f"{len(index)} atoms")
    return Atoms(positions[keep], [elements[i] for i in index], b_iso[index], occupancy[index], notes)


def _load(path: Path) -> "gemmi.Structure":
    import gemmi

    is_packed = path.suffix.lower() == ".gz"
    suffix = (path.with_suffix("") if is_packed else path).suffix.lower()
    if suffix not in SUFFIXES:
        raise BadFileError(f"{path}: unknown kind of structure; expected {', '.join(SUFFIXES)} (or .gz)")
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if is_packed else data).decode(errors="replace")
        if suffix in (".pdb", ".ent"):
            structure = gemmi.read_pdb_string(text)
        else:
            structure = gemmi.make_structure_from_block(gemmi.cif.read_string(text)[0])
    except FileNotFoundError as error:
        raise BadFileError(f"{path}: no such file; check the name") from error
    except Exception as error:  # gemmi and gzip raise RuntimeError, ValueError, EOFError, IndexError ...
        reason = " ".join(str(error).split())[:200]
        raise BadFileError(f"{path}: truncated or not PDB/mmCIF ({reason}); fetch it again") from error
    # a PDB file cut between two lines still parses; the archive's own (with a HEADER) always close with END
    if text.startswith("HEADER") and not re.search(r"^END\s*$", text[-2000:], re.MULTILINE):
        raise BadFileError(f"{path}: truncated, no END record; fetch it again (or add END if it is complete)")
    return structure


def _select(model: "gemmi.Model", notes: list[str]) -> tuple[list["gemmi.Atom"], list[tuple[str, str]]]:
    """The atoms to keep of one model, each with its (chain, subchain), by which assemblies name them."""
    atoms, where = [], []
    waters = hydrogens = alternates = 0
    for chain in model:
        # point mutations are neighbouring residues of one number: their conformers compete as well
        for _, group in groupby(chain, key=lambda residue: str(residue.seqid)):
            site = []
            for residue in group:
                if residue.is_water() or residue.name in MORE_WATERS:
                    waters += 1
                    continue
                hydrogens += sum(a.is_hydrogen() for a in residue)
                site += [(a, (chain.name, residue.subchain)) for a in residue if not a.is_hydrogen()]
            best: dict[str, float] = {}
            for atom, _ in site:
                if atom.has_altloc():
                    best[atom.altloc] = max(best.get(atom.altloc, 0.0), atom.occ)
            chosen = max(best, key=lambda label: best[label], default="")
            kept = [(a, w) for a, w in site if not a.has_altloc() or a.altloc == chosen]
            alternates += len(site) - len(kept)
            atoms += [a for a, _ in kept]
            where += [w for _, w in kept]
    for count, what in (
        (waters, "waters"),
        (hydrogens, "hydrogens"),
        (alternates, "atoms of alternate conformers (highest occupancy kept)"),
    ):
        if count:
            notes.append(f"{count} {what} removed")
    return atoms, where


def _elements(names: list[str], notes: list[str]) -> list[str]:
    import gemmi

    # electron scattering factors end at californium
    known = {n: 0 < gemmi.Element(n).atomic_number <= 98 for n in set(names)}
    unknown = sum(not known[n] for n in names)
    if unknown:
        notes.append(f"{unknown} atoms of unknown element taken as carbon")
    return [n if known[n] else "C" for n in names]


def _b_factors(b_iso: np.ndarray, structure: "gemmi.Structure", notes: list[str]) -> np.ndarray:
    if "alphafold" in dict(structure.info).get("_struct.title", "").lower():
        notes.append(f"AlphaFold's confidence in place of B-factors: {B_UNKNOWN:g} A^2 used for all")
        return np.full_like(b_iso, B_UNKNOWN)
    bad = ~np.isfinite(b_iso)
    if bad.any():
        notes.append(f"{bad.sum()} B-factors that are no number replaced by {B_UNKNOWN:g} A^2")
    b_iso = np.where(bad, B_UNKNOWN, b_iso)
    low, high = B_RANGE
    outside = int(((b_iso < low) | (b_iso > high)).sum())
    if outside:
        notes.append(f"{outside} B-factors outside {low:g}..{high:g} A^2, limited to that for density")
    return b_iso


def _occupancies(occupancy: np.ndarray, notes: list[str]) -> np.ndarray:
    bad = ~((occupancy >= 0) & (occupancy <= 1))
    if not (occupancy > 0).any():  # a column some programs leave at zero
        bad[:] = True
    if bad.any():
        notes.append(f"{bad.sum()} missing or impossible occupancies taken as 1")
    return np.where(bad, 1.0, occupancy)


def _expand(
    structure: "gemmi.Structure",
    where: list[tuple[str, str]],
    positions: np.ndarray,
    assembly: str | None,
    path: Path,
    notes: list[str],
) -> tuple[np.ndarray, np.ndarray]:
    """Index of each atom of the assembly in the file's atoms, and its position."""
    everything = np.arange(len(positions))
    if assembly is None or not structure.assemblies:
        notes.append("no assembly built" if assembly is None else "no assembly stated: taken as it stands")
        return everything, positions
    found = {a.name: a for a in structure.assemblies}
    if assembly not in found:
        raise CryobenchError(f"{path}: has no assembly {assembly!r}; choose one of {', '.join(found)}")
    index, moved = [], []
    for generator in found[assembly].generators:
        chains, subchains = set(generator.chains), set(generator.subchains)
        inside = np.array([(s in subchains) if subchains else (c in chains) for c, s in where])
        for operator in generator.operators:
            rotation, shift = np.array(operator.transform.mat), np.array(operator.transform.vec.tolist())
            index.append(everything[inside])
            moved.append(positions[inside] @ rotation.T + shift)
    if not index or not len(np.concatenate(index)):
        raise BadFileError(f"{path}: assembly {assembly!r} names no chain of the file; read it without")
    copies = max(len(g.operators) for g in found[assembly].generators)
    notes.append(f"assembly {assembly} built: {copies} x the file's chains")
    return np.concatenate(index), np.concatenate(moved)
