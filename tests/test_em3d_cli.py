"""What `cryobench denoise -m em3d` writes besides the images, what it says, and that a killed one goes on."""

import contextlib
import io
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cryobench.specimens.mrc
from cryobench.cli import main
from cryobench.errors import CryobenchError
from cryobench.imaging.ctf import ContrastTransfer, Optics
from cryobench.imaging.rotations import euler_to_matrix, random_rotations
from cryobench.methods import em3d
from cryobench.methods.apply import best_poses
from cryobench.methods.em_fit import Fit
from cryobench.methods.em_poses import Modes
from cryobench.methods.training import _Fit
from cryobench.reconstruction.em3d_files import summary, write_poses
from cryobench.reconstruction.fsc import fsc
from cryobench.specimens.maps import read_map
from cryobench.specimens.mrc import read_mrc, write_mrc
from cryobench.specimens.particle_star import find_stack, read_particles

N = 100
SMOKE = ("--profile", "smoke", "--device", "cpu")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of their own: nobody else's checkpoints."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("CRYOBENCH_CACHE", str(folder))
        yield folder


@dataclass(frozen=True)
class Done:
    """folder: where the commands ran; said: stderr of denoise."""

    folder: Path
    said: list[str]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Particles off-centre, with a CTF and a symmetry, named from the folder where the commands run."""
    folder = tmp_path_factory.mktemp("em3d")
    (folder / "in").mkdir()
    (folder / "out").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        simulated = ["simulate", "channel", "-o", "in/p.mrcs", "-n", str(N), "--size", "32", "--snr", "1"]
        assert main([*simulated, "--ctf", "--shift", "1", "--seed", "1"]) == 0
        images, pixel = read_mrc("in/p.mrcs")  # on a background of 0, as RELION has them: reconstruct expects it
        write_mrc("in/p.mrcs", images - images[:, 0].mean(), pixel)
        command = ["denoise", "in/p.mrcs", "-m", "em3d", "-o", "out/d.mrcs", "--map", "out/m.mrc", "--star"]
        command += ["out/p.star", "--ctf", "in/p.star", "--symmetry", "C4", "--shift", "1", *SMOKE]
        out, said = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
            assert main(command) == 0
    assert out.getvalue().split() == ["out/d.mrcs", "out/m.mrc", "out/m_half1.mrc", "out/m_half2.mrc", "out/p.star"]
    return Done(folder, said.getvalue().splitlines())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stack that is fitted in a second or two."""
    path = tmp_path_factory.mktemp("small") / "s.mrcs"
    assert main(["simulate", "channel", "-o", str(path), "-n", "16", "--size", "24", "--snr", "1"]) == 0
    return path


