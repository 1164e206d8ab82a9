"""The limit against a plain sum over poses in real space, closed forms, and its own prediction of its error."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from cryobench.errors import CryobenchError
from cryobench.imaging.noise import ice_spectrum
from cryobench.imaging.particles import Particles, Simulation, Simulator
from cryobench.imaging.rotations import euler_to_matrix, symmetry_matrices
from cryobench.imaging.training_data import TrainingData
from cryobench.methods.base import Budget
from cryobench.methods.bayes import Method


def blobs(size: int, group: str = "C1") -> Tensor:
    """Blobs without symmetry, or made symmetric."""
    generator = torch.Generator().manual_seed(4)
    axis = torch.arange(size, dtype=torch.float64) - size // 2
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    volume = torch.zeros(size, size, size, dtype=torch.float64)
    for k in range(5):
        centre = (torch.rand(3, generator=generator, dtype=torch.float64) - 0.5) * 0.5 * size
        for element in symmetry_matrices(group):
            p = element @ centre
            squared = (x - p[0]) ** 2 + (y - p[1]) ** 2 + (z - p[2]) ** 2
            volume += torch.exp(-squared / (2 * ((1.0 + 0.2 * k) * size / 20) ** 2))
    return volume.float()


def simulated(
    size: int, snr: float, n: int, group: str = "C1", noise: str = "white", ctf: bool = False
) -> tuple[Simulator, Particles]:
    simulation = Simulation(size, 4.0, snr, noise, ctf, astigmatism=2000.0)
    simulator = Simulator(blobs(size, group), simulation, symmetry=group)
    return simulator, simulator.simulate(n, seed=1)


def fitted(simulator: Simulator, particles: Particles, **options: float) -> Method:
    method = Method(Method.config_for("quick", **options))
    method.fit(TrainingData.simulated("reference", particles, simulator), Budget(progress=False))
    return method


def denoised(simulator: Simulator, particles: Particles, **options: float) -> tuple[Tensor, Method]:
    method = fitted(simulator, particles, **options)
    ctf = simulator.contrast_transfer(particles.defocus)
    return method.denoise(particles.noisy, particles.sigma, ctf), method


def brute_force(simulator: Simulator, particles: Particles) -> Tensor:
    """Posterior means by a sum over Euler angles (Gauss-Legendre in cos tilt), in pixels, in float64."""
    size = particles.clean.shape[-1]
    nodes, weights = np.polynomial.legendre.leggauss(24)
    rot, psi = (torch.arange(k, dtype=torch.float64) * 360 / k for k in (48, 48))
    angles = torch.cartesian_prod(rot, torch.rad2deg(torch.tensor(nodes).acos()), psi)
    log_prior = torch.tensor(np.log(weights)).repeat_interleave(48).repeat(48)
    views = simulator.projector.project(euler_to_matrix(angles).float())
    ctf = simulator.contrast_transfer(particles.defocus)
    power = ice_spectrum(size, size) if simulator.simulation.noise == "coloured" else torch.ones(1)
    whiten = particles.sigma * power.double().sqrt()
    means = []
    for i, noisy in enumerate(particles.noisy):
        transform = torch.fft.rfft2(views)
        if ctf is not None:
            transform = transform * ctf[i : i + 1].images(size)
        seen = torch.fft.irfft2(transform, s=(size, size)).double() * particles.scale + particles.offset
        residual = torch.fft.irfft2(torch.fft.rfft2(noisy.double() - seen) / whiten, s=(size, size))
        weight = torch.softmax(log_prior - residual.square().sum((1, 2)) / 2, 0)
        means.append((weight[:, None, None] * seen).sum(0))
    return torch.stack(means)


@pytest.mark.parametrize(
    ("size", "noise", "ctf", "snr"),
    [
        (16, "white", False, 0.1),
        (16, "white", True, 0.1),
        (17, "coloured", False, 0.05),
        (15, "coloured", True, 0.2),
        (16, "white", True, 0.01),  # so wide a posterior that all poses count
        (17, "white", False, 0.003),
    ],
)
def test_matches_brute_force(size: int, noise: str, ctf: bool, snr: float) -> None:
    simulator, particles = simulated(size, snr, 4, noise=noise, ctf=ctf)
    out, method = denoised(simulator, particles)
    expected = brute_force(simulator, particles)
    difference = float((out - expected).square().mean())
    variance = method.info["limit"]["posterior_variance"]
    assert difference < 0.01 * variance
    assert difference < 0.01 * float((expected - particles.clean).square().mean())
    # its own word on that: the sum before the last doubling of the poses was off by no less
    assert difference < 3 * method.info["mc_error"] * variance + 1e-4 * variance


@pytest.mark.parametrize("snr", [5.0, 50.0])
def test_asymptote_of_weak_noise(snr: float) -> None:
    """Three unknown angles: 3 sigma^2 / n_pixels. The squared error is then chi-square with 3 degrees of freedom."""
    n = 96
    simulator, particles = simulated(33, snr, n)
    out, method = denoised(simulator, particles)
    asymptote = 3 * particles.sigma**2 / 33**2
    error = float((out - particles.clean).square().mean())
    assert method.info["limit"]["posterior_variance"] == pytest.approx(asymptote, rel=0.08)
    assert error == pytest.approx(asymptote, rel=4 * math.sqrt(2 / 3 / n))


@pytest.mark.parametrize(("snr", "ctf", "noise"), [(0.02, False, "white"), (0.1, True, "coloured")])
def test_predicts_its_own_error(snr: float, ctf: bool, noise: str) -> None:
    """The mean posterior variance is the expected squared error: false confidence, or a missed mode, would show."""
    simulator, particles = simulated(24, snr, 48, noise=noise, ctf=ctf)
    out, method = denoised(simulator, particles)
    errors = (out - particles.clean).square().mean((1, 2)).double()
    assert abs(float(errors.mean()) - method.info["limit"]["posterior_variance"]) < 4 * float(errors.std()) / 48**0.5
    # and it is better than the best linear filter of what is left when the pose is not used at all
    assert float(errors.mean()) < 0.6 * float(particles.clean.var(0).mean())


def test_finer_search_changes_nothing() -> None:
    simulator, particles = simulated(32, 0.1, 24)
    out, method = denoised(simulator, particles)
    finer, _ = denoised(simulator, particles, spacing=5.0, least=96, mass=0.9999, tolerance=1e-3)
    assert float((out - finer).square().mean()) < 0.01 * method.info["limit"]["posterior_variance"]
    assert 0 < method.info["mc_error"] < 0.01


def test_what_it_says_is_of_the_largest_stack() -> None:
    simulator, particles = simulated(16, 0.1, 8)
    _, method = denoised(simulator, particles)
    said = dict(method.info["limit"])
    method.denoise(particles.noisy[:3] * 0, particles.sigma)
    method.denoise(particles.noisy * 0, particles.sigma)
    assert method.info["limit"] == said
    assert said["n"] == 8


def test_symmetry_saves_work_and_changes_nothing() -> None:
    simulator, particles = simulated(32, 0.2, 8, "C4")
    with_it, method = denoised(simulator, particles)
    assert method.info["symmetry"] == "C4"
    simulator.symmetry = "C1"
    without, _ = denoised(simulator, particles)
    assert float((with_it - without).square().mean()) < 0.01 * method.info["limit"]["posterior_variance"]


def test_a_symmetry_that_the_structure_lacks_is_not_used() -> None:
    simulator, particles = simulated(24, 1.0, 2)
    simulator.symmetry = "C4"
    assert fitted(simulator, particles).info["symmetry"] == "C1"


def test_refuses_what_its_posterior_is_not_for() -> None:
    for settings, word in (
        ({"noise": "poisson"}, "Gaussian"),
        ({"shift": 2.0}, "shifts"),
        ({"contrast": 0.1}, "shifts"),
    ):
        simulator = Simulator(blobs(16), Simulation(16, 4.0, **settings))  # type: ignore[arg-type]
        with pytest.raises(CryobenchError, match=word):
            fitted(simulator, simulator.simulate(2, 0))
    with pytest.raises(CryobenchError, match="fit"):
        Method(Method.Config()).denoise(torch.zeros(1, 16, 16), 1.0)
