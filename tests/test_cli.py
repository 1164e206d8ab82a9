"""The command line as a user meets it: what it writes, what it says, and its exit codes."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from cryobench.cli import main
from cryobench.imaging.particles import Simulation
from cryobench.specimens.mrc import read_mrc, write_mrc
from cryobench.specimens.particle_star import read_particles, write_particles


def simulate(folder, *extra, n=12):
    path = folder / "p.mrcs"
    assert main(["simulate", "channel", "-o", str(path), "-n", str(n), "--size", "33", *extra]) == 0
    return path


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    return simulate(tmp_path_factory.mktemp("stack"), "--ctf", "--shift", "2")


def failing(capsys, *arguments):
    """The one line that a failing command says."""
    assert main([str(a) for a in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("cryobench: ")
    assert captured.err.count("\n") == 1, captured.err
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize("what", ["methods", "tables", "specimens", "profiles"])
def test_list_as_json_and_text(what, capsys):
    assert main(["list", what, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert all(r["name"] for r in rows)
    assert main(["list", what]) == 0
    text = capsys.readouterr().out
    assert all(r["name"] in text for r in rows)
    if what == "methods":
        assert {"noisy", "bm3d", "ksvd", "dncnn"} <= {r["name"] for r in rows}
        assert all(r["supervision"] for r in rows)


def test_simulate_writes_the_stack_the_truth_and_a_star_file(stack):
    noisy, pixel = read_mrc(stack)
    clean, _ = read_mrc(stack.with_name("p_clean.mrcs"))
    facts = json.loads(stack.with_suffix(".json").read_text())
    table = read_particles(stack.with_suffix(".star"))
    assert noisy.shape == clean.shape == (12, 33, 33)
    assert clean.min() == 0
    assert clean.max() == 1
    noise = noisy - clean
    assert noise.std() == pytest.approx(facts["sigma"], rel=0.03)
    assert clean.var() / facts["sigma"] ** 2 == pytest.approx(0.1, rel=1e-4)
    assert len(table) == 12
    assert table.defocus is not None
    assert np.abs(table.shifts).max() <= 2 * pixel + 1e-6
    assert table.pixel_size[0] == pytest.approx(pixel)


def test_the_same_seed_gives_the_same_files(stack, tmp_path):
    again = simulate(tmp_path, "--ctf", "--shift", "2")
    assert (read_mrc(stack)[0] == read_mrc(again)[0]).all()
    other = tmp_path / "other.mrcs"
    assert main(["simulate", "channel", "-o", str(other), "-n", "12", "--size", "33", "--seed", "1"]) == 0
    assert not (read_mrc(other)[0] == read_mrc(again)[0]).all()


def test_denoise_keeps_shape_and_pixel_size_and_evaluate_scores_it(stack, tmp_path, capsys):
    out = tmp_path / "d.mrcs"
    assert main(["denoise", str(stack), "-m", "gaussian", "-o", str(out)]) == 0
    denoised, pixel = read_mrc(out)
    noisy, pixel_in = read_mrc(stack)
    assert denoised.shape == noisy.shape
    assert denoised.dtype == np.float32
    assert pixel == pixel_in
    capsys.readouterr()
    arguments = ["evaluate", str(out), "--clean", str(stack.with_name("p_clean.mrcs")), "--noisy", str(stack), "--json"]
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["denoised"]["metrics"]["mse"]["mean"] < result["noisy"]["metrics"]["mse"]["mean"] / 2
    assert main(arguments[:-1]) == 0
    assert "psnr" in capsys.readouterr().out


def test_a_micrograph_of_any_size_is_one_image(tmp_path):
    rng = np.random.default_rng(0)
    write_mrc(tmp_path / "m.mrc", rng.standard_normal((201, 310)).astype(np.float32), 1.5, stack=False)
    assert main(["denoise", str(tmp_path / "m.mrc"), "-m", "lowpass", "-o", str(tmp_path / "o.mrc")]) == 0
    assert read_mrc(tmp_path / "o.mrc")[0].shape[-2:] == (201, 310)


def test_bad_input_gives_one_line_exit_1_and_no_output(stack, tmp_path, capsys):
    out = tmp_path / "o.mrcs"
    broken = tmp_path / "broken.mrcs"
    broken.write_bytes(stack.read_bytes()[:-100])
    nan = tmp_path / "nan.mrcs"
    data = bytearray(stack.read_bytes())
    data[2048:2052] = np.float32(np.nan).tobytes()
    nan.write_bytes(data)
    assert "broken.mrcs" in failing(capsys, "denoise", broken, "-m", "mean", "-o", out)
    assert "NaN" in failing(capsys, "denoise", nan, "-m", "mean", "-o", out)
    assert "no_such" in failing(capsys, "denoise", tmp_path / "no_such.mrcs", "-m", "mean", "-o", out)
    assert "bm3d" in failing(capsys, "denoise", stack, "-m", "bm4d", "-o", out)
    assert ".mrcs" in failing(capsys, "denoise", stack, "-m", "mean", "-o", tmp_path / "o.png")
    assert "folder" in failing(capsys, "denoise", stack, "-m", "mean", "-o", tmp_path / "no" / "o.mrcs")
    assert "--sigma" in failing(capsys, "denoise", stack, "-m", "mean", "-o", out, "--sigma", "-1")
    alone = tmp_path / "alone.mrcs"
    alone.write_bytes(stack.read_bytes())
    assert "_clean" in failing(capsys, "denoise", stack, "-m", "dncnn", "-o", out, "--train-on", alone)
    assert "channel" in failing(capsys, "simulate", "chanel", "-o", out)
    assert "SNR" in failing(capsys, "simulate", "channel", "-o", out, "--snr", "0", "--size", "33")
    assert "--shift" in failing(capsys, "simulate", "channel", "-o", out, "--shift", "-2")
    assert "--bfactor" in failing(capsys, "simulate", "channel", "-o", out, "--bfactor", "nan")
    write_mrc(tmp_path / "map.mrc", np.eye(9, dtype=np.float32)[None].repeat(9, 0), 2.0, stack=False)
    assert "is a map" in failing(capsys, "denoise", tmp_path / "map.mrc", "-m", "mean", "-o", out)
    assert "learns nothing" in failing(capsys, "denoise", stack, "-m", "mean", "-o", out, "--train-on", stack)
    for command in ("run", "status"):
        assert "chanel" in failing(capsys, command, "zhang2024", "--specimen", "chanel", "--results", out)
    assert "8" in failing(capsys, "simulate", "channel", "-o", out, "--size", "4")
    assert "(2, 5, 7)" in failing(capsys, "evaluate", stack, "--clean", write_small(tmp_path))
    assert "zhang2024" in failing(capsys, "run", "nature2030")
    assert "turbo" in failing(capsys, "run", "zhang2024", "--profile", "turbo")
    assert "EMD" in failing(capsys, "fetch", "EMD-99999999", "--data-dir", tmp_path)
    assert not out.exists()
    assert not list(tmp_path.glob("o*"))


def test_no_input_is_replaced(stack, tmp_path, capsys):
    images, pixel = read_mrc(stack)
    mine = tmp_path / "mine.mrcs"
    for path in (mine, tmp_path / "mine_clean.mrcs"):
        write_mrc(path, images, pixel)
    volume = tmp_path / "map.mrc"
    write_mrc(volume, np.zeros((16, 16, 16), np.float32) + images[0, :16, :16], pixel, stack=False)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for command in (
        ["denoise", mine, "-m", "mean", "-o", mine],
        ["denoise", stack, "-m", "dncnn", "--train-on", mine, "-o", tmp_path / "mine_clean.mrcs"],
        ["denoise", mine, "-m", "bayes", "--reference", volume, "-o", volume],
        ["simulate", volume, "-o", volume, "-n", "1", "--size", "32"],
    ):
        assert "replace" in failing(capsys, *command)
    star = tmp_path / "p.star"
    table = read_particles(stack.with_suffix(".star"))
    write_particles(star, dataclasses.replace(table, stacks=[str(mine)] * len(table)))
    here = tmp_path / "mine.mrc"
    mine.rename(here)
    write_particles(star, dataclasses.replace(table, stacks=[str(here)] * len(table)))
    assert "replace" in failing(capsys, "reconstruct", star, "-o", here)
    assert here.read_bytes() == before.pop(mine)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_the_units_of_the_images_do_not_count(stack, tmp_path, capsys):
    scores = []
    for gain in (1.0, 0.01):
        paths = [tmp_path / name for name in ("noisy.mrcs", "clean.mrcs")]
        for path, source in zip(paths, (stack, stack.with_name("p_clean.mrcs")), strict=True):
            images, pixel = read_mrc(source)
            write_mrc(path, (gain * images).astype(np.float32), pixel)
        assert main(["evaluate", str(paths[0]), "--clean", str(paths[1]), "--json"]) == 0
        scores.append(json.loads(capsys.readouterr().out)["denoised"]["metrics"])
    # rescaled by its own range and not that of the whole simulation
    images = read_mrc(stack.with_name("p_clean.mrcs"))[0]
    assert scores[1]["mse"]["mean"] == pytest.approx(scores[0]["mse"]["mean"] / np.ptp(images) ** 2, rel=1e-3)


def test_an_agreement_without_end_is_said_to_be_one(stack, capsys):
    clean = str(stack.with_name("p_clean.mrcs"))
    assert main(["evaluate", clean, "--clean", clean]) == 0
    assert "nowhere up to Nyquist" in capsys.readouterr().out


def test_dark_particles_are_noticed(tmp_path, capsys):
    bright = simulate(tmp_path, "--snr", "1", n=24)
    images, pixel = read_mrc(bright)
    write_mrc(tmp_path / "dark.mrcs", -images, pixel)
    for name, dark in (("p", False), ("dark", True)):
        capsys.readouterr()
        command = ["denoise", str(tmp_path / f"{name}.mrcs"), "-m", "bayes", "--reference", "channel"]
        assert main([*command, "--profile", "smoke", "-o", str(tmp_path / "o.mrcs")]) == 0
        assert ("look dark" in capsys.readouterr().err) == dark


def write_small(folder):
    write_mrc(folder / "small.mrcs", np.ones((2, 5, 7), np.float32) * [[[0], [1], [0], [1], [0]]], 2.0)
    return folder / "small.mrcs"


def test_a_doubtful_pixel_size_is_said_in_one_line(tmp_path):
    path = tmp_path / "one.mrcs"
    write_mrc(path, np.random.default_rng(0).standard_normal((2, 16, 16)).astype(np.float32), 1.0)
    data = bytearray(path.read_bytes())
    data[220:1024] = bytes(804)  # no label: nothing says that somebody meant it
    path.write_bytes(data)
    command = [sys.executable, "-m", "cryobench", "denoise", str(path), "-m", "mean", "-o", str(tmp_path / "o.mrcs")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    lines = done.stderr.splitlines()
    assert sum("pixel size" in line for line in lines) == 1
    assert not any(".py:" in line for line in lines)


def test_wrong_usage_is_exit_code_2(capsys):
    for arguments in ([], ["denoise"], ["simulate", "channel", "-o", "x.mrcs", "-n", "many"], ["frobnicate"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    capsys.readouterr()


def test_python_m_is_the_same_and_importing_is_quick_and_clean(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "cryobench", "--version"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0
    assert done.stdout.startswith("cryobench ")
    code = (
        "import sys, time, os; t = time.process_time(); hook = sys.excepthook; import cryobench, cryobench.cli; "
        "assert time.process_time() - t < 0.5; assert sys.excepthook is hook; assert 'torch' not in sys.modules; "
        "assert os.listdir('.') == []"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_a_traceback_only_with_debug(tmp_path):
    with pytest.raises(Exception, match="chanel"):
        main(["simulate", "chanel", "-o", str(tmp_path / "o.mrcs"), "--debug"])


def test_simulations_refuse_nonsense():
    with pytest.raises(Exception, match="positive"):
        Simulation(32, -1.0)


def test_weights_are_saved_and_used_again(stack, tmp_path):
    first, second = tmp_path / "a.mrcs", tmp_path / "b.mrcs"
    common = ["denoise", str(stack), "-m", "dncnn", "--profile", "smoke"]
    weights = str(tmp_path / "w")
    even = tmp_path / "even.mrcs"
    assert main(["simulate", "channel", "-o", str(even), "-n", "40", "--size", "32"]) == 0
    assert main([*common, "-o", str(first), "--train-on", str(even), "--save-weights", weights]) == 0
    assert main([*common, "-o", str(second), "--weights", weights]) == 0
    assert (read_mrc(first)[0] == read_mrc(second)[0]).all()


def test_a_method_that_learns_from_noisy_images_uses_the_input(stack, tmp_path):
    out = tmp_path / "k.mrcs"
    assert main(["denoise", str(stack), "-m", "ksvd", "-o", str(out), "--profile", "smoke"]) == 0
    assert read_mrc(out)[0].shape == (12, 33, 33)


def test_reconstruct_and_fsc_find_the_structure_again(tmp_path, capsys):
    path = tmp_path / "s.mrcs"
    assert main(["simulate", "channel", "-o", str(path), "-n", "300", "--size", "32", "--ctf"]) == 0
    star = str(tmp_path / "s_clean.star")
    assert main(["reconstruct", star, "-o", str(tmp_path / "m.mrc"), "--symmetry", "C4"]) == 0
    capsys.readouterr()
    halves = sorted(str(p) for p in tmp_path.glob("m*half*.mrc"))
    assert len(halves) == 2
    assert main(["fsc", *halves, "--json"]) == 0
    curve = json.loads(capsys.readouterr().out)["fsc"]
    assert min(curve[1:10]) > 0.95
