"""Reading structures: every awkward kind of atom, biological assemblies against gemmi, broken files."""

import gzip
from pathlib import Path

import gemmi
import numpy as np
import pytest

from cryobench.errors import BadFileError, CryobenchError
from cryobench.specimens.atoms import B_UNKNOWN, Atoms, read_atoms


def line(serial, name, residue, number, x, element, alt=" ", occ=1.0, b=30.0, chain="A"):
    return (
        f"HETATM{serial:5d} {name:<4s}{alt}{residue:>3s} {chain}{number:4d}    "
        f"{x:8.3f}{2.0:8.3f}{-3.0:8.3f}{occ:6.2f}{b:6.2f}          {element:>2s}\n"
    )


def read(tmp_path: Path, text: str, name: str = "a.pdb", **options: str) -> Atoms:
    path = tmp_path / name
    path.write_text(text)
    return read_atoms(path, **options)


def test_waters_and_hydrogens_removed(tmp_path):
    text = (
        line(1, " N", "ALA", 1, 0, "N")
        + line(2, " H", "ALA", 1, 1, "H")
        + line(3, " D1", "ALA", 1, 2, "D")
        + line(4, " O", "HOH", 2, 3, "O")
        + line(5, " O", "DOD", 3, 4, "O")
        + line(6, " OH2", "TIP", 4, 5, "O")
        + line(7, "ZN", "ZN", 5, 6, "ZN")
    )
    atoms = read(tmp_path, text)
    assert atoms.elements == ["N", "Zn"]
    assert "3 waters removed" in atoms.notes
    assert "2 hydrogens removed" in atoms.notes
    assert "no assembly stated: taken as it stands" in atoms.notes
    np.testing.assert_allclose(atoms.positions, [[0, 2, -3], [6, 2, -3]])


def test_alternate_locations_keep_the_best(tmp_path):
    text = (
        line(1, " CA", "ALA", 1, 0, "C")
        + line(2, " CB", "ALA", 1, 1, "C", "A", 0.3)
        + line(3, " CB", "ALA", 1, 2, "C", "B", 0.7)
        + line(4, " CB", "ALA", 2, 3, "C", "A", 0.5)  # of equals the first
        + line(5, " CB", "ALA", 2, 4, "C", "B", 0.5)
        + line(6, " OG", "SER", 3, 5, "O", "A", 0.4)  # a point mutation
        + line(7, " SG", "CYS", 3, 6, "S", "B", 0.6)
    )
    atoms = read(tmp_path, text)
    assert atoms.positions[:, 0].tolist() == [0, 2, 3, 6]
    assert atoms.occupancy.tolist() == pytest.approx([1, 0.7, 0.5, 0.6])
    assert atoms.notes[0].startswith("3 atoms of alternate conformers")


def test_occupancies_b_factors_and_unknown_elements(tmp_path):
    text = (
        line(1, " CA", "ALA", 1, 0, "C", occ=0.0)
        + line(2, " CB", "ALA", 1, 1, "C", occ=-1.0, b=-5)
        + line(3, " X", "UNK", 2, 2, "X", b=500)
    )
    atoms = read(tmp_path, text)
    assert atoms.positions[:, 0].tolist() == [1, 2]
    assert atoms.occupancy.tolist() == [1, 1]
    assert atoms.elements == ["C", "C"]
    notes = " | ".join(atoms.notes)
    for part in (
        "1 atoms with zero occupancy",
        "1 atoms of unknown element",
        "1 missing or imp",
        "2 B-factors outside",
    ):
        assert part in notes


def test_occupancy_column_left_empty(tmp_path):
    atoms = read(tmp_path, line(1, " CA", "ALA", 1, 0, "C", occ=0) + line(2, " CB", "ALA", 1, 1, "C", occ=0))
    assert atoms.occupancy.tolist() == [1, 1]


def test_first_model_only(tmp_path):
    one = line(1, " CA", "ALA", 1, 0, "C")
    text = f"MODEL        1\n{one}ENDMDL\nMODEL        2\n{one}{one}ENDMDL\nEND\n"
    atoms = read(tmp_path, text)
    assert len(atoms) == 1
    assert "first of 2 models used" in atoms.notes


def test_alphafold_confidence_is_no_b_factor(tmp_path):
    title = "TITLE     ALPHAFOLD MONOMER V2.0 PREDICTION FOR X\n"
    atoms = read(tmp_path, title + line(1, " CA", "ALA", 1, 0, "C", b=98))
    assert atoms.b_iso.tolist() == [B_UNKNOWN]


