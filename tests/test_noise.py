import math

import pytest
import torch

from cryobench.errors import CryobenchError
from cryobench.imaging.noise import (
    KINDS,
    add_noise,
    coloured_noise,
    ice_spectrum,
    noise_sigma,
    poisson_noise,
    vary_contrast,
    white_noise,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blobs(n: int = 60, height: int = 45, width: int = 62) -> torch.Tensor:
    """Bright discs of several sizes on zero, odd and not square."""
    y = torch.arange(height)[:, None] - height // 2
    x = torch.arange(width)[None, :] - width // 2
    radius2 = (y**2 + x**2).float()
    return torch.stack([torch.exp(-radius2 / (2 * (4 + i % 7) ** 2)) for i in range(n)])


def test_sigma_is_the_definition() -> None:
    clean = torch.tensor([[[0.0, 2.0]], [[0.0, 2.0]]])  # variance 1 over all pixels
    assert noise_sigma(clean, 0.25) == pytest.approx(2.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("snr", [0.02, 1.0])
def test_the_snr_is_the_one_asked_for(kind: str, snr: float) -> None:
    clean = blobs() * 3 + 7
    noisy, sigma = add_noise(clean, snr, kind, seeded())
    noise = (noisy - clean).double()
    pixels = clean.numel()
    assert noisy.shape == clean.shape
    assert noisy.dtype == torch.float32
    # 167,400 pixels: the variance is known to sqrt(2 / n) = 0.35 % if white, less well if pixels are correlated
    assert float(noise.var()) == pytest.approx(float(clean.double().var()) / snr, rel=0.04)
    assert float(noise.var()) == pytest.approx(sigma**2, rel=0.04)
    assert abs(float(noise.mean())) < (20 if kind == "coloured" else 4) * sigma / math.sqrt(pixels)


@pytest.mark.parametrize("kind", KINDS)
def test_sigma_may_be_given_instead(kind: str) -> None:
    clean = blobs() * 3 + 7
    noisy, sigma = add_noise(clean, math.nan, kind, seeded(), sigma=1.7)
    assert sigma == 1.7
    assert float((noisy - clean).double().std()) == pytest.approx(1.7, rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_the_same_noise(kind: str) -> None:
    clean = blobs(3)
    first, again, other = (add_noise(clean, 0.1, kind, seeded(s))[0] for s in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_white_noise_is_white() -> None:
    noise = white_noise((400, 15, 22), seeded())
    power = torch.fft.rfft2(noise).abs().square().mean(0) / (15 * 22)
    assert float(noise.var()) == pytest.approx(1, abs=0.02)
    assert power.min() > 0.7  # 400 exponential or chi-square draws: sd 0.05 to 0.07
    assert power.max() < 1.35


@pytest.mark.parametrize("shape", [(16, 16), (15, 22), (22, 15)])
def test_ice_spectrum_has_mean_one_over_the_whole_plane(shape: tuple[int, int]) -> None:
    height, width = shape
    half = ice_spectrum(height, width)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    mirrored = x > width // 2  # the other half by Friedel's law
    full = half[torch.where(mirrored, -y, y) % height, torch.where(mirrored, width - x, x)]
    assert float(full.mean()) == pytest.approx(1, abs=1e-12)


def test_coloured_noise_has_its_spectrum() -> None:
    height, width, n = 33, 48, 600
    spectrum = ice_spectrum(height, width, exponent=3.0, knee=0.08, floor=0.1)
    noise = coloured_noise((n, height, width), spectrum, seeded(1))
    power = torch.fft.rfft2(noise).abs().square().mean(0) / (height * width)
    ratio = power / spectrum
    assert float(ratio.mean()) == pytest.approx(1, abs=0.01)
    assert ratio.std() < 1.3 / math.sqrt(n)  # no systematic departure: only the scatter of n draws
    assert float(noise.var()) == pytest.approx(1, abs=0.03)


def test_spectrum_falls_with_its_exponent() -> None:
    spectrum = ice_spectrum(512, 512, exponent=2.0, knee=0.01, floor=0.0)[0]
    slope = math.log(float(spectrum[200] / spectrum[50])) / math.log(4)
    assert slope == pytest.approx(-2, abs=0.03)
    assert torch.allclose(ice_spectrum(8, 9, exponent=0), torch.ones(8, 5).double())


@pytest.mark.parametrize(("dose", "counted"), [(2.0, 2.0), (0.01, 0.05 * 1.75**2 / 2.1875)])
def test_poisson_noise_counts(dose: float, counted: float) -> None:
    """The counts are whole numbers with mean = variance; too low a dose is raised until none is negative."""
    clean = torch.tensor([0.0, 1.0, 2.0, 4.0]).repeat(40, 80, 25)  # mean 1.75, variance 2.1875
    snr = 0.05
    noise = poisson_noise(clean, snr, seeded(2), dose).double()
    gain = math.sqrt(counted * snr / 2.1875)
    expected = counted + gain * (clean.double() - 1.75)
    counts = noise * gain + expected
    torch.testing.assert_close(counts, counts.round(), atol=1e-4, rtol=0)
    assert counts.min() > -1e-4
    for level in (0.0, 1.0, 2.0, 4.0):
        there, mean = counts[clean == level], float(expected[clean == level][0])
        scatter = 4 / math.sqrt(len(there))  # four standard errors of a mean and of a variance
        assert float(there.mean()) == pytest.approx(mean, abs=scatter * math.sqrt(mean) + 1e-6)
        assert float(there.var()) == pytest.approx(mean, abs=scatter * math.sqrt(mean + 2 * mean**2) + 1e-6)


def test_contrast_varies_per_image() -> None:
    images = torch.ones(20000, 2, 3)
    gains = vary_contrast(images, 0.2, seeded())
    assert torch.equal(gains[:, 0, 0], gains[:, 1, 2])
    assert gains.min() > 0
    assert float(gains[:, 0, 0].mean()) == pytest.approx(1, abs=0.006)
    assert float(gains[:, 0, 0].std()) == pytest.approx(0.2, abs=0.006)
    assert torch.equal(vary_contrast(images[:3], 0.0), images[:3])


def test_wrong_input() -> None:
    clean = blobs(2)
    for snr in (0.0, -1.0, math.nan):
        with pytest.raises(CryobenchError, match="SNR"):
            add_noise(clean, snr)
    with pytest.raises(CryobenchError, match="contrast"):
        add_noise(torch.ones(2, 5, 5), 1.0)
    with pytest.raises(CryobenchError, match="unknown noise 'pink'"):
        add_noise(clean, 1.0, "pink")
    with pytest.raises(CryobenchError, match="spectrum"):
        coloured_noise((2, 8, 8), torch.ones(8, 8))
    with pytest.raises(CryobenchError, match="negative"):
        vary_contrast(clean, -0.1)
