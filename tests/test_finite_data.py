"""The bound of a finite data set against reconstructions that know the poses, the place and the spectrum."""

import math

import pytest
import torch

from cryobench.imaging.particles import Simulation, Simulator
from cryobench.imaging.rings import ring_index, ring_sums
from cryobench.metrics.finite_data import filling, volume_error
from cryobench.reconstruction.fourier import reconstruct

SIZE = 33


def volume() -> torch.Tensor:
    """Six blobs within a sphere of a third of the box."""
    axis = torch.arange(SIZE) - SIZE // 2
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    places = torch.randn(6, 3, generator=torch.Generator().manual_seed(3)) * 2.5
    return sum(torch.exp(-((z - a) ** 2 + (y - b) ** 2 + (x - c) ** 2) / 3.0) for a, b, c in places)  # type: ignore[return-value]


def test_a_ball_fills_its_part() -> None:
    axis = torch.arange(65) - 32
    ball = ((axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2) <= 16**2).float()
    assert filling(ball, energy=1.0) == pytest.approx(4 / 3 * math.pi * 16**3 / 65**3, rel=0.01)


def test_noise_without_prior_knowledge_follows_the_count_of_unknowns() -> None:
    """Where the signal is far stronger than the noise nothing is shrunk: (4 pi / 3) k^3 f sigma^2 / (n order)."""
    rings = 40
    error = volume_error(torch.full((rings,), 1e12), 2.0, 1000, 4, 0.3)
    assert float(error.sum()) == pytest.approx(4 / 3 * math.pi * (rings - 0.5) ** 3 * 0.3 * 4 / 4000, rel=0.01)


def test_never_more_than_noise_nor_signal() -> None:
    power = torch.logspace(-3, 3, 20)
    few, many = volume_error(power, 1.0, 10), volume_error(power, 1.0, 10_000)
    assert (few <= power + 1e-9).all()
    assert (many <= few).all()


@pytest.mark.parametrize("count", [300, 1500])
def test_a_reconstruction_with_known_poses_comes_near(count: int) -> None:
    """Least squares at the true poses, the sphere about the particle, the true power as Wiener filter: the error of its
    projections is the bound, within what the gridding and the shells' width leave."""
    simulator = Simulator(volume(), Simulation(SIZE, 3.0, snr=0.2))
    seen = simulator.simulate(count, 1)
    true, sigma = simulator.volume * seen.scale, seen.sigma
    found = reconstruct(seen.noisy - seen.offset, seen.rotations)
    part = filling(true, 0.9999)
    axis = torch.arange(SIZE) - SIZE // 2
    inside = axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2 <= (3 / (4 * math.pi) * part) ** (2 / 3) * SIZE**2
    clean = seen.clean - seen.offset
    power = ring_sums((torch.fft.rfft2(clean).abs() ** 2).mean(0) / SIZE**2, (SIZE, SIZE))
    bound = volume_error(power, sigma, count, 1, part)
    noise = volume_error(torch.full_like(power, 1e30), sigma, count, 1, part)
    gain = torch.cat([power / (power + noise), torch.zeros(1)]).float()[ring_index((SIZE,) * 3)[0]].view(SIZE, SIZE, -1)
    filtered = torch.fft.irfftn(torch.fft.rfftn(found * inside) * gain, s=(SIZE,) * 3)
    views = Simulator(filtered, simulator.simulation).projector.project(seen.rotations[:64])
    error = float((views - clean[:64]).square().sum((1, 2)).mean())
    assert 0.7 < error / float(bound.sum()) < 1.5