def two_chains() -> gemmi.Structure:
    """Chains A and B; assembly 1 = A under a three-fold screw and B once; assembly 2 = B alone."""
    rng = np.random.default_rng(1)
    structure = gemmi.read_pdb_string(
        "".join(line(i, " CA", "ALA", i, x, "C", chain="AABBB"[i]) for i, x in enumerate(rng.normal(size=5) * 20))
    )
    structure.setup_entities()
    structure.assign_label_seq_id()

    def generator(chain, angles):
        made = gemmi.Assembly.Gen()
        made.chains = [chain]
        made.subchains = [s.subchain_id() for s in structure[0][chain].subchains()]
        for k, angle in enumerate(angles):
            operator = gemmi.Assembly.Operator()
            c, s = np.cos(angle), np.sin(angle)
            operator.transform.mat.fromlist([[c, -s, 0], [s, c, 0], [0, 0, 1]])
            operator.transform.vec.fromlist([0, 0, 4.0 * k])
            made.operators.append(operator)
        return made

    turns = [0, 2 * np.pi / 3, 4 * np.pi / 3]
    for name, parts in (("1", [("A", turns), ("B", [0])]), ("2", [("B", [0])])):
        assembly = gemmi.Assembly(name)
        for chain, angles in parts:
            assembly.generators.append(generator(chain, angles))
        structure.assemblies.append(assembly)
    return structure


def sorted_rows(x: np.ndarray) -> np.ndarray:
    x = np.round(x, 2) + 0.0
    return x[np.lexsort(x.T)]


@pytest.mark.parametrize("suffix", ["pdb", "cif", "pdb.gz", "cif.gz"])
def test_assembly_is_gemmis(tmp_path, suffix):
    structure = two_chains()
    text = structure.make_mmcif_document().as_string() if "cif" in suffix else structure.make_pdb_string()
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    for name in ("1", "2"):
        made = gemmi.make_assembly(structure.assemblies[int(name) - 1], structure[0], gemmi.HowToNameCopiedChain.Short)
        expected = np.array([site.atom.pos.tolist() for site in made.all()])
        atoms = read_atoms(path, assembly=name)
        assert len(atoms) == {"1": 9, "2": 3}[name]
        np.testing.assert_allclose(sorted_rows(atoms.positions), sorted_rows(expected), atol=0.02)
    assert len(read_atoms(path, assembly=None)) == 5
    with pytest.raises(CryobenchError, match="choose one of 1, 2"):
        read_atoms(path, assembly="7")


GOOD = "".join(line(i, " CA", "ALA", i, i, "C") for i in range(1, 20))
CIF = two_chains().make_mmcif_document().as_string()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.pdb", b""),
        ("empty.cif", b""),
        ("noise.pdb", bytes(range(256)) * 20),
        ("noise.cif", bytes(range(256)) * 20),
        ("wrong.mrc", GOOD.encode()),
        ("cut_line.pdb", GOOD.encode()[:-40]),
        ("no_end.pdb", ("HEADER    HYDROLASE\n" + GOOD).encode()),
        ("cut.cif", CIF[: CIF.index("HETATM 4") + 20].encode()),
        ("cut.pdb.gz", gzip.compress(GOOD.encode())[:-20]),
        ("not_gz.pdb.gz", GOOD.encode()),
        ("water.pdb", line(1, " O", "HOH", 2, 3, "O").encode()),
        ("nan.pdb", GOOD.replace("   3.000", "     nan", 1).encode()),
        ("page.pdb", b"<!DOCTYPE html><html>404</html>"),
        ("folder.pdb", None),
    ],
)
def test_broken_files_say_so_in_one_line(tmp_path, name, content):
    path = tmp_path / name
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(BadFileError) as caught:
        read_atoms(path)
    message = str(caught.value)
    assert name in message
    assert ";" in message  # what is wrong; how to mend it
    assert "\n" not in message


def test_missing_file(tmp_path):
    with pytest.raises(BadFileError, match="no such file"):
        read_atoms(tmp_path / "none.pdb")


def test_centre_and_radius_are_by_mass():
    atoms = Atoms(np.array([[0.0, 0, 0], [3, 0, 0]]), ["C", "Mg"], np.ones(2), np.array([1.0, 0.5]))
    # 12.011 at 0, half of 24.305 at 3
    assert atoms.centre()[0] == pytest.approx(3 * 12.1525 / (12.1525 + 12.011), rel=1e-4)
    assert atoms.radius() == pytest.approx(atoms.centre()[0])


@pytest.mark.parametrize(
    ("path", "count", "kilodalton"),
    [
        ("t20s-3j9i/3j9i.pdb", 46228, 610),
        ("trpv1-3j5p/pdb3j5p.pdb", 18636, 245),
        ("apoferritin-6z6u/6z6u.pdb", 32618, 432),
        ("apoferritin-4v1w/4v1w.cif", 32736, 432),
        ("sars-cov-2-spike-6vxx/6vxx.pdb", 22812, 301),
        ("protein-kinase-a-1atp/1atp.pdb", 2967, 39),
    ],
)
def test_real_structures(shared, path, count, kilodalton):
    atoms = read_atoms(shared / "data" / path)
    assert len(atoms) == len(atoms.positions) == count
    assert atoms.masses().sum() / 1000 == pytest.approx(kilodalton, abs=1)
    assert "H" not in atoms.elements


def test_real_structure_cut_anywhere_is_refused(shared, tmp_path):
    whole = (shared / "data" / "trpv1-3j5p" / "pdb3j5p.pdb").read_bytes()
    for cut in (300, 40_000, 700_000, 700_030, len(whole) - 500):
        path = tmp_path / "cut.pdb"
        path.write_bytes(whole[:cut])
        with pytest.raises(BadFileError):
            read_atoms(path)
