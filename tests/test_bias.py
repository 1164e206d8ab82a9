"""Signal, bias and noise against closed forms, and from pairs against the truth."""

import math

import pytest
import torch
from torch import Tensor

from cryobench.errors import CryobenchError
from cryobench.imaging.particles import Simulation, Simulator
from cryobench.metrics.bias import Powers, best_filter, powers
from cryobench.metrics.spectral import ring_power

SHAPE = (33, 40)
SNR = 0.25


def white(n: int, seed: int, shape: tuple[int, int] = SHAPE) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exposures(n: int = 400, shape: tuple[int, int] = SHAPE) -> tuple[Tensor, Tensor, Tensor]:
    """Clean images of variance 1 around a mean image of their own, and two exposures at SNR 1/4."""
    clean = white(n, 0, shape) + 3 * white(1, 9, shape)
    return clean, clean + 2 * white(n, 1, shape), clean + 2 * white(n, 2, shape)


def gauss(images: Tensor, width: float) -> tuple[Tensor, Tensor]:
    """Periodic Gaussian filter and its transfer function, in the layout of rfft2."""
    h, w = images.shape[-2:]
    k2 = torch.fft.fftfreq(h, dtype=torch.float64)[:, None] ** 2 + torch.fft.rfftfreq(w, dtype=torch.float64) ** 2
    transfer = torch.exp(-2 * math.pi**2 * width**2 * k2)
    return torch.fft.irfft2(torch.fft.rfft2(images) * transfer, s=(h, w)), transfer


@pytest.mark.parametrize("factor", [0.01, 1.0, 37.0])
def test_any_multiple_of_the_input_keeps_the_snr(factor: float) -> None:
    clean, y1, y2 = exposures(60)
    for p in powers(y1, y2, factor * y1 + 5, factor * y2 + 5):  # exactly, in total and in each ring
        assert torch.allclose(p.snbr_scale_free, p.snr, rtol=1e-9)
        assert torch.allclose(p.gain, torch.full_like(p.gain, factor), rtol=1e-9)
    total, _ = powers(y1, y2, factor * y1 + 5, factor * y2 + 5, clean)  # but for the accidental likeness of s and n
    assert float(total.snbr_scale_free) == pytest.approx(float(total.snr), rel=0.05)
    assert float(total.gain) == pytest.approx(factor, rel=0.05)


def test_the_best_number_makes_snbr_one_plus_snr() -> None:
    """FACTS 0.4: a published SNBR of 1.4 at SNR 0.14 is to be read against 1.14, not against 0.14."""
    clean, y1, y2 = exposures()
    best = SNR / (1 + SNR)
    for reference in (None, clean):
        total, _ = powers(y1, y2, best * y1, best * y2, reference)
        assert float(total.snr) == pytest.approx(SNR, rel=0.01)
        assert float(total.snbr) == pytest.approx(1 + SNR, rel=0.01)
        assert float(total.signal / total.noise_out) == pytest.approx((1 + SNR) ** 2 / SNR, rel=0.02)


def test_an_output_that_ignores_its_input_knows_nothing() -> None:
    clean, y1, y2 = exposures(50)
    mean = clean.mean(0).expand_as(clean)  # the blank image, drawn as well as can be
    for reference in (None, clean):
        total, rings = powers(y1, y2, mean, mean, reference)
        assert float(total.snbr) == pytest.approx(1, abs=1e-12)
        assert float(total.snbr_scale_free) == 0
        assert torch.allclose(rings.bias, rings.signal)


def test_noise_and_bias_add_up_to_the_error() -> None:
    """An identity, for any f: here a nonlinear one. Means of the stack are removed, sums have n - 1 in them."""
    clean, y1, y2 = exposures(30)
    d1, d2 = y1.tanh() + 0.1 * y1**2, y2.tanh() + 0.1 * y2**2
    total, rings = powers(y1, y2, d1, d2, clean)
    error = [(d - clean) - (d - clean).mean(0) for d in (d1, d2)]
    mse = sum(float(e.square().sum() / (29 * e[0].numel())) for e in error) / 2
    assert float(total.noise_out + total.bias) == pytest.approx(mse, rel=1e-12)
    assert float(total.snbr) == pytest.approx(float(total.signal) / mse, rel=1e-12)
    per_ring = sum(ring_power(e) for e in error) / 2 * 30 / 29
    assert torch.allclose(rings.noise_out + rings.bias, per_ring)


