"""sr3 and sr3-post: what the network is told, what the loss is, what averaging does, how a fit goes on."""

import copy
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from blobs import BlobData
from torch import Tensor

from cryobench.bench.experiment import Cell, Experiment
from cryobench.errors import CryobenchError
from cryobench.imaging.turns import turn, turn_back
from cryobench.methods import sr3, sr3_post
from cryobench.methods.base import Budget
from cryobench.methods.training import BudgetSpent

QUIET = Budget(progress=False)


@pytest.fixture(scope="module")
def fitted() -> sr3.Method:
    method = sr3.Method(sr3.Method.config_for("smoke"))
    method.fit(BlobData(), QUIET)
    return method


@pytest.fixture(scope="module")
def post() -> sr3_post.Method:
    method = sr3_post.Method(sr3_post.Method.config_for("smoke"))
    method.fit(BlobData(), QUIET)
    return method


def held_out() -> tuple[Tensor, Tensor]:
    return BlobData()._images(32, seed=77)


def test_the_papers_values_are_the_defaults() -> None:
    config = sr3.Config()
    assert (config.diffusion_steps, config.first_beta, config.last_beta) == (2000, 1e-6, 1e-2)
    assert (config.sampler, config.sampling_steps, config.samples) == ("ancestral", 2000, 1)
    assert (config.skip, config.combine, config.weighting) == (False, False, 0.0)
    assert not sr3_post.Config().sees_noisy


def test_what_is_combined_knows_all_that_the_two_images_know() -> None:
    """Best linear estimates of y_0 from (x, y_t) and from the combination alone have the same error, and its spread
    is 1: in closed form, from covariances, at all levels to 1."""
    net = sr3.Network(sr3.Config(widths=(8,), blocks=1, combine=True))
    scale = 0.32
    net.scale.fill_(scale)
    for level in (0.0067, 0.3, 0.9, 0.9999, 1.0):
        # the combination's coefficients of x and of y_t, read off from unit images
        unit = torch.eye(2)[:, :, None, None]
        a, b = net.combined(unit, torch.full((2, 1, 1, 1), level)).flatten().tolist()
        noise = 1 - level**2
        signal = a * scale + b * level
        variance = signal**2 + a**2 + b**2 * noise
        assert math.isclose(variance, 1, rel_tol=1e-4)
        joint = 1 / (1 + scale**2 + level**2 / max(noise, 1e-12))  # variance of y_0 given both
        assert math.isclose(1 - signal**2 / variance, joint, rel_tol=2e-3, abs_tol=2e-6)


def test_without_its_last_layer_the_network_knows_the_noise_of_a_noisy_image() -> None:
    """skip: y_t is noise where gamma is 0, so sqrt(1 - gamma) y_t is the best guess that asks for no learning."""
    x = torch.randn(3, 2, 16, 16)
    levels = torch.tensor([0.0, 0.6, 1.0])
    for skip in (False, True):
        net = sr3.Network(sr3.Config(widths=(8, 16), blocks=1, patch=2, skip=skip))
        torch.nn.init.zeros_(net.unet.leave.weight)
        torch.nn.init.zeros_(net.unet.leave.bias)
        expected = torch.tensor([1.0, 0.8, 0.0])[:, None, None, None] * x[:, 1:] * skip
        assert torch.allclose(net(x, levels), expected, atol=1e-6)


class Oracle:
    """Knows the clean images, and says the noise plus a fixed error."""

    def __init__(self, clean: Tensor, wrong: float) -> None:
        self.clean, self.wrong, self.scale = clean, wrong, torch.tensor(2.0)

    def __call__(self, pair: Tensor, levels: Tensor) -> Tensor:
        self.levels = level = levels[:, None, None, None]
        noise = (pair[:, 1:] - level * self.clean / self.scale) / (1 - level**2).sqrt()
        return noise + self.wrong


def test_the_loss_is_the_squared_error_of_the_noise() -> None:
    clean = torch.randn(64, 1, 8, 8)
    method = sr3.Method(sr3.Config())
    for wrong in (0.0, 0.5):
        oracle = Oracle(clean, wrong)
        assert math.isclose(float(method.loss(oracle, clean, clean)), wrong**2, abs_tol=1e-3)
    weighted = sr3.Method(sr3.Config(weighting=0.5)).loss(oracle, clean, clean)
    assert math.isclose(float(weighted), 0.25 * float((1 / oracle.levels).mean()), rel_tol=1e-2)


