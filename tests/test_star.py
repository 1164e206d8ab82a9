"""STAR files against gemmi's CIF parser, against RELION itself, and against broken files."""

import shutil
import subprocess
from pathlib import Path

import gemmi
import numpy as np
import pytest

from cryobench.errors import BadFileError, CryobenchError
from cryobench.specimens.mrc import read_mrc, write_mrc
from cryobench.specimens.particle_star import (
    ParticleTable,
    find_stack,
    read_particle_images,
    read_particles,
    write_particles,
)
from cryobench.specimens.star import read_star, write_star

RELION_31 = """
# version 30001

data_optics

loop_
_rlnOpticsGroupName #1
_rlnOpticsGroup #2
_rlnVoltage #3
_rlnSphericalAberration #4
_rlnAmplitudeContrast #5
_rlnImagePixelSize #6
_rlnImageSize #7
"a group"            2   300.0   2.7   0.1   1.25   64
opticsGroup1         1   200.0   0.01  0.07  0.885  64


# version 30001

data_particles

loop_
_rlnMicrographName #1
_rlnImageName #2
_rlnOpticsGroup #3
_rlnAngleRot #4
_rlnAngleTilt #5
_rlnAnglePsi #6
_rlnOriginXAngst #7
_rlnOriginYAngst #8
data_7/x.mrc 000002@a/stack.mrcs 1 10 20 30 1.5 -2.5
data_7/x.mrc 000001@a/stack.mrcs 2 -10 90.5 1e2 0 0   # a remark
_odd_name.mrc 3@b.mrcs           2 0 0 0 0 0
"""


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def _table(n: int = 5, **changes: object) -> ParticleTable:
    rng = np.random.default_rng(0)
    fields: dict = {
        "stacks": ["x.mrcs"] * n,
        "indices": np.arange(n),
        "pixel_size": np.full(n, 1.5),
        "angles": rng.uniform(-180, 180, (n, 3)).round(6),
        "shifts": rng.normal(size=(n, 2)).round(6),
        "defocus": rng.uniform(1e4, 2e4, (n, 3)).round(6),
        "phase_shift": np.full(n, 90.0),
        "voltage": np.where(np.arange(n) % 2, 200.0, 300.0),
        "cs": np.full(n, 2.7),
        "amplitude_contrast": np.full(n, 0.1),
        "image_size": np.full(n, 24),
        "subset": np.arange(n) % 2 + 1,
    }
    return ParticleTable(**(fields | changes))


def test_relion_31_optics_reach_each_particle(tmp_path: Path) -> None:
    table = read_particles(_write(tmp_path / "p.star", RELION_31))
    assert table.stacks == ["a/stack.mrcs", "a/stack.mrcs", "b.mrcs"]
    assert table.indices.tolist() == [1, 0, 2]
    assert table.pixel_size.tolist() == [0.885, 1.25, 1.25]
    assert table.voltage.tolist() == [200, 300, 300]
    assert table.cs.tolist() == [0.01, 2.7, 2.7]
    assert table.amplitude_contrast.tolist() == [0.07, 0.1, 0.1]
    assert table.angles.tolist() == [[10, 20, 30], [-10, 90.5, 100], [0, 0, 0]]
    assert table.shifts[0].tolist() == [1.5, -2.5]
    assert table.defocus is None
    assert table.subset is None
    assert read_particles(tmp_path / "p.star", 3.0).pixel_size.tolist() == [3, 3, 3]
    some = table.select(np.array([False, True, True]))
    assert some.stacks == ["a/stack.mrcs", "b.mrcs"]
    assert some.angles.tolist() == [[-10, 90.5, 100], [0, 0, 0]]
    assert some.defocus is None


def test_lines_that_look_like_keywords_are_rows_and_quotes_are_removed(tmp_path: Path) -> None:
    blocks = read_star(_write(tmp_path / "p.star", RELION_31))
    assert list(blocks) == ["optics", "particles"]
    assert blocks["optics"]["rlnOpticsGroupName"] == ["a group", "opticsGroup1"]
    assert blocks["particles"]["rlnMicrographName"] == ["data_7/x.mrc", "data_7/x.mrc", "_odd_name.mrc"]


def test_single_values_windows_ends_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "p.star"
    path.write_bytes(
        b"\xef\xbb\xbfdata_job\r\n_rlnA  7 # why\r\n_rlnB 'two words'\r\n\r\ndata_\r\nloop_\r\n_c\r\n\xe9\r\n"
    )
    blocks = read_star(path)
    assert blocks == {"job": {"rlnA": ["7"], "rlnB": ["two words"]}, "": {"c": ["\udce9"]}}
    write_star(path, blocks)
    assert read_star(path) == blocks
    assert b"\xe9" in path.read_bytes()


