"""Scores against scikit-image, numpy and closed forms."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity

from cryobench.errors import CryobenchError
from cryobench.metrics.bootstrap import paired, summarise
from cryobench.metrics.conventions import CONVENTIONS, score, unit_range
from cryobench.metrics.images import affine_fit, mse, psnr, ssim, ssim_uniform
from cryobench.metrics.spectral import frc, resolution, ring_frequencies, ring_power

SHAPES = [(3, 64, 64), (1, 11, 11), (2, 37, 52), (2, 81, 33)]


def stack(shape: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth bright spots in [0, 1] and the same with noise."""
    g = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.linspace(-1, 1, shape[1]), torch.linspace(-1, 1, shape[2]), indexing="ij")
    shift = torch.rand(shape[0], 2, generator=g)[:, :, None, None] - 0.5
    clean = torch.exp(-6 * ((x - shift[:, 0]) ** 2 + (y - shift[:, 1]) ** 2))
    return clean, clean + 0.4 * torch.randn(shape, generator=g)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("data_range", [1.0, 2.0, 0.3])
def test_image_scores_are_those_of_scikit_image(shape: tuple[int, ...], data_range: float) -> None:
    clean, noisy = stack(shape)
    for i in range(shape[0]):
        a, b = noisy[i].double().numpy(), clean[i].double().numpy()
        gaussian = structural_similarity(
            a, b, data_range=data_range, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert ssim(noisy, clean, data_range)[i].item() == pytest.approx(gaussian, abs=1e-5)
        uniform = structural_similarity(a, b, data_range=data_range)
        assert ssim_uniform(noisy, clean, data_range)[i].item() == pytest.approx(uniform, abs=1e-5)
        assert mse(noisy, clean)[i].item() == pytest.approx(mean_squared_error(a, b), rel=1e-9)
        expected = peak_signal_noise_ratio(b, a, data_range=data_range)
        assert psnr(noisy, clean, data_range)[i].item() == pytest.approx(expected, abs=1e-9)


def test_ssim_of_many_images_does_not_depend_on_the_chunks() -> None:
    clean, noisy = stack((40, 200, 180))
    assert torch.allclose(ssim(noisy, clean, 1.0)[-3:], ssim(noisy[-3:], clean[-3:], 1.0), atol=1e-12)


def test_ssim_survives_a_large_offset() -> None:
    clean, noisy = stack((2, 40, 40))
    a, b = noisy + 500, clean + 500
    expected = structural_similarity(
        a[0].double().numpy(),
        b[0].double().numpy(),
        data_range=1.0,
        gaussian_weights=True,
        use_sample_covariance=False,
    )
    assert ssim(a, b, 1.0)[0].item() == pytest.approx(expected, abs=1e-5)


def test_perfect_images() -> None:
    clean, _ = stack((2, 20, 31))
    assert torch.isinf(psnr(clean, clean, 1.0)).all()
    assert torch.allclose(ssim(clean, clean, 1.0), torch.ones(2, dtype=torch.float64))


def test_wrong_input_is_refused_in_one_line() -> None:
    clean, noisy = stack((2, 20, 20))
    for call in (
        lambda: mse(clean[0], noisy[0]),
        lambda: psnr(clean, noisy[:1], 1.0),
        lambda: psnr(clean, noisy, 0.0),
        lambda: ssim(clean[:, :10], noisy[:, :10], 1.0),
        lambda: score("fairly", clean, clean),
        lambda: score("fair", clean * 7, clean * 7),
        lambda: score("legacy-zhang2024", clean, clean),
        lambda: summarise(torch.zeros(0)),
        lambda: paired(torch.zeros(3), torch.zeros(4)),
    ):
        with pytest.raises(CryobenchError) as error:
            call()
        assert "\n" not in str(error.value)


def test_affine_fit_is_the_least_squares_line() -> None:
    clean, noisy = stack((2, 21, 30))
    fitted = affine_fit(noisy, clean)
    for i in range(2):
        x, y = noisy[i].double().numpy().ravel(), clean[i].double().numpy().ravel()
        line = np.polyval(np.polyfit(x, y, 1), x)
        assert np.allclose(fitted[i].numpy().ravel(), line, atol=1e-8)
    constant = affine_fit(torch.full((1, 21, 30), 0.1), clean[:1])
    assert torch.allclose(constant, clean[:1].double().mean().expand(1, 21, 30))


def test_fair_fit_removes_gain_and_offset_and_nothing_else() -> None:
    clean, noisy = stack((3, 32, 40))
    plain, moved = score("fair", noisy, clean), score("fair", 0.1 * noisy + 3, clean)
    assert list(plain) == ["mse", "psnr", "ssim", "mse_fit", "psnr_fit", "ssim_fit"]
    for metric in ("mse_fit", "psnr_fit", "ssim_fit"):
        assert torch.allclose(plain[metric], moved[metric], atol=1e-5)
    assert (moved["mse"] > 5 * plain["mse"]).all()
    assert (plain["mse_fit"] <= plain["mse"]).all()


def test_unit_range_is_one_map_for_all() -> None:
    clean, noisy = stack((3, 16, 16))
    a, b = unit_range(5 * clean - 2, 5 * noisy - 2)
    assert a.min() == 0
    assert a.max() == 1
    assert torch.allclose((b - a).std() / (noisy - clean).std(), 1 / (clean.max() - clean.min()), rtol=1e-4)


def test_legacy_zhang_by_hand() -> None:
    clean, noisy = stack((2, 24, 30), seed=3)
    fed, sigma = CONVENTIONS["legacy-zhang2024"].prepare(0.7 * clean, noisy, 0.4)
    n, c = noisy[1].numpy(), clean[1].numpy()
    low, high = n.min(), n.max()
    assert np.allclose(fed[1].numpy(), (n - low) / (high - low), atol=1e-6)
    assert sigma == pytest.approx(np.mean([0.4 / float(np.ptp(i.numpy())) for i in noisy]), rel=1e-5)
    found = score("legacy-zhang2024", fed, 0.7 * clean, prepared=True)
    unit = (c - c.min()) / np.ptp(c)
    assert found["mse"][1].item() == pytest.approx(np.mean((fed[1].numpy() - unit) ** 2), rel=1e-5)
    assert found["psnr"][1].item() == pytest.approx(-10 * math.log10(found["mse"][1].item()), rel=1e-9)
    expected = structural_similarity(fed[1].double().numpy(), unit.astype(float), data_range=2)
    assert found["ssim"][1].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["legacy-zhang2024", "legacy-zhang2024-sigma25", "legacy-zhang2024-clipped"])