def test_beats_the_noise_and_a_scaled_copy(fitted: sr3.Method, post: sr3_post.Method) -> None:
    data = BlobData()
    clean, noisy = held_out()
    shrink = float(((clean - clean.mean()) * (noisy - noisy.mean())).sum() / (noisy - noisy.mean()).square().sum())
    best_scaled = (noisy.mean() + shrink * (noisy - noisy.mean()) - clean).square().mean()
    for method in (fitted, post):
        error = (method.denoise(noisy, data.sigma) - clean).square().mean()
        assert error < 0.5 * best_scaled < 0.5 * data.sigma**2


def test_the_result_is_the_mean_of_its_samples(fitted: sr3.Method) -> None:
    _, noisy = held_out()
    samples = fitted.draw(noisy, 0.3, 3)
    assert samples.shape == (3, *noisy.shape)
    assert torch.allclose(samples[:2].mean(dim=0), fitted.denoise(noisy, 0.3), atol=1e-6)
    assert float((samples[0] - samples[2]).std()) > 0.01
    *_, (last, guess) = fitted.path(noisy, 0.3, sample=2)
    assert torch.equal(last, samples[2])
    assert torch.allclose(last, guess, atol=1e-6)
    # images in a stack have noise of their own: the same image twice is drawn differently
    twice = fitted.draw(noisy[:1].repeat(2, 1, 1), 0.3, 1)[0]
    assert float((twice[0] - twice[1]).std()) > 0.01