def test_a_table_comes_back_as_written(tmp_path: Path) -> None:
    table = _table()
    write_particles(tmp_path / "p.star", table)
    back = read_particles(tmp_path / "p.star")
    assert back.stacks == table.stacks
    for name in vars(table).keys() - {"stacks"}:
        np.testing.assert_allclose(getattr(back, name), getattr(table, name), atol=1e-6, err_msg=name)
    assert len(read_star(tmp_path / "p.star")["optics"]["rlnVoltage"]) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["p.star"]


def test_half_a_defocus_is_an_error_and_an_angle_alone_is_none(tmp_path: Path) -> None:
    path = tmp_path / "p.star"
    write_particles(path, _table())
    text = path.read_text()
    for label in ("rlnDefocusAngle", "rlnDefocusV", "rlnOriginYAngst"):
        path.write_text(text.replace(f"_{label}", "_rlnNoSuchLabel"))
        with pytest.raises(BadFileError, match=label):
            read_particles(path)
    path.write_text(text.replace("_rlnAngleTilt", "_rlnNoSuchLabel"))  # as from 2D classes
    assert read_particles(path).angles is None


def test_what_we_write_is_cif_for_gemmi(tmp_path: Path) -> None:
    write_star(tmp_path / "x.star", {"a": {"p": ["x y", "it's", '#"', ""], "q": [1, 2.5, -3, 4]}})
    column = gemmi.cif.read(str(tmp_path / "x.star"))[0].find(["_p", "_q"])
    assert [gemmi.cif.as_string(row[0]) for row in column] == ["x y", "it's", '#"', ""]
    assert [float(row[1]) for row in column] == [1, 2.5, -3, 4]


def test_bad_stars_give_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.star"
    rows = RELION_31.splitlines()
    cases = [
        ("", "empty"),
        ("x,y\n1,2\n", "not a STAR"),
        ("# only a remark\n", "not a STAR"),
        ("\n".join(rows[:-1]) + "\ndata_7/x.mrc 00001@a", "2 values for 8 columns"),
        (RELION_31.replace(" 3@b.mrcs           2 ", " 3@b.mrcs  9 "), "optics group 9"),
        (RELION_31.replace("20 30", "abc 30"), "no number"),
        (RELION_31.replace("20 30", "nan 30"), "NaN"),
        (RELION_31.replace("3@b", "0@b"), "not an image name"),
        (RELION_31.replace("3@b", "x@b"), "not an image name"),
        (RELION_31 + RELION_31, "second block"),
        ("data_\nloop_\n_a\n_a\n1 2\n", "second column"),
        ("data_\n_a\n", "no value"),
        ("data_\nloop_\n_rlnCoordinateX #1\n3.5\n", "no particle images"),
        ("data_\nloop_\n_rlnImageName #1\n1@x.mrcs\n", "--pixel-size"),
    ]
    for text, pattern in cases:
        with pytest.raises(CryobenchError, match=pattern) as caught:
            read_particles(_write(path, text))
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)
    path.write_bytes(b"\x00\x01" * 3000)
    with pytest.raises(BadFileError, match="binary"):
        read_star(path)
    np.save(tmp_path / "x.npy", np.zeros(3, [("uid", "u8")]))
    (tmp_path / "x.npy").rename(tmp_path / "x.cs")
    with pytest.raises(BadFileError, match="pyem"):
        read_particles(tmp_path / "x.cs")


