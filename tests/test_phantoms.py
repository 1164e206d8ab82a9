"""The built-in structures: exact symmetry, ideal helices, no clashes, protein-like size, packing and spectrum."""

import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt
from scipy.spatial import cKDTree

from cryobench.specimens import phantoms
from cryobench.specimens.atoms import Atoms, read_atoms
from cryobench.specimens.density import atoms_to_density

CASES = [
    ("channel", phantoms.CHANNEL, phantoms.CHANNEL_SEQUENCE, 4, 587),
    ("transporter", phantoms.TRANSPORTER, phantoms.TRANSPORTER_SEQUENCE, 2, 715),
]
each = pytest.mark.parametrize(("name", "table", "sequence", "copies", "residues"), CASES)


def alpha_carbons(table, sequence) -> np.ndarray:
    return np.array([positions[1] for _, positions in phantoms.subunit(table, sequence)])


@each
def test_symmetry_size_and_counts(name, table, sequence, copies, residues):
    atoms = getattr(phantoms, name)()
    assert phantoms.SYMMETRY[name] == f"C{copies}"
    assert len(sequence) == residues
    assert len(atoms) == len(atoms.positions) == copies * sum(len(p) for _, p in phantoms.subunit(table, sequence))
    assert set(atoms.elements) == {"C", "N", "O", "S"}
    np.testing.assert_allclose(atoms.centre(), 0, atol=1e-9)
    angle = 2 * np.pi / copies
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    distance, partner = cKDTree(atoms.positions).query(atoms.positions @ turn.T)
    assert distance.max() < 1e-9
    assert all(atoms.elements[i] == e for i, e in zip(partner, atoms.elements, strict=True))
    assert atoms.positions.tobytes() == getattr(phantoms, name)().positions.tobytes()


def test_extents():
    assert np.ptp(phantoms.channel().positions, axis=0) == pytest.approx([105, 105, 115], abs=2)
    assert np.ptp(phantoms.transporter().positions, axis=0) == pytest.approx([101, 66, 106], abs=2)


def helices(table, ca: np.ndarray) -> list[slice]:
    """Residues of each helix: by its length, starting where CA is 2.282 A from the start of the axis."""
    found, at = [], 0
    for row in table:
        start, end = np.array(row[:3]), np.array(row[3:6])
        at += int(np.argmax(np.abs(np.linalg.norm(ca[at:] - start, axis=1) - 2.282) < 1e-6))
        found.append(slice(at, at + round(float(np.linalg.norm(end - start)) / 1.5) + 1))
        at = found[-1].stop
    assert at == len(ca)
    return found


@each
def test_helices_are_ideal(name, table, sequence, copies, residues):
    chain = [p for _, p in phantoms.subunit(table, sequence)]
    ca = alpha_carbons(table, sequence)
    parts = helices(table, ca)
    assert sum(p.stop - p.start for p in parts) > 0.8 * residues
    for part in parts:
        helix = ca[part]
        assert np.linalg.norm(helix[3:] - helix[:-3], axis=1) == pytest.approx(5.0, abs=0.1)
        assert np.linalg.norm(helix[4:] - helix[:-4], axis=1) == pytest.approx(6.2, abs=0.1)
        for i in range(part.start, part.stop - 4):  # hydrogen bonds, and the peptide bond
            assert np.linalg.norm(chain[i][3] - chain[i + 4][0]) == pytest.approx(2.95, abs=0.05)
            assert np.linalg.norm(chain[i][2] - chain[i + 1][0]) == pytest.approx(1.33, abs=0.02)
        # right-handed: it turns with the direction of travel
        steps = np.diff(helix, axis=0)
        assert (np.cross(steps[:-1], steps[1:]) @ (helix[-1] - helix[0]) > 0).all()
    # loops join them: no gap in the chain
    assert np.linalg.norm(np.diff(ca, axis=0), axis=1).max() < 4.8


@each
def test_amino_acids_are_left_handed(name, table, sequence, copies, residues):
    for letter, (_, p) in zip(sequence, phantoms.subunit(table, sequence), strict=True):
        if letter.upper() != "G":
            n, ca, c, _, cb = p[:5]
            assert (n - ca) @ np.cross(c - ca, cb - ca) > 0


