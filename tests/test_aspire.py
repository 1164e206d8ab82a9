"""CWF as a whole against ASPIRE: the same images, several times faster, in less memory."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cwf import error, learn, normal, simulator

from cryobench.imaging.ctf import ContrastTransfer
from cryobench.methods import cwf

PEER = Path(__file__).with_name("aspire_peer.py")


def by_aspire(folder, stacks, basis="ffb"):
    """Results of ASPIRE for stacks (images, sigma, pixel size, ctf): dictionaries of arrays."""
    pytest.importorskip("finufft", reason="the peer package aspire is not installed")
    names = [f"{i}.npz" for i in range(len(stacks))]
    for name, (images, sigma, pixel_size, ctf) in zip(names, stacks, strict=True):
        given = {"images": images.numpy(), "variance": sigma**2, "basis": basis, "pixel_size": pixel_size}
        if ctf is not None:
            defocus, group = ctf.defocus[:, 0].unique(return_inverse=True)
            optics = {"voltage": ctf.optics.voltage_kv, "cs": ctf.optics.cs_mm}
            given |= {"defocus": defocus.numpy(), "group": group.numpy(), **optics}
            given["contrast"] = ctf.optics.amplitude_contrast
        np.savez(folder / name, **given)
    done = subprocess.run([sys.executable, str(PEER), *names], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [dict(np.load(folder / f"{name}.out.npz")) for name in names]


def grouped(size, n, snr, with_ctf):
    """Images in seven defocus groups without astigmatism, the truth before the CTF, sigma, pixel size and CTF.

    Each image is in the middle of a group of ours, so that both sides filter with the same CTF.
    """
    sim = simulator(size)
    truth, *_ = sim.draw(n, seed=1)
    truth = truth / truth.std()
    ctf, seen = None, truth
    if with_ctf:
        optics = replace(sim.simulation.optics, cs_mm=2.0)
        step = cwf.TURN / (optics.wavelength * (0.5 / optics.pixel_size) ** 2)
        defocus = 17500 + round(2500 / step) * step * (torch.arange(n) % 7 - 3)
        ctf = ContrastTransfer(optics, defocus[:, None] * torch.tensor([1.0, 1.0, 0.0]))
        seen = torch.fft.irfft2(torch.fft.rfft2(truth) * ctf.images(size), s=(size, size))
    sigma = float(seen.std()) / snr**0.5
    return seen + sigma * normal(n, size, size), truth, sigma, sim.simulation.pixel_size, ctf


CASES = [(size, snr, ctf) for size in (33, 48) for snr in (0.05, 0.3) for ctf in (False, True)]


@pytest.mark.peers
def test_the_same_as_aspire(tmp_path):
    """ASPIRE takes the noise for white, empty space for 0, and an image for one sample of every block."""
    stacks, results = [], []
    for case in CASES:
        noisy, truth, sigma, pixel, ctf = grouped(case[0], 300, *case[1:])
        method = learn(noisy, sigma, ctf, pixel, whiten=False, samples=1)
        out = method.denoise(noisy, sigma) if ctf is None else method.restore(noisy, sigma, ctf)
        default = learn(noisy, sigma, ctf, pixel)
        out_default = default.denoise(noisy, sigma) if ctf is None else default.restore(noisy, sigma, ctf)
        background = method.state["background"]
        stacks.append((noisy - background, sigma, pixel, ctf))
        results.append((out - background, error(out, truth), error(out_default, truth), truth))
    peers = by_aspire(tmp_path, stacks)
    for case, peer, (out, ours, default, truth) in zip(CASES, peers, results, strict=True):
        theirs = torch.from_numpy(peer["images"])
        assert error(out, theirs) < 0.002, case
        assert ours == pytest.approx(error(theirs, truth), rel=0.02), case
        assert default < 1.02 * error(theirs, truth), case


MEASURE = """
import json, resource, sys, time
import numpy as np, torch
from cryobench.imaging.training_data import TrainingData
from cryobench.methods.base import Budget
from cryobench.methods.cwf import Method
torch.set_num_threads(2)
given = np.load(sys.argv[1])
images, sigma = torch.from_numpy(given["images"]), float(given["variance"]) ** 0.5
begin = time.perf_counter()
method = Method()
method.fit(TrainingData("noisy", images, None, sigma, 1.0), Budget(progress=False))
out = method.denoise(images, sigma)
seconds = time.perf_counter() - begin
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
np.savez(sys.argv[1] + ".ours.npz", images=out.numpy(), seconds=seconds, peak=peak)
"""


@pytest.mark.slow
@pytest.mark.peers
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("size", [64, 128])
def test_five_times_faster_than_aspire_in_less_memory(tmp_path, size):
    """5,000 images without CTF, each side in its own process, one after the other on the same two cores."""
    noisy, truth, sigma, pixel, _ = grouped(size, 5000, 0.1, False)
    peer = by_aspire(tmp_path, [(noisy, sigma, pixel, None)])[0]
    subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path / "0.npz")], check=True)
    ours = np.load(tmp_path / "0.npz.ours.npz")
    errors = [error(torch.from_numpy(run["images"]), truth) for run in (ours, peer)]
    for name, run, wrong in zip(("cwf", "ASPIRE"), (ours, peer), errors, strict=True):
        print(f"\n{size} px, {name}: {run['seconds']:.1f} s, {run['peak']:.0f} MB, relative error {wrong:.4f}")
    assert peer["seconds"] > 5 * ours["seconds"]
    assert ours["peak"] < 1500
    assert errors[0] < 1.005 * errors[1]
