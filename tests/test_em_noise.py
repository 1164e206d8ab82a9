"""Images of unequal noise: levels measured in their corners, and what em3d makes of them."""

import math

import pytest
import torch
from test_bayes import simulated
from test_em3d import fitted
from test_em_poses import generator
from torch import Tensor

from cryobench.imaging.training_data import TrainingData
from cryobench.methods import em3d
from cryobench.methods.em_noise import background_variance, learn_levels, noise_variances
from cryobench.metrics.images import mse


def uneven(n: int, height: int, width: int, spread: float, coloured: bool = False) -> tuple[Tensor, Tensor]:
    """Noise (n, h, w) of mean variance 1, and the variance (n,) of each image."""
    noise = torch.randn(n, height, width, generator=generator(1))
    if coloured:
        noise = (noise + noise.roll(1, -1) + noise.roll(1, -2)) / 3**0.5
    variance = (spread * torch.randn(n, generator=generator(2))).exp()
    variance = variance / variance.mean()
    return noise * variance.sqrt()[:, None, None], variance


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 45)])
@pytest.mark.parametrize("coloured", [False, True])
def test_levels_are_those_of_the_noise(height: int, width: int, coloured: bool) -> None:
    noise, variance = uneven(400, height, width, 0.6, coloured)
    known = learn_levels(noise, 1.0)
    found = noise_variances(noise, 1.0, **known)
    assert found.shape == (400, 1)
    error = float((found[:, 0].log() - variance.log()).std())
    # a shrunk estimate errs by the part of the spread that is not believed
    assert error == pytest.approx(0.6 * math.sqrt(1 - known["reliability"]), rel=0.25)
    assert error < 0.25
    # of each image alone, and in other units
    assert torch.allclose(noise_variances(3 * noise[7:8], 3.0, **known), found[7:8], rtol=1e-4)


def test_scatter_is_no_difference() -> None:
    assert learn_levels(uneven(400, 32, 32, 0.0)[0], 1.0)["reliability"] < em3d.UNEVEN / 2
    assert learn_levels(torch.randn(4, 8, 8, generator=generator(3)), 1.0)["reliability"] == 0


def test_a_neighbour_in_one_corner_does_not_count() -> None:
    noise, _ = uneven(400, 32, 32, 0.4)
    known, beside = learn_levels(noise, 1.0), noise[:1].clone()
    beside[:, :8, :8] += 10 * torch.rand(8, 8, generator=generator(4))
    change = noise_variances(beside, 1.0, **known) / noise_variances(noise[:1], 1.0, **known)
    assert 0.7 < float(change) < 1.4


def test_corners_that_are_filled_up_say_nothing() -> None:
    noise, _ = uneven(400, 32, 32, 0.0)
    noise[:8, :16] = 0
    assert learn_levels(noise, 1.0)["reliability"] < em3d.UNEVEN
    filled = noise_variances(noise, 1.0, 0.5, 0.0)[:, 0]
    assert 0.85 < float(filled[:8].mean()) < 1.15


def test_backgrounds_that_differ_are_noise_of_the_mean() -> None:
    noise, _ = uneven(400, 33, 32, 0.3)
    assert background_variance(noise, 1.0) == 0
    brightness = 0.2 * torch.randn(400, 1, 1, generator=generator(5))
    assert background_variance(noise + brightness, 1.0) == pytest.approx(0.04, rel=0.3)
    assert background_variance(3 * (noise + brightness), 3.0) == pytest.approx(0.04, rel=0.3)


def test_views_on_other_backgrounds_are_no_junk() -> None:
    simulator, particles = simulated(32, 0.5, 200)
    shifted = particles.noisy + 0.4 * particles.sigma * torch.randn(200, 1, 1, generator=generator(6))
    shares = {}
    for name, images in (("alike", particles.noisy), ("shifted", shifted)):
        method = em3d.Method()
        method.views_of(TrainingData("noisy", images, None, particles.sigma, 4.0))
        method.state["volume"] = simulator.volume * particles.scale
        method.info |= {"ctf": False, "heat": 1.0, "level": float(method.state["volume"].sum())}
        method.denoise(images, particles.sigma)
        shares[name] = float(method.classes[:, 0].mean())
    # where all backgrounds are taken for one, 45 % of them are junk
    assert min(shares.values()) > 0.97


def test_noisier_images_count_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the images with four times the noise of the others: better than all taken alike, on both kinds."""
    _, particles = simulated(32, 0.3, 300)
    level = torch.tensor([0.6, 2.4])[torch.arange(300) % 2][:, None, None]
    noisy = particles.clean + level * (particles.noisy - particles.clean)
    sigma = particles.sigma * float(level.square().mean().sqrt())
    gains = {}
    for name, least in (("alike", 1.1), ("each its own", em3d.UNEVEN)):
        monkeypatch.setattr(em3d, "UNEVEN", least)
        method = fitted(TrainingData("noisy", noisy, None, sigma, 4.0))
        error = mse(method.denoise(noisy, sigma), particles.clean)
        gains[name] = [10 * math.log10(sigma**2 / float(error[k::2].mean())) for k in (0, 1)]
    assert method.info["noise"]["reliability"] > 0.9
    assert gains["each its own"][0] > gains["alike"][0] + 1.5  # measured: 28.4, 25.7
    assert gains["each its own"][1] > gains["alike"][1] + 0.3  # 20.3, 19.6
