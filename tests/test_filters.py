"""Reference rows and simple filters against scipy, scikit-image, autograd and the truth."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from cryobench.errors import CryobenchError, SupervisionError
from cryobench.imaging import dct
from cryobench.imaging.training_data import TrainingData
from cryobench.methods import bilateral, blank, gaussian, linear, lowpass, lowpass_oracle, mean, noisy, shrink
from cryobench.methods.base import Budget

BUDGET = Budget(progress=False)
FILTERS = [mean, gaussian, lowpass, bilateral]


def blobs(n, h, w, seed=0):
    """Clean images (n, h, w): twelve Gaussian blobs each, variance 1."""
    g = torch.Generator().manual_seed(seed)
    y, x = torch.arange(h) - h // 2, torch.arange(w) - w // 2
    cy, cx = torch.randn(2, n, 12, 1, 1, generator=g) * min(h, w) / 7
    width = 1.5 + 1.5 * torch.rand(n, 12, 1, 1, generator=g)
    images = torch.exp(-((y[:, None] - cy) ** 2 + (x - cx) ** 2) / (2 * width**2)).sum(1)
    return images / images.std()


def noise(images, sigma, seed=1):
    return sigma * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))


def error(out, clean):
    return float((out - clean).square().mean())


@pytest.mark.parametrize("shape", [(1, 31, 44), (3, 16, 9)])
def test_mean_and_gaussian_are_those_of_scipy(shape):
    images = blobs(*shape) + noise(torch.zeros(shape), 1.0)
    for width in (3, 7, 21):
        expected = np.stack([ndimage.uniform_filter(im, width, mode="reflect") for im in images.double().numpy()])
        out = mean.Method(mean.Config(width=width)).denoise(images, 1.0)
        np.testing.assert_allclose(out.numpy(), expected, atol=2e-5)
    for width in (0.4, 1.3, 5.0):
        expected = np.stack([ndimage.gaussian_filter(im, width, mode="reflect") for im in images.double().numpy()])
        out = gaussian.Method(gaussian.Config(width=width)).denoise(images, 1.0)
        # scipy cuts at the rounded, this at the next whole pixel past 4 widths
        np.testing.assert_allclose(out.numpy(), expected, atol=5e-4)


def test_lowpass_keeps_what_is_below_and_drops_what_is_above():
    wave = dct.dct_matrix(64)
    low, high = wave[10][None, None].expand(1, 64, 64), wave[30][None, None].expand(1, 64, 64)  # 0.078, 0.234
    out = lowpass.Method(lowpass.Config(cutoff=0.15)).denoise(low + high, 0.0)
    assert torch.allclose(out, low, atol=1e-5)
    middle = lowpass.Method(lowpass.Config(cutoff=10 / 128)).denoise(low, 0.0)
    assert torch.allclose(middle, low / 2, atol=1e-5)


def test_dct_is_that_of_scipy():
    from scipy.fft import dctn

    images = noise(torch.zeros(2, 13, 20), 1.0)
    expected = dctn(images.numpy(), axes=(1, 2), norm="ortho")
    np.testing.assert_allclose(dct.dct2(images).numpy(), expected, atol=1e-5)
    assert torch.allclose(dct.idct2(dct.dct2(images)), images, atol=1e-5)


def test_bilateral_is_the_textbook_sum():
    """In plain numpy; scikit-image 0.26 is no reference: it makes a table of 8x8 spatial weights for a 7x7 window."""
    image = blobs(1, 23, 16) + noise(torch.zeros(1, 23, 16), 0.5)
    out = bilateral.Method(bilateral.Config(width=1.5, value_width=2.0)).denoise(image, 0.5)[0]
    pixels = image[0].double().numpy()
    wide = np.pad(pixels, 3, mode="symmetric")
    near = np.exp(-(np.arange(-3, 4)[:, None] ** 2 + np.arange(-3, 4) ** 2) / (2 * 1.5**2))
    for (y, x), value in np.ndenumerate(pixels):
        window = wide[y : y + 7, x : x + 7]
        weights = near * np.exp(-((window - value) ** 2) / 2)
        assert out[y, x] == pytest.approx((weights * window).sum() / weights.sum(), abs=1e-5)


def test_slope_of_the_bilateral_filter_is_its_derivative():
    image = (blobs(1, 12, 12) + noise(torch.zeros(1, 12, 12), 1.0)).double()
    _, slope = bilateral.bilateral(image, 1.0, 1.5)
    # one image per pixel that moves; at the border a pixel is its own neighbour, which the formula leaves out
    place = [(y, x) for y in range(2, 10) for x in range(2, 10)]
    step = torch.zeros(64, 12, 12, dtype=torch.float64)
    for i, (y, x) in enumerate(place):
        step[i, y, x] = 1e-5
    up, down = (bilateral.bilateral(image + sign * step, 1.0, 1.5)[0] for sign in (1, -1))
    derivative = torch.stack([(up - down)[i, y, x] / 2e-5 for i, (y, x) in enumerate(place)])
    assert torch.allclose(slope[0, 2:10, 2:10].flatten(), derivative, atol=1e-6)


@pytest.mark.parametrize("snr", [1.0, 0.1, 0.02])
@pytest.mark.parametrize("module", [mean, gaussian, lowpass])
def test_stein_chooses_nearly_the_best_width(module, snr):
    clean = blobs(40, 48, 56)
    sigma = snr**-0.5
    images = clean + noise(clean, sigma)
    grid = range(1, 42, 2) if module is mean else module.GRID
    field = "cutoff" if module is lowpass else "width"
    best = min(error(module.Method(module.Config(**{field: w})).denoise(images, sigma), clean) for w in grid)
    chosen = error(module.Method().denoise(images, sigma), clean)
    assert chosen < best * 10**0.01  # 0.1 dB
    assert best < 0.8 * error(images, clean)


@pytest.mark.parametrize("snr", [1.0, 0.1])
def test_stein_chooses_nearly_the_best_bilateral_widths(snr):
    clean = blobs(6, 40, 40)
    sigma = snr**-0.5
    images = clean + noise(clean, sigma)
    best = min(
        error(bilateral.bilateral(images, width, value * sigma)[0], clean)
        for width in bilateral.WIDTHS
        for value in bilateral.VALUE_WIDTHS
    )
    assert error(bilateral.Method().denoise(images, sigma), clean) < best * 10**0.01


def test_stein_risk_is_unbiased():
    clean, sigma, gains = blobs(1, 24, 20), 0.7, lowpass.Method().gains(0.1, 24, 20)
    images = clean + noise(clean.expand(2000, -1, -1), sigma)
    true = float((dct.idct2(dct.dct2(images) * gains) - clean).square().sum((1, 2)).mean())
    assert linear.stein_risk(dct.dct2(images).square().double().mean(0), gains, sigma) == pytest.approx(true, rel=0.02)


@pytest.mark.parametrize("module", FILTERS)
def test_filters_follow_scale_and_shift_and_keep_constants(module):
    images = blobs(2, 33, 40) + noise(torch.zeros(2, 33, 40), 2.0)
    out = module.Method().denoise(images, 2.0)
    scaled = module.Method().denoise(50 * images - 7, 100.0)
    assert torch.allclose(scaled, 50 * out - 7, atol=2e-2)
    assert torch.allclose(
        module.Method().denoise(torch.full((1, 5, 9), 3.0), 1.0), torch.full((1, 5, 9), 3.0), atol=1e-5
    )
    assert torch.allclose(module.Method().denoise(images, 0.0), images, atol=1e-5)
    assert module.Method().denoise(images[:1, :1, :1], 1.0).shape == (1, 1, 1)


def test_bad_widths_are_refused():
    images = torch.zeros(1, 8, 8)
    for method in (
        mean.Method(mean.Config(width=4)),
        gaussian.Method(gaussian.Config(width=-1.0)),
        lowpass.Method(lowpass.Config(cutoff=0.0)),
    ):
        with pytest.raises(CryobenchError):
            method.denoise(images, 1.0)


def test_noisy_and_blank():
    images = blobs(5, 16, 16) + noise(torch.zeros(5, 16, 16), 1.0)
    assert torch.equal(noisy.Method().denoise(images), images)
    method = blank.Method()
    assert torch.allclose(method.denoise(images, 1.0), images.mean(0).expand(5, -1, -1))
    method.fit(TrainingData("noisy", images[:2] + 4, None, 1.0, 1.0), BUDGET)
    assert torch.allclose(method.denoise(images, 1.0)[3], images[:2].mean(0) + 4)
    other = method.denoise(torch.zeros(2, 9, 7), 1.0)
    assert other.shape == (2, 9, 7)
    assert torch.allclose(other, (images[:2].mean() + 4).expand(2, 9, 7))


def test_shrink_is_the_best_scalar():
    clean = blobs(500, 48, 48)
    images = clean + noise(clean, 3.0)
    out = shrink.Method().denoise(images, 3.0)
    best = float((images * clean).sum() / images.square().sum())
    assert float((out / images).median()) == pytest.approx(best, rel=0.02)
    assert torch.equal(shrink.Method().denoise(images, 1e3), torch.zeros_like(images))


def test_lowpass_oracle_is_the_best_isotropic_filter():
    clean = blobs(300, 48, 48)
    sigma = 3.0
    images = clean + noise(clean, sigma)
    method = lowpass_oracle.Method()
    with pytest.raises(CryobenchError, match="fit"):
        method.denoise(images, sigma)
    method.fit(TrainingData("clean-pairs", images, clean, sigma, 1.0), BUDGET)
    oracle = error(method.denoise(images, sigma), clean)
    for module in (mean, gaussian, lowpass):
        assert oracle < error(module.Method().denoise(images, sigma), clean)
    # the gains that no filter of rings can beat, from the truth ring by ring
    power = method.state["power"]
    ring = (dct.radius(48, 48) * 96).round().long()
    truth, seen = dct.dct2(clean - clean.mean()), dct.dct2(images - clean.mean())
    top, bottom = torch.zeros(200), torch.zeros(200)
    top.index_add_(0, ring.flatten(), (truth * seen).mean(0).flatten())
    bottom.index_add_(0, ring.flatten(), seen.square().mean(0).flatten())
    best = error(dct.idct2(seen * (top / bottom.clamp(min=1e-9))[ring]) + clean.mean(), clean)
    assert oracle < best * 1.02
    assert method.denoise(images[:1, :33, :40], sigma).shape == (1, 33, 40)
    assert torch.isfinite(power).all()
    assert torch.allclose(method.denoise(images + 9, sigma), method.denoise(images, sigma) + 9, atol=1e-4)


def test_lowpass_oracle_may_not_learn_from_noisy_images():
    images = blobs(3, 16, 16)
    with pytest.raises(SupervisionError):
        lowpass_oracle.Method().fit(TrainingData("noisy", images, images, 1.0, 1.0), BUDGET)