def test_pairs_of_samples_are_drawn_for_turned_images(fitted: sr3.Method, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(2, 40, 24, generator=torch.Generator().manual_seed(3))
    samples = fitted.draw(images, 1.0, 3)
    assert fitted.config.antithetic
    assert samples.shape == (3, 2, 40, 24)
    monkeypatch.setattr(sr3, "TURNS", [(0, False)] * 8)
    assert torch.equal(fitted.draw(images, 1.0, 2), samples[:2])
    expected = turn_back(fitted.draw(turn(images, 1), 1.0, 3)[2], 1)
    torch.testing.assert_close(samples[2], expected)
    assert not torch.allclose(fitted.draw(images, 1.0, 3)[2], expected, atol=0.01)


def test_averaging_and_opposite_noise_lower_the_error(fitted: sr3.Method) -> None:
    clean, noisy = held_out()
    errors = {}
    for antithetic in (False, True):
        method = copy.copy(fitted)
        method.config = replace(fitted.config, antithetic=antithetic)
        samples = method.draw(noisy, 0.3, 6)
        errors[antithetic] = float((samples.unflatten(0, (3, 2)).mean(dim=1) - clean).square().mean())
    one = float((samples - clean).square().mean())
    assert errors[True] < errors[False] < one
    # of independent samples, two halve what is not common to them
    independent = fitted.__class__(replace(fitted.config, antithetic=False))
    independent.state = fitted.state
    samples = independent.draw(noisy, 0.3, 6)
    variance = float(samples.var(dim=0).mean())
    one = float((samples - clean).square().mean())
    assert math.isclose(one - errors[False], variance / 2, rel_tol=0.1)


def test_ancestral_sampling_works_too(fitted: sr3.Method) -> None:
    clean, noisy = held_out()
    method = copy.copy(fitted)
    method.config = replace(fitted.config, sampler="ancestral", sampling_steps=20)
    a, b = method.draw(noisy[:8], 0.3, 2)
    assert float((a - b).std()) > 0.01
    assert float((a - clean[:8]).square().mean()) < 0.3**2
    assert torch.equal(a, method.draw(noisy[:8], 0.3, 1)[0])


def test_samples_keep_to_the_range_of_the_training_images(fitted: sr3.Method) -> None:
    _, noisy = held_out()
    data = BlobData()
    low, high = (float(v) - float(data.clean.mean()) + float(noisy.mean()) for v in data.clean.aminmax())
    for sample in fitted.draw(noisy, data.sigma, 2):
        assert low - 1e-4 <= float(sample.min())
        assert float(sample.max()) <= high + 1e-4


def test_micrograph(fitted: sr3.Method) -> None:
    image = torch.randn(1, 600, 301)
    assert fitted.denoise(image, 1.0).shape == image.shape


def test_needs_training_and_a_number_of_steps(fitted: sr3.Method) -> None:
    for module in (sr3, sr3_post):
        with pytest.raises(CryobenchError, match="not been trained"):
            module.Method(module.Method.config_for("smoke")).denoise(torch.randn(1, 16, 16), 1.0)
    method = copy.copy(fitted)
    method.config = replace(fitted.config, sampling_steps=5000)
    with pytest.raises(CryobenchError, match="1 to 2000 steps"):
        method.denoise(torch.randn(1, 16, 16), 1.0)


def test_the_unet_sees_the_sample_and_the_noisy_image_only_if_asked(post: sr3_post.Method) -> None:
    _, noisy = held_out()
    normalised = (noisy - noisy.mean()) / 0.3
    sample = post.diffusion().denoise(normalised, 1.0)
    for sees_noisy, expected in ((False, [sample]), (True, [normalised, sample])):
        method = sr3_post.Method(replace(post.config, sees_noisy=sees_noisy))
        method.state = post.state
        assert torch.equal(method.seen(normalised), torch.stack(expected, dim=1))
        assert method.network()(method.seen(normalised)).shape == (32, 1, 32, 32)


def test_the_diffusion_model_is_that_of_sr3(fitted: sr3.Method, post: sr3_post.Method) -> None:
    assert post.diffusion().state.keys() == fitted.state.keys()
    assert all(torch.equal(value, fitted.state[name]) for name, value in post.diffusion().state.items())


def test_its_training_samples_are_of_images_the_diffusion_model_never_saw() -> None:
    data = BlobData()
    steps: list[int] = []
    draw = data.batch

    def noted(step: int, *args: Any) -> tuple[Tensor, Tensor]:
        steps.append(step)
        return draw(step, *args)

    data.batch = noted  # type: ignore[method-assign]
    config = sr3_post.Method.config_for("smoke", steps=3, post_steps=2, outputs=70)
    sr3_post.Method(config).fit(data, QUIET)
    assert set(steps) == {0, 1, 2, 3, 4}, "three steps of training, then two parts of outputs"


@pytest.mark.parametrize("sees_noisy", [False, True])
def test_training_samples_are_those_of_the_noisy_images(post: sr3_post.Method, sees_noisy: bool) -> None:
    method = sr3_post.Method(replace(post.config, sees_noisy=sees_noisy))
    method.state = post.state
    noisy, samples, clean = method.outputs(BlobData())
    assert noisy.shape == samples.shape == clean.shape == (64, 32, 32)
    assert math.isclose(float((noisy - clean).std()), 1, rel_tol=0.02)
    assert float((samples - clean).square().mean()) < 0.5
    assert all(torch.equal(a, b) for a, b in zip(method.outputs(BlobData()), (noisy, samples, clean), strict=True))
    # with the noise that test images are given, a U-Net could know the samples' noise by heart
    assert float((samples - method.diffusion().denoise(noisy, 1.0)).std()) > 0.01


def test_a_fit_in_pieces_is_the_whole_fit(tmp_path: Path) -> None:
    """Both stages stop when the time is up, and go on; no checkpoint but the last stage's is left."""
    config = sr3_post.Method.config_for("smoke", steps=3, post_steps=3, outputs=8, sampling_steps=2)
    whole, pieces = sr3_post.Method(config), sr3_post.Method(config)
    whole.fit(BlobData(), QUIET)
    budget = Budget(seconds=0.0, checkpoint=tmp_path / "checkpoint.pt", progress=False)
    stops = 0
    while stops < 20:
        try:
            pieces.fit(BlobData(), budget)
            break
        except BudgetSpent:
            stops += 1
            pieces = sr3_post.Method(config)  # as after a kill: only the files are left
    assert stops == 4, "each stage of three steps is stopped after its first and its second"
    assert pieces.state.keys() == whole.state.keys()
    assert all(torch.equal(pieces.state[name], value) for name, value in whole.state.items())
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.slow
def test_a_hundredth_of_the_steps_costs_less_than_a_tenth_of_a_decibel() -> None:
    """The quick network: mean of four samples by ``ddim`` in 20 steps against the paper's 2,000 ancestral ones."""
    run = Experiment(Cell("zhang2024", "channel", "sr3", "quick", 0), "cpu")
    method = sr3.Method(run.config, seed=1)
    method.fit(run.train, QUIET)
    noisy, clean = run.test.noisy[:16], run.test.clean[:16]

    def measured(**sampling: Any) -> tuple[float, float]:
        """PSNR of the mean, as of images with range 1 (dB), and seconds."""
        other = copy.copy(method)
        other.config = replace(method.config, samples=4, **sampling)
        started = time.monotonic()
        error = (other.denoise(noisy, run.test.sigma) - clean).square().mean()
        return -10 * float(error.log10()), time.monotonic() - started

    many, slow = measured(sampler="ancestral", sampling_steps=2000)
    for sampler in ("ddim", "dpm"):
        few, fast = measured(sampler=sampler, sampling_steps=20)
        print(f"{sampler}, 20 steps: {few:.2f} dB in {fast:.1f} s; ancestral, 2000: {many:.2f} dB in {slow:.0f} s")
        assert slow > 20 * fast
        assert few > many - 0.1