@each
def test_no_clashes(name, table, sequence, copies, residues):
    atoms = getattr(phantoms, name)()
    ca = alpha_carbons(table, sequence)
    label = np.full(len(ca), -1)
    for number, part in enumerate(helices(table, ca)):
        label[part] = number
    angles = 2 * np.pi * np.arange(copies) / copies
    turns = [np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]]) for a in angles]
    everywhere = cKDTree(np.concatenate([ca @ turn.T for turn in turns]))
    for i in np.flatnonzero(label >= 0):
        for j in everywhere.query_ball_point(ca[i], 4.3):
            copy, k = divmod(j, len(ca))
            assert label[k] < 0 or (copy == 0 and label[k] == label[i])
    # pairs nearer than 2 A are the bonds, 1.02 per atom in a protein with a few rings; none coincide
    tree = cKDTree(atoms.positions)
    assert tree.query(atoms.positions, k=2)[0][:, 1].min() > 0.55
    assert (tree.count_neighbors(tree, 2.0) - len(atoms)) / 2 / len(atoms) == pytest.approx(1.02, abs=0.02)


def dalton_per_cubic_angstrom(atoms: Atoms) -> float:
    """Mass over the volume that a 1.4 A ball rolled over the atoms cannot enter (on a 1 A grid)."""
    low = atoms.positions.min(axis=0) - 6
    index = np.round(atoms.positions - low).astype(int)
    empty = np.ones(np.ptp(atoms.positions, axis=0).astype(int) + 14, bool)
    empty[tuple(index.T)] = False
    reachable = distance_transform_edt(empty) > 1.8 + 1.4
    inside = distance_transform_edt(~reachable) > 1.4
    return float(atoms.masses().sum() / inside.sum())


def test_packed_like_protein(shared):
    real = dalton_per_cubic_angstrom(read_atoms(shared / "data" / "trpv1-3j5p" / "pdb3j5p.pdb"))
    assert 0.6 < real < 0.95
    for made in (phantoms.channel(), phantoms.transporter()):
        assert dalton_per_cubic_angstrom(made) == pytest.approx(real, rel=0.1)


def radial_spectrum(atoms: Atoms, size: int = 96, pixel_size: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies (1/A) and mean |F|^2 per atom in each shell, all B-factors 40."""
    same = Atoms(atoms.positions, atoms.elements, np.full(len(atoms), 40.0), atoms.occupancy)
    power = np.abs(np.fft.fftn(atoms_to_density(same, size, pixel_size, resolution=0).numpy())) ** 2
    q = np.fft.fftfreq(size) * size
    shell = np.sqrt(q[:, None, None] ** 2 + q[:, None] ** 2 + q**2).round().astype(int).ravel()
    mean = np.bincount(shell, power.ravel())[: size // 2] / np.bincount(shell)[: size // 2]
    return np.arange(size // 2) / (size * pixel_size), mean / len(atoms)


@pytest.mark.parametrize("name", ["channel", "transporter"])
def test_radial_spectrum_is_that_of_trpv1(name, shared):
    k, real = radial_spectrum(read_atoms(shared / "data" / "trpv1-3j5p" / "pdb3j5p.pdb"))
    _, made = radial_spectrum(getattr(phantoms, name)())
    bands = [(1 / 40, 1 / 20), (1 / 20, 1 / 12), (1 / 12, 1 / 8), (1 / 8, 1 / 6), (1 / 6, 1 / 5), (1 / 5, 1 / 4)]
    for low, high in bands:
        ring = (k >= low) & (k < high)
        # below 1/20 A the outline decides, which is each protein's own
        factor = 2 if high <= 1 / 20 else 1.4
        assert 1 / factor < made[ring].mean() / real[ring].mean() < factor
    # helices about 10 A apart: more there than the neighbouring rings would make one expect
    hump = made[(k > 1 / 12) & (k < 1 / 9)].mean()
    assert hump > 2.5 * made[(k > 1 / 7) & (k < 1 / 6)].mean()