def failing(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a failing denoise says."""
    capsys.readouterr()
    assert main(["denoise", *map(str, arguments)]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1, said
    assert said[0].startswith("cryobench: ")
    return said[0]


def test_the_map_and_its_halves_have_the_grid_of_the_images(done: Done) -> None:
    images, pixel = read_mrc(done.folder / "in/p.mrcs")
    denoised, same = read_mrc(done.folder / "out/d.mrcs")
    assert denoised.shape == images.shape
    assert same == pixel
    whole, *halves = (read_map(done.folder / "out" / f"m{end}.mrc") for end in ("", "_half1", "_half2"))
    for volume, its_pixel in (whole, *halves):
        assert volume.shape == (32, 32, 32)
        assert its_pixel == pytest.approx(pixel, rel=1e-5)
    # the halves are not the map, but show the same
    assert not any(torch.equal(a[0], b[0]) for a, b in ((whole, halves[0]), (whole, halves[1]), halves))
    assert all(fsc(whole[0], half)[1:8].min() > 0.9 for half, _ in halves)


def test_the_star_has_the_images_with_their_poses_their_half_and_the_optics(done: Done) -> None:
    table, known = read_particles(done.folder / "out/p.star"), read_particles(done.folder / "in/p.star")
    assert table.stacks == ["in/p.mrcs"] * N  # as seen from where the command ran
    assert table.indices.tolist() == list(range(N))
    assert table.angles is not None
    assert table.shifts is not None
    assert table.subset is not None
    assert known.shifts is not None
    assert np.bincount(table.subset).tolist() == [0, N // 2, N // 2]
    for name in ("pixel_size", "voltage", "cs", "amplitude_contrast", "image_size", "defocus"):
        assert getattr(table, name) == pytest.approx(getattr(known, name), abs=0.01), name
    # RELION's sign, angstrom: the shifts of the simulation are found again
    for k in (0, 1):
        assert np.corrcoef(table.shifts[:, k], known.shifts[:, k])[0, 1] > 0.7
        assert table.shifts[:, k].std() == pytest.approx(known.shifts[:, k].std(), rel=0.4)


def test_reconstruct_makes_the_map_of_the_star(done: Done, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(done.folder)
    assert main(["reconstruct", "out/p.star", "-o", "out/again.mrc", "--symmetry", "C4"]) == 0
    again, found = read_map("out/again.mrc")[0], read_map("out/m.mrc")[0]
    assert fsc(again, found)[1:8].min() > 0.95
    for k in (1, 2):  # the halves of the file are those of the fit
        own, other = (fsc(read_map(f"out/again_half{k}.mrc")[0], read_map(f"out/m_half{i}.mrc")[0]) for i in (k, 3 - k))
        assert own[5:10].mean() > other[5:10].mean()


@pytest.mark.peers
@pytest.mark.skipif(shutil.which("relion_reconstruct") is None, reason="RELION is not installed")
@pytest.mark.parametrize("ctf", [True, False])
def test_relion_reads_the_star(done: Done, ctf: bool) -> None:
    star = "out/p.star"
    if not ctf:  # RELION wants optics of everything; nobody told us any
        star, table = "out/bare.star", read_particles(done.folder / star)
        assert table.angles is not None
        assert table.shifts is not None
        rotations, shifts = euler_to_matrix(torch.from_numpy(table.angles)), -table.shifts / table.pixel_size[:, None]
        subset = torch.from_numpy(table.subset)
        write_poses(
            done.folder / star, "in/p.mrcs", rotations, torch.from_numpy(shifts), subset, 32, table.pixel_size[0]
        )
    command = ["relion_reconstruct", "--i", star, "--o", "out/relion.mrc", "--sym", "C4", *(["--ctf"] if ctf else [])]
    run = subprocess.run(command, cwd=done.folder, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    correlation = fsc(read_map(done.folder / "out/relion.mrc")[0], read_map(done.folder / "out/m.mrc")[0])
    assert correlation[1:8].min() > (0.95 if ctf else 0.5)


def test_the_summary_says_how_good_the_map_is(done: Done) -> None:
    (line,) = [line for line in done.said if "FSC 0.143" in line]
    reached = float(line.split("agree to ")[1].split(" A")[0])
    pixel = read_mrc(done.folder / "in/p.mrcs")[1]
    assert 2 * pixel <= reached < 4.5 * pixel
    for word in ("views", "junk", "empty"):
        assert word in line
    assert not any("no common structure" in line for line in done.said)


def facts(curve: list[float], reach: int, start: float = 0.99) -> dict[str, Any]:
    classes = {"view": 0.5, "junk": 0.3, "empty": 0.2}
    common = {"classes": classes, "pixel_size": 2.0, "size": 8}
    return {"fsc": curve, "reach": reach, "start_correlation": start, **common}


def test_halves_that_do_not_agree_are_a_warning() -> None:
    agree = summary(facts([1.0, 0.99, 0.9, 0.8, 0.5], 4))
    assert len(agree) == 1
    assert "agree to 4.00 A" in agree[0]
    assert "50 % views, 30 % junk, 20 % empty" in agree[0]
    for curve, reach, start in (
        ([1.0, 0.0, 0.1, 0.0, 0.0], 0, 0.9),
        ([1.0, 0.9, 0.8, 0.1, 0.0], 2, 0.9),
        ([1.0, 0.9, 0.9, 0.6, 0.4], 4, 0.5),
    ):
        said = summary(facts(curve, reach, start))
        assert "there may be no common structure" in said[-1]
        assert len(said) == 2


def test_pure_noise_is_told_and_shrunk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise = np.random.default_rng(2).standard_normal((60, 24, 24)).astype(np.float32)
    write_mrc(tmp_path / "n.mrcs", noise, 2.0)
    assert main(["denoise", str(tmp_path / "n.mrcs"), "-m", "em3d", "-o", str(tmp_path / "d.mrcs"), *SMOKE]) == 0
    assert "no common structure" in capsys.readouterr().err
    assert read_mrc(tmp_path / "d.mrcs")[0].std() < 0.1


def test_the_likeliest_pose_of_each_image_is_taken() -> None:
    rotations, shifts = random_rotations(4, torch.Generator().manual_seed(0)), torch.arange(8.0).view(4, 2)
    spread = torch.eye(3).expand(4, 3, 3) * torch.tensor([1.0, 1.0, 1.0, 9.0])[:, None, None]
    # of image 1 the third has the highest score, but the fourth, far wider, the evidence
    modes = Modes(torch.tensor([1, 0, 1, 1]), rotations, shifts, torch.tensor([0.0, -9.0, 5.0, 4.0]), spread)
    method = em3d.Method()
    method.state = {"volume": torch.zeros(4, 4, 4), **{f"poses.{name}": x for name, x in vars(modes).items()}}
    method.state["subset"] = torch.tensor([2, 1])
    found, moved, subset = best_poses(method)
    assert torch.equal(found, rotations[[1, 3]])
    assert torch.equal(moved, shifts[[1, 3]])
    assert subset.tolist() == [2, 1]
    method.state["subset"] = torch.tensor([2, 1, 1])
    with pytest.raises(CryobenchError, match="without a pose"):
        best_poses(method)


def test_defocus_and_optics_without_loss(tmp_path: Path) -> None:
    defocus = torch.tensor([[15000.25, 14000.5, 30.0], [9000.0, 8000.0, 120.0]])
    ctf = ContrastTransfer(Optics(200.0, 1.4, 0.07, 2.0), defocus)
    rotations, shifts = random_rotations(2, torch.Generator().manual_seed(0)), torch.tensor([[1.0, -2.0], [0.0, 0.5]])
    write_poses(tmp_path / "p.star", "a b.mrcs", rotations, shifts, torch.tensor([2, 1]), 16, 2.0, ctf)
    table = read_particles(tmp_path / "p.star")
    assert table.angles is not None
    assert table.shifts is not None
    assert torch.allclose(euler_to_matrix(torch.from_numpy(table.angles)).float(), rotations, atol=1e-5)
    assert table.shifts.tolist() == [[-2.0, 4.0], [0.0, -1.0]]
    assert table.defocus is not None
    assert table.defocus.tolist() == defocus.tolist()
    assert (table.voltage[0], table.cs[0], table.amplitude_contrast[0]) == (200.0, 1.4, 0.07)  # type: ignore[index]
    assert table.subset is not None
    assert table.subset.tolist() == [2, 1]
    write_mrc(tmp_path / "a b.mrcs", np.zeros((2, 16, 16), np.float32) + [[[0.0]], [[1.0]]], 2.0)
    assert find_stack(table.stacks[0], tmp_path / "p.star") == tmp_path / "a b.mrcs"


def test_refusals_are_one_line(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, star, volume, weights = (tmp_path / name for name in ("o.mrcs", "o.star", "o.mrc", "w"))
    common = (small, "-o", out, *SMOKE)
    em3d, other = (*common, "-m", "em3d"), (*common, "-m", "gaussian")
    assert "em3d" in failing(capsys, *other, "--map", volume)
    assert "em3d" in failing(capsys, *other, "--star", star)
    assert "--weights" in failing(capsys, *em3d, "--star", star, "--weights", weights)
    assert "--train-on" in failing(capsys, *em3d, "--star", star, "--train-on", small)
    assert ".star" in failing(capsys, *em3d, "--star", tmp_path / "o.txt")
    assert ".mrc" in failing(capsys, *em3d, "--map", tmp_path / "o.mrcs")
    assert "folder" in failing(capsys, *em3d, "--map", tmp_path / "no" / "o.mrc")
    both = (small, "-o", tmp_path / "same.mrc", *SMOKE, "-m", "em3d")
    assert "same.mrc would replace" in failing(capsys, *both, "--map", tmp_path / "same.mrc")
    known = small.with_suffix(".star")
    assert "s.star would replace" in failing(capsys, *em3d, "--star", known, "--ctf", known)
    assert known.exists()
    assert "gaussian takes no --shift" in failing(capsys, *other, "--shift", "1")
    assert "gaussian takes no --contrast" in failing(capsys, *other, "--contrast", "0.1")
    assert "--reference" in failing(capsys, *other, "--symmetry", "C4")
    assert "--weights" in failing(capsys, *em3d, "--symmetry", "C4", "--weights", weights)
    assert "--shift" in failing(capsys, *em3d, "--shift", "-1")
    assert "--contrast" in failing(capsys, *em3d, "--contrast", "inf")
    assert "symmetry" in failing(capsys, *em3d, "--symmetry", "four")
    assert "--reference" in failing(capsys, *em3d, "--symmetry", "C4", "--reference", "channel")
    assert not list(tmp_path.glob("o*"))


def test_weights_hold_the_map_and_its_settings(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, again, weights = tmp_path / "a.mrcs", tmp_path / "b.mrcs", str(tmp_path / "w")
    common = ["denoise", str(small), "-m", "em3d", *SMOKE, "--map"]
    settings = ["--symmetry", "C2", "--contrast", "0.1", "--save-weights", weights]
    assert main([*common, str(tmp_path / "a.mrc"), "-o", str(first), *settings]) == 0
    assert "FSC 0.143" in capsys.readouterr().err
    assert main([*common, str(tmp_path / "b.mrc"), "-o", str(again), "--weights", weights]) == 0
    assert "FSC 0.143" in capsys.readouterr().err
    failing(capsys, small, *common[2:], tmp_path / "b.mrc", "-o", again, "--weights", weights, "--pixel-size", "9")
    for name in ("", "_half1", "_half2"):
        assert (tmp_path / f"a{name}.mrc").read_bytes() == (tmp_path / f"b{name}.mrc").read_bytes()
    assert (read_mrc(first)[0] == read_mrc(again)[0]).all()


def checkpoints(cache: Path) -> list[Path]:
    return sorted(cache.glob("denoise/*.pt"))


def test_a_killed_fit_goes_on(
    small: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, out = tmp_path / "whole.mrcs", tmp_path / "o.mrcs"
    command = ["denoise", str(small), "-m", "em3d", *SMOKE, "-o"]
    assert main([*command, str(whole)]) == 0
    assert not checkpoints(cache)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Fit, "_refine", stop)
    assert main([*command, str(out)]) == 1
    kept = checkpoints(cache)
    assert len(kept) == 1
    assert not out.exists()
    # another input, another setting: neither goes on from it
    images, pixel = read_mrc(small)
    write_mrc(tmp_path / "other.mrcs", images[::-1].copy(), pixel)
    assert main(["denoise", str(tmp_path / "other.mrcs"), "-m", "em3d", *SMOKE, "-o", str(out)]) == 1
    assert main([*command, str(out), "--seed", "1"]) == 1
    assert "going on" not in capsys.readouterr().err
    assert len(checkpoints(cache)) == 3
    monkeypatch.undo()
    monkeypatch.setenv("CRYOBENCH_CACHE", str(cache))

    def never(*_: object) -> None:
        raise AssertionError("made the first volumes again")

    monkeypatch.setattr(Fit, "_first_volumes", never)
    assert main([*command, str(out)]) == 0
    assert str(kept[0]) in capsys.readouterr().err
    assert out.read_bytes() == whole.read_bytes()
    assert kept[0] not in checkpoints(cache)
    for left in checkpoints(cache):
        left.unlink()


@pytest.mark.parametrize("method", ["em3d", "restore"])
def test_a_fit_is_kept_until_its_images_are_written(
    method: str, small: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["denoise", str(small), "-m", method, *SMOKE, "-o", str(tmp_path / "o.mrcs")]
    assert main(command) == 0
    undisturbed = read_mrc(tmp_path / "o.mrcs")[0]
    with monkeypatch.context() as patch:

        def full(*_: object, **__: object) -> None:
            raise CryobenchError("the disk is full")

        patch.setattr(cryobench.specimens.mrc, "write_mrc", full)
        assert main(command) == 1
    assert len(checkpoints(cache)) == 1

    def never(*_: object) -> None:
        raise AssertionError("learnt again")

    monkeypatch.setattr(*((Fit, "_first_volumes") if method == "em3d" else (_Fit, "_step")), never)
    assert main(command) == 0
    assert not checkpoints(cache)
    assert np.allclose(read_mrc(tmp_path / "o.mrcs")[0], undisturbed, atol=1e-4 * float(np.abs(undisturbed).max()))


def test_a_cache_that_cannot_be_written_is_no_reason_to_fail(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CRYOBENCH_CACHE", str(tmp_path / "file"))
    out = tmp_path / "o.mrcs"
    assert main(["denoise", str(small), "-m", "em3d", *SMOKE, "-o", str(out)]) == 0
    assert "CRYOBENCH_CACHE" in capsys.readouterr().err
    assert out.exists()
