"""The limit of a finite data set against reconstructions with known poses, and posteriors over a handful of poses."""

import math

import pytest
import torch

from cryobench.imaging.particles import Simulation, Simulator
from cryobench.imaging.rings import ring_index, ring_sums
from cryobench.imaging.rotations import random_rotations
from cryobench.metrics.finite_data import local_power, volume_error, with_poses_unknown
from cryobench.reconstruction.fourier import reconstruct

SIZE = 33
#: of a sphere that holds all but 1e-4 of the squared density
RADIUS = 9.5


def volume() -> torch.Tensor:
    """Six blobs within a sphere of a third of the box."""
    axis = torch.arange(SIZE) - SIZE // 2
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    places = torch.randn(6, 3, generator=torch.Generator().manual_seed(3)) * 2.5
    return sum(torch.exp(-((z - a) ** 2 + (y - b) ** 2 + (x - c) ** 2) / 3.0) for a, b, c in places)  # type: ignore[return-value]


def ball(size: int, radius: float) -> torch.Tensor:
    axis = torch.arange(size) - size // 2
    return ((axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2) <= radius**2).float()


def test_local_power_is_where_the_density_is() -> None:
    """A blob of standard deviation 3: its blurred square is a Gaussian of variance 9 / 2 + width^2."""
    axis = (torch.arange(SIZE) - SIZE // 2).float()
    squared = axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2
    found = local_power(-2 * torch.exp(-squared / 18), 2.0)
    expected = torch.exp(-squared / 2 / (9 / 2 + 4))
    assert torch.allclose(found, expected / expected.mean(), atol=1e-3 * float(found.max()))


def test_noise_without_prior_knowledge_follows_the_count_of_unknowns() -> None:
    """Where the signal is far stronger than the noise nothing is shrunk: (4 pi / 3) k^3 f sigma^2 / (n order)."""
    rings = 40
    inside = ball(25, 9.0)
    part = float(inside.mean())
    error = volume_error(torch.full((rings,), 1e12), 2.0, 1000, 4, inside / part)
    assert float(error.sum()) == pytest.approx(4 / 3 * math.pi * (rings - 0.5) ** 3 * part * 4 / 4000, rel=0.01)


def test_in_a_part_of_the_box_signal_competes_with_the_noise_of_that_part() -> None:
    power, inside = torch.logspace(-3, 3, 20), ball(25, 9.0)
    part = float(inside.mean())
    noise = part * 4 * math.pi * torch.arange(20) ** 2 / 50
    expected = noise * power / (noise + power)
    assert torch.allclose(volume_error(power, 1.0, 50, 1, inside / part)[1:].float(), expected[1:], rtol=1e-4)


def test_strong_places_are_shrunk_less() -> None:
    """Two halves of a box, one with nine tenths of the power."""
    power = torch.logspace(-3, 3, 20)
    envelope = torch.tensor([1.8, 0.2]).repeat_interleave(4)
    noise = 4 * math.pi * torch.arange(20) ** 2 / 50
    strong, weak = (noise * power * w / (noise + power * w) for w in (1.8, 0.2))
    found = volume_error(power, 1.0, 50, 1, envelope)[1:].float()
    assert torch.allclose(found, ((strong + weak) / 2)[1:], rtol=1e-4)
    assert (found < volume_error(power, 1.0, 50)[1:].float()).all()


def test_never_more_than_noise_nor_signal() -> None:
    power = torch.logspace(-3, 3, 20)
    envelope = local_power(volume())
    few, many = volume_error(power, 1.0, 10, 1, envelope), volume_error(power, 1.0, 10_000, 1, envelope)
    assert (few <= power + 1e-9).all()
    assert (many <= few).all()


@pytest.mark.parametrize("count", [300, 1500])
def test_a_reconstruction_with_known_poses_comes_near(count: int) -> None:
    """Least squares at the true poses, a sphere about the particle, the true power as Wiener filter: the error of its
    projections is the bound of a sphere, within what the gridding and the shells' width leave."""
    simulator = Simulator(volume(), Simulation(SIZE, 3.0, snr=0.2))
    seen = simulator.simulate(count, 1)
    sigma = seen.sigma
    found = reconstruct(seen.noisy - seen.offset, seen.rotations)
    inside = ball(SIZE, RADIUS)
    envelope = inside / inside.mean()
    clean = seen.clean - seen.offset
    power = ring_sums((torch.fft.rfft2(clean).abs() ** 2).mean(0) / SIZE**2, (SIZE, SIZE))
    bound = volume_error(power, sigma, count, 1, envelope)
    noise = volume_error(torch.full_like(power, 1e30), sigma, count, 1, envelope)
    gain = torch.cat([power / (power + noise), torch.zeros(1)]).float()[ring_index((SIZE,) * 3)[0]].view(SIZE, SIZE, -1)
    filtered = torch.fft.irfftn(torch.fft.rfftn(found * inside) * gain, s=(SIZE,) * 3)
    views = Simulator(filtered, simulator.simulation).projector.project(seen.rotations[:64])
    error = float((views - clean[:64]).square().sum((1, 2)).mean())
    assert 0.7 < error / float(bound.sum()) < 1.5


def grains(seed: int, steep: float) -> torch.Tensor:
    """Random density in a sphere; its amplitude falls from ``steep`` cycles per box on."""
    k = torch.fft.fftfreq(SIZE) * SIZE
    squared = k[:, None, None] ** 2 + k[:, None] ** 2 + (torch.fft.rfftfreq(SIZE) * SIZE) ** 2
    noise = torch.randn(SIZE, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    return torch.fft.irfftn(torch.fft.rfftn(noise) / (1 + squared / steep**2), s=(SIZE,) * 3) * ball(SIZE, RADIUS)


@pytest.mark.parametrize(("snr", "part"), [(0.02, 0.4), (0.05, 0.8)])
def test_a_posterior_over_poses_keeps_a_part_of_the_volumes_error(snr: float, part: float) -> None:
    """Images from 6,000 known poses, their posterior by Bayes' rule. The estimate lies between what its means keep of
    the error of a volume and what that costs them in all: with a wrong volume the poses are known less well, too."""
    generator = torch.Generator().manual_seed(0)
    poses, n = random_rotations(6000, generator), 400
    views = Simulator(grains(0, 3.0), Simulation(SIZE, 3.0)).projector.project(poses)
    wrong = Simulator(0.3 * grains(1, 30.0), Simulation(SIZE, 3.0)).projector.project(poses)
    wrong *= 0.3 * views.std() / wrong.std()
    variance = float(views.var()) / snr
    noisy = views[:n] + math.sqrt(variance) * torch.randn(views[:n].shape, generator=generator)

    def posterior(model: torch.Tensor) -> torch.Tensor:
        model = model.flatten(1)
        return ((noisy.flatten(1) @ model.T - model.square().sum(1) / 2) / variance).softmax(1)

    def rings(images: torch.Tensor) -> torch.Tensor:
        return ring_sums((torch.fft.rfft2(images.view(n, SIZE, SIZE)).abs() ** 2).mean(0) / SIZE**2, (SIZE, SIZE))

    right = posterior(views)
    pose, power, error = rings(right @ views.flatten(1) - views[:n].flatten(1)), rings(views[:n]), rings(wrong[:n])
    added = float((with_poses_unknown(error, pose, power) - pose).sum())
    kept = float(rings(right @ wrong.flatten(1)).sum())
    found = rings(posterior(views + wrong) @ (views + wrong).flatten(1) - views[:n].flatten(1)).sum()
    assert kept < added < float(found - pose.sum())
    assert added < part * float(error.sum())