def test_legacy_scores_of_an_equivariant_method_need_no_second_pass(name: str) -> None:
    clean, noisy = stack((2, 24, 30), seed=4)

    def half(images: torch.Tensor) -> torch.Tensor:  # shrinks towards the image's mean: equivariant
        return 0.5 * (images + images.mean(dim=(1, 2), keepdim=True))

    convention = CONVENTIONS[name]
    fed, sigma = convention.prepare(clean, noisy if "clipped" not in name else clean, 0.4)
    given = noisy if "clipped" not in name else clean
    first = score(name, half(fed), clean, given, prepared=True)
    second = score(name, half(given), clean, given)
    for metric in first:
        assert torch.allclose(first[metric], second[metric], atol=1e-5)
    if "sigma25" in name:
        assert sigma == 25 / 255


def test_clipping_raises_the_background_and_tang_counts_grey_levels() -> None:
    clean, noisy = stack((4, 40, 40))
    fed, _ = CONVENTIONS["legacy-zhang2024-clipped"].prepare(clean, noisy, 0.4)
    assert fed.min() == 0
    assert fed.max() == 1
    assert (fed - clean).mean() > 0.02
    fed, _ = CONVENTIONS["legacy-tang2022"].prepare(clean, noisy, 0.4)
    assert torch.allclose(fed * 255, (fed * 255).round(), atol=1e-3)
    c = score("legacy-tang2022", fed, clean, prepared=True)
    a, b = (fed[0] * 255).round().numpy().astype(np.uint8), clean[0].numpy()
    b = np.round((b - b.min()) / np.ptp(b) * 255).astype(np.uint8)
    assert c["psnr"][0].item() == pytest.approx(peak_signal_noise_ratio(b, a, data_range=255), abs=1e-4)
    assert c["ssim"][0].item() == pytest.approx(structural_similarity(a, b, data_range=255), abs=1e-4)


def test_rescaled_output_forgets_gain_and_offset() -> None:
    clean, noisy = stack((2, 24, 24))
    assert CONVENTIONS["legacy-zhang2024-rescaled"].prepare is None
    a = score("legacy-zhang2024-rescaled", noisy, clean)
    b = score("legacy-zhang2024-rescaled", 3 * noisy - 1, clean)
    assert torch.allclose(a["mse"], b["mse"], rtol=1e-4)


