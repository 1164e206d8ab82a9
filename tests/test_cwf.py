"""CWF: its parts against closed forms and known covariances, and what may go wrong. See also test_aspire.py."""

import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from cryobench.errors import CryobenchError
from cryobench.imaging.ctf import ContrastTransfer, Optics, ctf_1d
from cryobench.imaging.noise import coloured_noise, ice_spectrum
from cryobench.imaging.particles import Particles, Simulation, Simulator
from cryobench.imaging.steerable import SteerableBasis
from cryobench.imaging.training_data import TrainingData
from cryobench.methods import cwf
from cryobench.methods.base import Budget
from cryobench.methods.covariance import Moments, conjugate_gradients, shrink
from cryobench.methods.cwf import Config, Method
from cryobench.methods.noise_spectrum import radial_noise_power

QUIET = Budget(progress=False)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def simulator(size, **settings):
    """Seven blobs without symmetry in a box of 200 A."""
    generator = torch.Generator().manual_seed(3)
    grid = (torch.arange(size) - size // 2) / size
    z, y, x = torch.meshgrid(grid, grid, grid, indexing="ij")
    volume = torch.zeros(size, size, size)
    for place in torch.rand(7, 3, generator=generator) * 0.5 - 0.25:
        width = 0.03 + 0.04 * float(torch.rand(1, generator=generator))
        squared = (z - place[0]) ** 2 + (y - place[1]) ** 2 + (x - place[2]) ** 2
        volume += torch.exp(-squared / (2 * width**2))
    return Simulator(volume, Simulation(size, 200 / size, **settings))


@cache
def particles(size: int, n: int, **settings: object) -> tuple[Particles, ContrastTransfer | None]:
    """Simulated images whose empty space is 0, and their CTF."""
    sim = simulator(size, **settings)
    part = sim.simulate(n, seed=0)
    part = replace(part, clean=part.clean - part.offset, noisy=part.noisy - part.offset, offset=0.0)
    return part, sim.contrast_transfer(part.defocus)


def learn(images, sigma, ctf=None, pixel_size=1.0, **options):
    method = Method(Config(**options))
    method.fit(TrainingData("noisy", images, None, sigma, pixel_size, ctf=ctf), QUIET)
    return method


def error(images, truth):
    """Relative error of a stack."""
    return float((images - truth).norm() / truth.norm())


# --- the parts


@pytest.mark.parametrize(("size", "ctf"), [(300, 2.0), (1500, 0.5)])
def test_shrinkage_finds_the_spike(size, ctf):
    """A covariance sigma^2 I + l u u^T: the eigenvalue l and the cosine of its eigenvector are known by simulation."""
    p, sigma2, spike = 100, 0.7, 3.0
    gamma = torch.tensor(p / size, dtype=torch.float64)
    samples = np.sqrt(sigma2) * np.random.default_rng(0).normal(size=(20, size, p))
    samples[:, :, 0] += np.sqrt(spike) * np.random.default_rng(1).normal(size=(20, size))
    values, vectors = np.linalg.eigh(samples.transpose(0, 2, 1) @ samples / size)
    wanted = spike * (vectors[:, 0, -1] ** 2).mean()
    found = shrink(torch.from_numpy(values), sigma2, gamma)
    assert float(found[:, -1].mean()) == pytest.approx(wanted, rel=0.05)
    assert (found[:, :-2] == 0).all(), "what noise makes is dropped"


def test_shrinkage_without_noise_changes_nothing():
    values = torch.tensor([0.0, 0.5, 3.0], dtype=torch.float64)
    torch.testing.assert_close(shrink(values, 0.0, torch.tensor(0.3)), values)
    torch.testing.assert_close(shrink(values, 1e-12, torch.tensor(1e-9)), values, atol=1e-9, rtol=0)


def test_conjugate_gradients_solve_the_equation():
    factors = normal(4, 6, 6).double()
    grams = factors @ factors.mT
    truth = normal(6, 6, seed=1).double()
    truth = truth @ truth.T

    def apply(x):
        return (grams @ x @ grams).sum(0)

    kronecker = sum(torch.kron(gram, gram) for gram in grams)
    expected = torch.linalg.solve(kronecker, apply(truth).flatten()).view(6, 6)
    found = conjugate_gradients(apply, apply(truth), torch.linalg.inv(grams.sum(0)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("noise_kind", ["white", "coloured"])
def test_mean_and_covariance_are_found_behind_the_ctf(noise_kind, monkeypatch):
    """Coefficients drawn with a known mean and known blocks, seen through five CTFs with noise of a known spectrum."""
    basis = SteerableBasis(24)
    k_max, _, q_max = basis.shape
    real = (torch.arange(q_max) < basis.counts[:, None]).double()
    root = real[:, :, None] * normal(k_max, q_max, 2, seed=1).double() / (1 + torch.arange(k_max))[:, None, None]
    mean = 2 * normal(q_max, seed=2).double()
    power = torch.ones_like(basis.nodes) if noise_kind == "white" else 0.3 + 1 / (1 + (basis.nodes / 0.1) ** 2)
    values, vectors = torch.linalg.eigh(basis.radial_matrices(power))
    colour = (vectors * values.clamp(min=0).sqrt()[:, None]) @ vectors.mT
    monkeypatch.setattr(basis, "expand", lambda coefficients: coefficients)
    moments, sigma = Moments(basis, power), 0.5
    for group in range(5):
        profile = ctf_1d(torch.tensor(9000.0 + 1500 * group), basis.nodes, Optics(pixel_size=4.0))
        hidden = torch.einsum("kqr,nksr->nksq", root, normal(2000, k_max, 2, 2, seed=10 + group).double())
        hidden[:, 0, 0] += mean
        seen = torch.einsum("nksq,kqp->nksp", hidden, basis.radial_matrices(profile))
        noise = torch.einsum("nksq,kqp->nksp", normal(2000, k_max, 2, q_max, seed=20 + group).double(), colour)
        seen = (seen + sigma * noise) * real[:, None]
        seen[:, 0, 1] = 0
        moments.add(seen.split(700), profile)
    found_mean, found, before, after = moments.solve(sigma**2, 2)
    truth = root @ root.mT
    assert (found_mean - mean).norm() < 0.05 * mean.norm()
    for k in (0, 1, 2, 5):
        assert (found[k] - truth[k]).norm() < 0.1 * truth[k].norm(), k
    assert (after <= before.clamp(min=0) + 1e-12).all()


@pytest.mark.parametrize("size", [32, 33, 64])
def test_noise_spectrum_is_found_in_the_corners(size):
    frequencies = torch.linspace(0.02, 0.48, 24, dtype=torch.float64)
    disc = torch.hypot(*torch.meshgrid(*[torch.arange(size) - (size - 1) / 2] * 2, indexing="ij")) < 0.45 * size
    images = coloured_noise((500, size, size), generator=torch.Generator().manual_seed(0)) * 3 + 40.0 * disc + 7
    spectrum = ice_spectrum(size, size)
    ring = (frequencies * size).round().long()
    found = radial_noise_power(images, frequencies)
    expected = spectrum[ring, 0]
    assert ((found / expected)[ring > 2] - 1).abs().max() < 0.25, "steepest here, and smoothed by the window"
    assert ((found / expected)[ring > 5] - 1).abs().max() < 0.06
    white = radial_noise_power(normal(500, size, size) + 2.0 * disc, frequencies)
    assert (white - 1).abs().max() < 0.1
    assert (radial_noise_power(torch.ones(3, size, size), frequencies) == 1).all()


# --- the whole


@pytest.mark.parametrize("size", [32, 37])
def test_better_than_the_best_filter_of_rings(size):
    part, _ = particles(size, 600, snr=0.1)
    method = learn(part.noisy, part.sigma)
    spectrum = torch.fft.fft2(part.clean).abs().square().mean(0)
    gain = spectrum / (spectrum + part.sigma**2 * size**2)  # the true spectrum, and not even averaged over rings
    filtered = torch.fft.ifft2(torch.fft.fft2(part.noisy) * gain).real
    assert error(method.denoise(part.noisy, part.sigma), part.clean) < 0.8 * error(filtered, part.clean)


def test_a_ctf_that_is_known_helps():
    part, ctf = particles(48, 600, snr=0.2, ctf=True, defocus=(10000.0, 40000.0))
    known, unknown = (learn(part.noisy, part.sigma, c, ctf.optics.pixel_size) for c in (ctf, None))
    with_ctf = known.denoise(part.noisy, part.sigma, ctf)
    assert error(with_ctf, part.clean) < 0.97 * error(unknown.denoise(part.noisy, part.sigma), part.clean)
    assert error(with_ctf, part.clean) < 0.4 * error(part.noisy, part.clean)
    ignored = unknown.denoise(part.noisy[:3], part.sigma, ctf[:3])
    assert torch.equal(ignored, unknown.denoise(part.noisy[:3], part.sigma))


def test_restored_is_before_the_ctf_and_denoised_after_it():
    """The two outputs differ by the CTF of the image's group: here that of the image, without astigmatism."""
    part, ctf = particles(48, 200, snr=1.0, ctf=True, astigmatism=0.0, defocus=(3000.0, 3000.0))
    method = learn(part.noisy, part.sigma, ctf, ctf.optics.pixel_size)
    restored = method.restore(part.noisy, part.sigma, ctf) - method.state["background"]
    again = torch.fft.irfft2(torch.fft.rfft2(restored) * ctf.images(48), s=(48, 48)) + method.state["background"]
    assert error(again, method.denoise(part.noisy, part.sigma, ctf)) < 0.02


def test_coloured_noise_is_whitened():
    part, _ = particles(48, 600, snr=0.1, noise="coloured")
    white, whitened = (learn(part.noisy, part.sigma, whiten=w).denoise(part.noisy, part.sigma) for w in (False, True))
    assert error(whitened, part.clean) < 0.9 * error(white, part.clean)


def test_more_images_teach_more():
    part, _ = particles(32, 600, snr=0.1)
    few, many = (learn(part.noisy[:n], part.sigma).denoise(part.noisy, part.sigma) for n in (40, 600))
    assert error(many, part.clean) < 0.9 * error(few, part.clean)


def test_chunks_do_not_show(monkeypatch):
    part, ctf = particles(33, 50, snr=0.5, ctf=True)
    method = learn(part.noisy, part.sigma, ctf, ctf.optics.pixel_size, ctf_groups=4)
    out = method.denoise(part.noisy, part.sigma, ctf)
    monkeypatch.setattr(cwf, "PIXELS", 7 * 33**2)
    chunked = learn(part.noisy, part.sigma, ctf, ctf.optics.pixel_size, ctf_groups=4)
    torch.testing.assert_close(chunked.state["mean"], method.state["mean"], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(chunked.denoise(part.noisy, part.sigma, ctf), out, rtol=1e-3, atol=1e-4)


def test_the_result_of_an_image_does_not_depend_on_its_company():
    part, ctf = particles(33, 200, snr=0.5, ctf=True)
    method = learn(part.noisy, part.sigma, ctf, ctf.optics.pixel_size)
    out = method.denoise(part.noisy, part.sigma, ctf)
    for i in (0, 7, 199):
        alone = method.denoise(part.noisy[i : i + 1], part.sigma, ctf[i : i + 1])
        torch.testing.assert_close(alone, out[i : i + 1], rtol=1e-4, atol=1e-5)
    far = replace(ctf, defocus=ctf.defocus.index_fill(0, torch.tensor([3]), 90000.0))
    torch.testing.assert_close(method.denoise(part.noisy, part.sigma, far)[4:], out[4:], rtol=1e-4, atol=1e-5)


def test_defocus_groups_are_narrow_enough_and_not_too_many():
    """Finer groups improve next to nothing; an outlier widens none; ctf_groups is kept to."""
    part, ctf = particles(48, 300, snr=0.5, ctf=True, astigmatism=0.0)
    pixel = ctf.optics.pixel_size
    own = {"ctf": ctf, "pixel_size": pixel}
    method = learn(part.noisy, part.sigma, **own)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cwf, "TURN", 0.01)
        fine = learn(part.noisy, part.sigma, **own, ctf_groups=1000)
    wrong, least = (error(m.denoise(part.noisy, part.sigma, ctf), part.clean) for m in (method, fine))
    assert fine.info["defocus_step"] < 0.1 * method.info["defocus_step"]
    assert wrong < 1.005 * least
    outlier = replace(ctf, defocus=ctf.defocus.index_fill(0, torch.tensor([3]), 90000.0))
    assert learn(part.noisy, part.sigma, outlier, pixel).info["defocus_step"] == method.info["defocus_step"]
    for most in (1, 4):
        few = learn(part.noisy, part.sigma, **own, ctf_groups=most)
        basis = SteerableBasis(8)
        assert len(list(few._groups(ctf, 300, basis))) <= most
        assert sum(len(members) for members, _ in few._groups(ctf, 300, basis)) == 300


def test_turned_and_mirrored_images_give_turned_and_mirrored_results():
    part, _ = particles(33, 100, snr=0.5)
    method = learn(part.noisy, part.sigma)
    out = method.denoise(part.noisy, part.sigma)
    for change in (lambda x: x.rot90(1, (1, 2)), lambda x: x.flip(-1), lambda x: x.mT):
        torch.testing.assert_close(method.denoise(change(part.noisy), part.sigma), change(out), atol=1e-4, rtol=1e-3)


def test_other_sizes_are_boxes_about_the_same_centre():
    part, _ = particles(33, 100, snr=0.5)
    method = learn(part.noisy, part.sigma)
    background = method.state["background"]
    out = method.denoise(part.noisy[:4], part.sigma)
    wide = torch.full((4, 41, 50), float(background))
    wide[:, 4:37, 9:42] = part.noisy[:4]  # pixel 16 of the box is pixel 20 of 41 and 25 of 50
    found = method.denoise(wide, part.sigma)
    torch.testing.assert_close(found[:, 4:37, 9:42], out)
    assert (found[:, :4] == background).all()
    small = method.denoise(out[:, 4:29, 1:32], part.sigma)
    assert error(small, out[:, 4:29, 1:32]) < 0.3


# --- what may go wrong


@pytest.mark.parametrize("size", [32, 33])
@pytest.mark.parametrize("with_ctf", [False, True])
def test_edge_cases(size, with_ctf):
    part, ctf = particles(size, 40, snr=0.5, ctf=with_ctf)
    pixel = ctf.optics.pixel_size if with_ctf else 1.0
    one_group = replace(ctf, defocus=ctf.defocus[:1].expand(40, 3)) if with_ctf else None
    clean, equal = part.clean, part.clean[:1].expand(40, size, size)
    cases = {
        "fewer than the basis": (part.noisy[:5], clean[:5], part.sigma, ctf[:5] if ctf else None),
        "one image": (part.noisy[:1], clean[:1], part.sigma, ctf[:1] if ctf else None),
        "one group": (part.noisy, clean, part.sigma, one_group),
        "zero noise": (clean, clean, 0.0, ctf),
        "all equal": (equal, equal, 0.0, one_group),
        "all equal, with noise": (equal + part.noisy - clean, equal, part.sigma, one_group),
        "nothing": (torch.zeros(3, size, size), torch.zeros(3, size, size), 0.0, ctf[:3] if ctf else None),
    }
    for name, (images, truth, sigma, transfer) in cases.items():
        method = learn(images, sigma, transfer, pixel)
        out = method.denoise(images, sigma, transfer)
        assert torch.isfinite(out).all(), name
        if name in ("zero noise", "all equal", "nothing"):
            assert (out - images).norm() <= (0.03 if with_ctf else 0.01) * images.norm(), name
        else:
            nothing_learnt = min(error(images, truth), error(truth.mean().expand_as(truth), truth))
            assert error(out, truth) < 0.85 * nothing_learnt, name
        if with_ctf:
            restored = method.restore(images, sigma, transfer)
            assert torch.isfinite(restored).all(), name
            assert restored.abs().max() < 30 * images.abs().max() + 1e-6, f"{name}: noise is not blown up"


GROWTH = """
import torch
from cryobench.imaging.ctf import ContrastTransfer, Optics
from cryobench.imaging.training_data import TrainingData
from cryobench.methods import cwf
from cryobench.methods.base import Budget
from cryobench.methods.cwf import Method
torch.set_num_threads(1)
cwf.PIXELS = 2**17  # parts that are full at the smaller number too

def run(n):
    images = torch.randn(n, 32, 36)
    defocus = (10000 + 15000 * torch.rand(n, 1)) * torch.tensor([1.0, 1.0, 0.0])
    ctf = ContrastTransfer(Optics(pixel_size=5.0), defocus)
    method = Method()
    method.fit(TrainingData("noisy", images, None, 1.0, 5.0, ctf=ctf), Budget(progress=False))
    out = method.denoise(images, None, ctf)
    assert out.shape == images.shape
    # not ru_maxrss, which starts at the peak of the parent process
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return images.nbytes, int(status["VmHWM"].split()[0]) * 1024

(small, first), (large, second) = run(5000), run(40000)
print((second - first) / (large - small))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read where Linux shows it")
def test_memory_grows_by_the_stacks_alone():
    """Fit and denoise of boxes that are cropped and padded, with CTF and unknown sigma: input and output, 2 stacks."""
    # blocks of a few images and more are given back when they are freed: the peak is then what was in use at once
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 1.5 < float(done.stdout) < 2.5


def test_the_stack_is_not_moved_to_the_device_as_a_whole():
    class Probe(Method):
        def denoise(self, images, sigma=None, ctf=None):
            assert images.device.type == "cpu"
            return images

    Probe(device="meta").denoise(torch.zeros(2, 8, 8), 1.0)


def test_what_it_cannot_do_it_says():
    part, ctf = particles(32, 20, snr=0.5, ctf=True)
    with pytest.raises(CryobenchError, match="fit it"):
        Method().denoise(part.noisy, 1.0)
    plain = learn(part.noisy, part.sigma)
    with pytest.raises(CryobenchError, match="cut out boxes"):
        plain.denoise(torch.zeros(1, 400, 500), 1.0)
    method = learn(part.noisy, part.sigma, ctf, ctf.optics.pixel_size)
    with pytest.raises(CryobenchError, match="defocus holds NaN"):
        method.denoise(part.noisy, 1.0, replace(ctf, defocus=ctf.defocus * float("nan")))
    with pytest.raises(CryobenchError, match="needs that of these images"):
        method.denoise(part.noisy, 1.0)
    with pytest.raises(CryobenchError, match="per pixel"):
        method.denoise(part.noisy, 1.0, replace(ctf, optics=replace(ctf.optics, pixel_size=1.0)))
    with pytest.raises(CryobenchError, match="bin the images"):
        learn(torch.zeros(1, 3000, 3000), 1.0)