@pytest.mark.parametrize("shape", [(27, 34), (20, 20), (27, 27)])
@pytest.mark.parametrize("truth", [False, True])
def test_a_linear_filter_ring_by_ring(shape: tuple[int, int], truth: bool) -> None:
    clean, y1, y2 = exposures(1500, shape)
    (d1, transfer), (d2, _) = gauss(y1, 0.7), gauss(y2, 0.7)
    total, rings = powers(y1, y2, d1, d2, clean if truth else None)
    expected = {
        "signal": torch.ones_like(transfer),
        "noise": 4 * torch.ones_like(transfer),
        "noise_out": 4 * transfer**2,
        "bias": (1 - transfer) ** 2,
        "cross": transfer,
    }
    for name, plane in expected.items():
        # the image whose transform is sqrt(plane) has the mean of plane over a ring as its power there
        wanted = ring_power(torch.fft.irfft2(plane.sqrt(), s=shape, norm="ortho")[None])
        assert torch.allclose(getattr(rings, name)[2:], wanted[2:], atol=0.2), name
        whole = float(plane.sum())  # to be weighted: each column but the first stands for two
        whole = 2 * whole - float(plane[:, 0].sum()) - (float(plane[:, -1].sum()) if shape[1] % 2 == 0 else 0)
        assert float(getattr(total, name)) == pytest.approx(whole / (shape[0] * shape[1]), abs=0.03), name


@pytest.mark.parametrize("shape", [(24, 24), (21, 30)])
def test_the_best_weighting_of_rings_is_the_wiener_filter(shape: tuple[int, int]) -> None:
    """Applied, the weights S / (S + N) reach what best_filter says; others stay below, except their multiples."""
    clean = gauss(white(500, 0, shape), 1.5)[0]
    y1, y2 = clean + 0.3 * white(500, 1, shape), clean + 0.3 * white(500, 2, shape)
    _, squared = gauss(y1, 1.5 * math.sqrt(2))  # power of the filtered white noise
    reached = []
    for weights in (squared / (squared + 0.09), squared, torch.ones_like(squared)):
        d1, d2 = (torch.fft.irfft2(torch.fft.rfft2(y) * weights, s=shape) for y in (y1, y2))
        total, rings = powers(y1, y2, d1, d2, clean)
        reached.append(float(total.snbr_scale_free))
    assert reached[0] == pytest.approx(best_filter(rings, shape), rel=0.03)
    assert reached[0] > 1.1 * max(reached[1:])


def test_pairs_and_truth_agree_on_simulated_particles() -> None:
    """Within Monte-Carlo error, found from ten disjoint parts of the stack; the truth is much less noisy."""
    grid = torch.arange(24) - 12
    z, y, x = torch.meshgrid(grid, grid, grid, indexing="ij")
    volume = sum(
        torch.exp(-((x - a) ** 2 + (y - b) ** 2 + (z - c) ** 2) / 8.0) for a, b, c in ((4, 0, 0), (0, 5, 0), (-3, 0, 4))
    )
    simulator = Simulator(torch.as_tensor(volume), Simulation(24, pixel_size=4.0, snr=0.2))
    data = simulator.simulate(1500, seed=1)
    second, _ = simulator.noisy(data.clean, 7, data.sigma)
    denoised = [gauss(y.double(), 1.5)[0].tanh() for y in (data.noisy, second)]
    names = ("signal", "noise", "noise_out", "bias", "gain", "snbr", "snbr_scale_free")

    def both(part: slice) -> tuple[Tensor, Tensor]:
        stacks = [s[part] for s in (data.noisy, second, *denoised)]
        pairs, truth = powers(*stacks)[0], powers(*stacks, data.clean[part])[0]
        return tuple(torch.tensor([float(getattr(p, n)) for n in names]) for p in (pairs, truth))

    pairs, truth = (torch.stack(v) for v in zip(*(both(slice(k, None, 10)) for k in range(10)), strict=True))
    error = (pairs - truth).std(0) / math.sqrt(10)
    whole = both(slice(None))
    assert bool(((whole[0] - whole[1]).abs() < 4 * error + 1e-9).all())
    assert bool(((whole[0] / whole[1] - 1).abs() < 0.2).all())
    assert float(pairs[:, 3].std() / truth[:, 3].std()) > 2


def test_what_is_not_there_is_not_made_positive() -> None:
    """Real parts, not absolute values: without signal, S is as often negative as positive."""
    y1, y2 = white(200, 1), white(200, 2)
    _, rings = powers(y1, y2, y1, y2)
    assert 0.2 < float((rings.signal < 0).double().mean()) < 0.8
    assert abs(float(rings.signal[5:].mean())) < 0.01


def test_refusals() -> None:
    y = white(2, 0)
    with pytest.raises(CryobenchError, match="shape"):
        powers(y, y, y, y[:1])
    with pytest.raises(CryobenchError, match="two"):
        powers(y[:1], y[:1], y[:1], y[:1])
    zero = torch.zeros(())
    assert float(Powers(zero, zero, zero, zero, zero).snbr) == 0