def test_damaged_stars_raise_only_clear_errors(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    whole = RELION_31.encode()
    failed = 0
    for _ in range(400):
        raw = bytearray(whole)
        for _ in range(rng.integers(1, 8)):
            raw[rng.integers(0, len(raw))] = rng.integers(1, 256)
        (tmp_path / "x.star").write_bytes(raw[: rng.integers(1, len(raw))] if rng.random() < 0.3 else raw)
        try:
            table = read_particles(tmp_path / "x.star")
        except CryobenchError:
            failed += 1
        else:
            assert len(table.stacks) == len(table.indices) == len(table.pixel_size) > 0
    assert 50 < failed < 390


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    for bad in ({"a": ["x\ny"]}, {"a": ["'\" "]}, {"a": [1], "b": [1, 2]}):
        with pytest.raises(CryobenchError):
            write_star(tmp_path / "x.star", {"t": bad})
    with pytest.raises(CryobenchError):
        write_particles(tmp_path / "x.star", _table(0))
    assert list(tmp_path.iterdir()) == []


def test_images_are_found_beside_the_star_or_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(0).normal(size=(5, 6, 9)).astype(np.float32)
    (tmp_path / "sub").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    star = tmp_path / "sub" / "p.star"
    write_mrc(tmp_path / "sub" / "x.mrcs", images, 1.5)
    write_mrc(tmp_path / "here" / "y.mrcs", images[:2] + 10, 1.5)
    table = _table(4, stacks=["x.mrcs", "y.mrcs", "x.mrcs", "x.mrcs"], indices=np.array([4, 1, 0, 3]))
    expected = np.stack([images[4], images[1] + 10, images[0], images[3]])
    np.testing.assert_array_equal(read_particle_images(table, star), expected)
    write_mrc(tmp_path / "here" / "x.mrcs", images[::-1], 1.5)  # as written comes first, as in RELION
    assert find_stack("x.mrcs", star) == Path("x.mrcs")
    # RELION's names start from the project's folder, and its STAR files are two levels below
    job = tmp_path / "sub" / "job012"
    job.mkdir()
    assert find_stack("sub/x.mrcs", job / "p.star") == tmp_path / "sub" / "x.mrcs"
    write_mrc(job / "z.mrcs", images, 1.5)
    write_mrc(tmp_path / "z.mrcs", images, 1.5)
    assert find_stack("z.mrcs", job / "p.star") == job / "z.mrcs"  # the nearest
    with pytest.raises(CryobenchError, match="two folders above"):
        find_stack("sub/x.mrcs", job / "one" / "p.star")
    with pytest.raises(CryobenchError, match=r"no\.mrcs.*neither"):
        read_particle_images(_table(stacks=["x.mrcs", "no.mrcs"]), star)
    with pytest.raises(BadFileError, match=r"image 5 of y\.mrcs, which has 2"):
        read_particle_images(_table(stacks=["y.mrcs"] * 5), star)
    write_mrc("z.mrcs", np.zeros((2, 3, 3)), 1.5)
    with pytest.raises(BadFileError, match="differ"):
        read_particle_images(_table(2, stacks=["y.mrcs", "z.mrcs"], indices=np.array([0, 0])), star)


def test_real_stars(shared: Path) -> None:
    data = shared / "data"
    for path in sorted(data.glob("*/*.star")):
        block = next(iter(read_star(path).values()))
        peer = gemmi.cif.read(str(path))[0]
        assert len(block) > 4
        for label, values in block.items():
            assert values == list(peer.find_loop("_" + label))
    t20s = read_particles(data / "t20s-empiar-10025-metadata/particles.star")
    assert len(t20s) == 1500
    assert t20s.pixel_size[0] == pytest.approx(0.98186, abs=1e-4)  # 3.733333 um / 38023
    assert t20s.shifts[0, 0] == pytest.approx(15.624062 * 0.98186, abs=1e-3)  # 3.0: origins in pixels
    assert t20s.indices[0] == 274
    assert set(t20s.subset) == {1, 2}
    star = data / "ribosome-50s-empiar-10076-particles/empiar_10076_7.star"
    table = read_particles(star)
    assert table.pixel_size[0] == pytest.approx(1.31, abs=1e-3)
    assert table.angles is None
    assert read_particle_images(table, star).shape == (7, 320, 320)
    with pytest.raises(CryobenchError, match="no particle images"):
        read_particles(data / "t20s-empiar-10025-metadata/ctf_params.star")
    with pytest.raises(BadFileError, match="pyem"):
        read_particles(star.with_suffix(".cs"))


@pytest.mark.peers
@pytest.mark.skipif(shutil.which("relion_reconstruct") is None, reason="RELION is not installed")
def test_relion_reads_what_we_write_and_agrees_on_the_sign_of_shifts(tmp_path: Path) -> None:
    n, size, pixel = 60, 24, 1.5
    rng = np.random.default_rng(0)
    displaced = rng.integers(-3, 4, (n, 2))  # x, y in pixels of a blob from the centre of its image
    y, x = np.mgrid[:size, :size] - size // 2
    images = np.stack([np.exp(-((x - dx) ** 2 + (y - dy) ** 2) / 8) for dx, dy in displaced])
    write_mrc(tmp_path / "x.mrcs", images, pixel)
    angles = np.stack([rng.uniform(-180, 180, n), np.degrees(np.arccos(rng.uniform(-1, 1, n))), np.zeros(n)], 1)
    write_particles(tmp_path / "x.star", _table(n, angles=angles, shifts=-displaced * pixel, defocus=None))

    def relion(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    for name in ("x.mrcs", "x.star"):
        assert relion("relion_image_handler", "--i", name, "--stats").count("angpix = 1.5") == n
    relion("relion_reconstruct", "--i", "x.star", "--o", "map.mrc", "--pad", "2")
    volume, read_pixel = read_mrc(tmp_path / "map.mrc")
    assert read_pixel == pytest.approx(pixel)
    assert np.unravel_index(volume.argmax(), volume.shape) == (size // 2,) * 3
    radius = np.linalg.norm(np.mgrid[:size, :size, :size] - size // 2, axis=0)
    assert volume[radius <= 1].mean() > 5 * abs(volume[radius > 9]).max()
