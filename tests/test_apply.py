"""Methods that need the structure or the CTF on somebody's own stack, through the command line."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cryobench.cli import main
from cryobench.errors import CryobenchError
from cryobench.imaging.ctf import Optics, ctf_2d
from cryobench.imaging.image_scale import image_scale
from cryobench.imaging.particles import Simulation, Simulator
from cryobench.imaging.stacks import contrast_transfers, read_ctf, read_images
from cryobench.methods import em3d
from cryobench.methods.apply import prepare_method
from cryobench.methods.noise_level import estimate_sigma
from cryobench.specimens.catalog import resolve
from cryobench.specimens.mrc import read_mrc, write_mrc
from cryobench.specimens.particle_star import ParticleTable, read_particles, write_particles

N = 16


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("apply") / "c.mrcs"
    assert main(["simulate", "channel", "-o", str(path), "-n", str(N), "--size", "32", "--ctf"]) == 0
    return path


def denoised(stack: Path, out: Path, *arguments: str) -> float:
    """PSNR in dB, of the range of the clean images."""
    assert main(["denoise", str(stack), "-o", str(out), "--profile", "smoke", *arguments]) == 0
    return psnr(stack, out)


def psnr(stack: Path, out: Path) -> float:
    clean = read_mrc(stack.with_name("c_clean.mrcs"))[0]
    return float(-10 * np.log10(np.square(read_mrc(out)[0] - clean).mean()))


def failing(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main(["denoise", *map(str, arguments)]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1, said
    assert said[0].startswith("cryobench: ")
    return said[0]


def test_what_learns_from_pairs_learns_from_views_of_the_reference(
    stack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o.mrcs"
    found = denoised(stack, out, "-m", "score-target", "--reference", "transporter", "--seed", "1")
    assert "simulated projections of transporter" in capsys.readouterr().err
    assert found > psnr(stack, stack) + 5  # of one structure or the other: noise goes


def test_the_limit_needs_the_right_structure_and_the_ctf(
    stack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, ctf = tmp_path / "o.mrcs", ["--ctf", str(stack.with_suffix(".star"))]
    # as a map file of another box and pixel size, which states no symmetry
    structure = resolve("channel")
    write_mrc(tmp_path / "channel.mrc", structure.density(54, 5.0)[0].numpy(), 5.0, stack=False)
    limit = denoised(stack, out, "-m", "bayes", "--reference", "channel", *ctf)
    capsys.readouterr()
    default = denoised(stack, tmp_path / "default.mrcs", "-m", "bayes", *ctf)
    assert "'channel' is the structure" in capsys.readouterr().err
    assert default == limit
    assert limit > psnr(stack, stack) + 22
    assert denoised(stack, out, "-m", "bayes", "--reference", str(tmp_path / "channel.mrc"), *ctf) > limit - 1.5
    same = ("-m", "bayes", "--reference", str(tmp_path / "channel.mrc"), *ctf, "--symmetry")
    assert denoised(stack, out, *same, "C4") > limit - 1.5
    assert "not used" not in capsys.readouterr().err
    assert denoised(stack, out, *same, "C3") > limit - 1.5
    assert "not C3" in capsys.readouterr().err
    assert denoised(stack, out, "-m", "bayes", "--reference", "channel") < limit - 8
    assert denoised(stack, out, "-m", "bayes", "--reference", "transporter", *ctf) < limit - 8


def test_the_ctf_reaches_methods_that_learn_from_the_input(
    stack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, star = tmp_path / "o.mrcs", str(stack.with_suffix(".star"))
    weights = str(tmp_path / "w")
    assert denoised(stack, out, "-m", "cwf", "--ctf", star, "--save-weights", weights) > psnr(stack, stack) + 10
    assert json.loads(Path(weights + ".json").read_text())["info"]["ctf"] is True
    again = tmp_path / "again.mrcs"
    denoised(stack, again, "-m", "cwf", "--ctf", star, "--weights", weights)
    assert (read_mrc(again)[0] == read_mrc(out)[0]).all()
    capsys.readouterr()
    denoised(stack, out, "-m", "gaussian", "--ctf", star)
    assert "gaussian makes no use of the CTF" in capsys.readouterr().err


@pytest.mark.parametrize(("size", "ctf", "snr", "tolerance"), [(32, True, 0.1, 0.03), (33, False, 0.02, 0.05)])
def test_scale_and_offset_are_those_of_the_simulation(size: int, ctf: bool, snr: float, tolerance: float) -> None:
    structure = resolve("channel")
    pixel = structure.pixel_size(size)
    volume = structure.density(size, pixel)[0]
    simulator = Simulator(volume, Simulation(size, pixel, snr, ctf=ctf))
    particles = simulator.simulate(300, 5)
    transfer = simulator.contrast_transfer(particles.defocus)
    images = particles.noisy if ctf else particles.noisy[:, 2:-3]  # rows of background: the centre stays the centre
    scale, offset = image_scale(images, volume, estimate_sigma(images), transfer)
    assert scale == pytest.approx(particles.scale, rel=tolerance)
    contrast = float(particles.clean.std())
    assert offset == pytest.approx(particles.offset, abs=0.02 * contrast if ctf else 0.05 * contrast)
    with pytest.raises(CryobenchError, match="nothing of the structure"):
        image_scale(images, volume, 2 * estimate_sigma(images), transfer)


def test_rows_find_their_images(stack: Path, tmp_path: Path) -> None:
    images = torch.from_numpy(read_mrc(stack)[0])
    table = read_particles(stack.with_suffix(".star"))
    pixel = float(table.pixel_size[0])
    assert table.defocus is not None
    shuffled = table.select(np.random.default_rng(0).permutation(N))
    write_particles(tmp_path / "shuffled.star", shuffled)
    # rows of another stack among them
    other = dataclasses.replace(table, stacks=["other.mrcs"] * N, defocus=table.defocus + 1000)
    fields: dict[str, Any] = {
        f.name: getattr(shuffled, f.name) for f in dataclasses.fields(table) if f.name != "stacks"
    }
    both = {k: v if v is None else np.concatenate([v, getattr(other, k)]) for k, v in fields.items()}
    write_particles(tmp_path / "both.star", ParticleTable(shuffled.stacks + other.stacks, **both))
    for star in (stack.with_suffix(".star"), tmp_path / "shuffled.star", tmp_path / "both.star"):
        ctf = read_ctf(star, stack, images, pixel)
        assert torch.equal(ctf.defocus, torch.from_numpy(table.defocus).float())
        assert ctf.optics == Optics(300.0, 2.7, 0.1, pixel)


def test_the_star_knows_the_pixel_size_where_the_stack_does_not(stack: Path, tmp_path: Path) -> None:
    star, nameless = stack.with_suffix(".star"), tmp_path / "nameless.mrcs"
    header = bytearray(stack.read_bytes())
    header[40:52] = bytes(12)  # sides of the cell
    nameless.write_bytes(header)
    pixel = read_mrc(stack)[1]
    assert read_images(nameless, star=star)[1] == pytest.approx(pixel)
    assert read_images(nameless, 2.5, star)[1] == 2.5
    assert read_images(stack, star=tmp_path / "not needed.star")[1] == pixel
    with pytest.raises(CryobenchError, match="no pixel size"):
        read_images(nameless)
    # a side of exactly 1 A that we did not write is what programs write that know none
    header[40:52] = np.array([32, 32, 32], "<f4").tobytes()
    header[224:1024] = bytes(800)
    nameless.write_bytes(header)
    table = read_particles(star)
    first, other = (dataclasses.replace(table, stacks=[name] * N) for name in ("other.mrcs", "nameless.mrcs"))
    fields = {f.name: getattr(first, f.name) for f in dataclasses.fields(table) if f.name != "stacks"}
    both = {k: v if v is None else np.concatenate([v, v]) for k, v in fields.items()}
    both["pixel_size"][:N] *= 2
    write_particles(tmp_path / "both.star", ParticleTable(first.stacks + other.stacks, **both))
    assert read_images(nameless, star=tmp_path / "both.star")[1] == pytest.approx(pixel)


def test_each_set_of_optics_has_its_own_ctf(stack: Path) -> None:
    table = read_particles(stack.with_suffix(".star"))
    voltage = np.where(np.arange(N) % 3 == 0, 200.0, 300.0)
    assert table.defocus is not None
    groups = contrast_transfers(dataclasses.replace(table, voltage=voltage), "p.star")
    assert sorted(torch.cat([members for members, _ in groups]).tolist()) == list(range(N))
    for members, ctf in groups:
        u, v, angle = torch.from_numpy(table.defocus[members.numpy()]).float().unbind(1)
        optics = Optics(200.0 if members[0] % 3 == 0 else 300.0, 2.7, 0.1, float(table.pixel_size[0]))
        assert torch.equal(ctf.images(32), ctf_2d(u, v, angle, optics, 32).float())


def test_the_long_axis_of_the_defocus_may_come_second(stack: Path) -> None:
    table = read_particles(stack.with_suffix(".star"))
    assert table.defocus is not None
    turned = table.defocus[:, [1, 0, 2]] + [0, 0, 90]
    ((_, ctf),) = contrast_transfers(table, "p.star")
    ((_, same),) = contrast_transfers(dataclasses.replace(table, defocus=turned), "p.star")
    assert torch.isfinite(same.images(32)).all()
    assert torch.allclose(same.images(32), ctf.images(32), atol=1e-4)


def test_what_does_not_fit_is_said_in_one_line(stack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, star = tmp_path / "o.mrcs", tmp_path / "p.star"
    table = read_particles(stack.with_suffix(".star"))
    kept = np.arange(N)
    for changed, said in (
        (table.select(kept[1:]), "15 rows for 15"),
        (table.select(np.append(kept[:-1], 0)), "16 rows for 15"),
        (dataclasses.replace(table, indices=kept + 1), "16 rows for 15"),
        (dataclasses.replace(table, stacks=["a.mrcs"] * 8 + ["b.mrcs"] * 8), "none is"),
        (dataclasses.replace(table, defocus=None), "no defocus"),
        (dataclasses.replace(table, cs=None), "rlnSphericalAberration"),
        (dataclasses.replace(table, phase_shift=np.full(N, 90.0)), "phase plate"),
        (dataclasses.replace(table, voltage=np.where(kept < 3, 200.0, 300.0)), "2 sets of optics"),
        (dataclasses.replace(table, pixel_size=table.pixel_size * 1.1), "--pixel-size"),
    ):
        write_particles(star, changed)
        assert said in failing(capsys, stack, "-m", "cwf", "-o", out, "--ctf", star)
    images, pixel = read_mrc(stack)
    write_mrc(tmp_path / "oblong.mrcs", images[:, 2:], pixel)
    right = stack.with_suffix(".star")
    assert "square" in failing(capsys, tmp_path / "oblong.mrcs", "-m", "cwf", "-o", out, "--ctf", right)
    assert "no_such.star" in failing(capsys, stack, "-m", "cwf", "-o", out, "--ctf", tmp_path / "no_such.star")
    bayes = (stack, "-m", "bayes", "-o", out)
    assert "--reference" in failing(capsys, *bayes, "--train-on", stack)
    assert "--reference" in failing(capsys, *bayes, "--symmetry", "C4")
    assert "symmetry" in failing(capsys, *bayes, "--reference", "channel", "--symmetry", "four")
    assert "chanel" in failing(capsys, *bayes, "--reference", "chanel")
    assert "--reference" in failing(capsys, *bayes, "--reference", "channel", "--weights", tmp_path / "w")
    assert "fit" in failing(capsys, *bayes, "--reference", "channel", "--pixel-size", "2")
    assert "boxes" in failing(capsys, *bayes, "--reference", "channel", "--pixel-size", "60")
    assert "--reference" in failing(capsys, stack, "-m", "bm3d", "-o", out, "--reference", "channel")
    assert "--ctf" in failing(capsys, stack, "-m", "cwf", "-o", out, "--train-on", stack, "--ctf", right)
    assert "exposures" in failing(capsys, stack, "-m", "restore", "-o", out, "--train-on", stack)
    data = bytearray(stack.read_bytes())
    data[2048:2052] = np.float32(np.nan).tobytes()
    (tmp_path / "nan.mrcs").write_bytes(data)
    assert "NaN" in failing(capsys, tmp_path / "nan.mrcs", "-m", "bayes", "-o", out, "--reference", "channel")
    assert not out.exists()


def test_options_reach_the_method(stack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(em3d.Method, "fit", lambda *_: None)
    images, pixel = read_mrc(stack)
    options = {"symmetry": "C3", "shift": 1.0, "contrast": 0.2}
    method, _ = prepare_method("em3d", torch.from_numpy(images), 0.1, pixel, profile="smoke", options=options)
    assert {k: getattr(method.config, k) for k in options} == options
    assert method.config.spacing == 15.0  # the profile's


def test_another_pixel_size_of_a_stack_to_learn_from_is_said(stack: Path, tmp_path: Path) -> None:
    images, pixel = read_mrc(stack)
    write_mrc(tmp_path / "coarse.mrcs", images, 3 * pixel)
    said: list[str] = []
    options = {"profile": "smoke", "say": said.append}
    for path in (stack, tmp_path / "coarse.mrcs"):
        prepare_method("blank", torch.from_numpy(images), 0.1, pixel, train_on=[str(path)], **options)
    assert len(said) == 1
    assert f"coarse.mrcs says {3 * pixel:g} A pixels" in said[0]