def numpy_frc(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The definition, over the full transform."""
    h, w = x.shape[1:]
    fx, fy = np.fft.fft2(x.astype(float)), np.fft.fft2(y.astype(float))
    radius = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.fftfreq(w)[None])
    ring = np.round(radius * min(h, w)).astype(int)
    out = []
    for k in range(min(h, w) // 2 + 1):
        a, b = fx[:, ring == k], fy[:, ring == k]
        out.append((a * b.conj()).sum().real / np.sqrt((abs(a) ** 2).sum() * (abs(b) ** 2).sum()))
    return np.array(out)


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 15, 15), (2, 17, 24), (300, 12, 9)])
def test_frc_is_the_definition(shape: tuple[int, ...]) -> None:
    clean, noisy = stack(shape)
    curve = frc(noisy, clean)
    assert np.allclose(curve.numpy(), numpy_frc(noisy.numpy(), clean.numpy()), atol=1e-6)
    assert len(curve) == len(ring_frequencies(shape[1:])) == min(shape[1:]) // 2 + 1
    assert torch.allclose(frc(-2 * clean, clean), -torch.ones_like(curve))


def test_frc_of_an_empty_image_is_zero_and_of_noise_near_zero() -> None:
    clean, _ = stack((4, 20, 20))
    assert (frc(torch.zeros_like(clean), clean) == 0).all()
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(200, 32, 32, generator=g), torch.randn(200, 32, 32, generator=g)
    assert frc(a, b)[2:].abs().max() < 0.1


@pytest.mark.parametrize("shape", [(400, 16, 16), (400, 15, 22)])
def test_white_noise_has_its_variance_in_every_ring(shape: tuple[int, ...]) -> None:
    noise = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    # ring 0 holds one coefficient of one degree of freedom per image: 7 % standard error
    assert torch.allclose(
        ring_power(noise), torch.full((min(shape[1:]) // 2 + 1,), 9.0, dtype=torch.float64), rtol=0.25
    )
    assert ring_power(noise)[2:].mean() == pytest.approx(9.0, rel=0.03)


def test_ring_power_keeps_the_energy_of_a_plane_wave() -> None:
    h, w = 21, 32
    wave = torch.cos(2 * torch.pi * 3 * torch.arange(w) / w).expand(1, h, w)
    # 3/32 cycles per pixel is ring round(21 * 3 / 32) = 2; energy h w / 2 over the ring's coefficients
    power = ring_power(wave)
    assert power.argmax() == 2
    assert power[[0, 1, 3, 4]].max() < 1e-9


def test_resolution_is_the_first_downward_crossing() -> None:
    curve = torch.tensor([0.0, 1.0, 0.9, 0.5, 0.1, 0.9, 0.0])
    # 12 px: between rings 3 and 4 at 3 + (0.5 - 0.143) / 0.4
    assert resolution(curve, 1.5, (12, 12), 0.143) == pytest.approx(1.5 * 12 / (3 + 0.357 / 0.4))
    assert resolution(curve, 1.5, (12, 12), 0.5) == pytest.approx(1.5 * 12 / 3)
    assert resolution(torch.ones(7), 1.5, (13, 40), 0.143) == pytest.approx(1.5 * 13 / 6)
    assert resolution(torch.zeros(7), 1.5, (12, 12), 0.143) is None
    with pytest.raises(CryobenchError):
        resolution(torch.zeros(6), 1.5, (12, 12), 0.143)


def test_summary_of_known_values() -> None:
    values = torch.arange(100, dtype=torch.float64)
    found = summarise(values, seed=3)
    assert found == summarise(values, seed=3)
    assert found["ci95"] != summarise(values, seed=4)["ci95"]
    assert (found["mean"], found["n"]) == (49.5, 100)
    assert found["std"] == pytest.approx(np.std(np.arange(100), ddof=1))
    half = 1.96 * found["std"] / 10
    assert found["ci95"] == pytest.approx([49.5 - half, 49.5 + half], abs=0.4)
    assert summarise(torch.tensor([2.0])) == {"mean": 2.0, "std": None, "n": 1, "ci95": [None, None]}
    assert summarise(torch.tensor([2.0, math.inf]))["mean"] is None


def test_pairing_sees_a_small_difference_that_the_spread_hides() -> None:
    rng = np.random.default_rng(1)
    base = rng.normal(20, 3, 200)
    a, b = base + 0.1 + rng.normal(0, 0.1, 200), base
    low, high = paired(a, b)["ci95"]
    assert 0.05 < low < 0.1 < high < 0.15
    assert summarise(a)["ci95"][0] < summarise(b)["ci95"][1]
