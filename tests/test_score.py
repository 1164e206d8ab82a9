"""Score: what the loss has as its minimum, in closed form, and what a network makes of it on Gaussian images."""

import math

import pytest
import torch
from torch import Tensor, nn

from cryobench.errors import CryobenchError
from cryobench.imaging.training_data import TrainingData
from cryobench.methods.base import Budget
from cryobench.methods.score import Method

SIZE, SIGMA = 16, 0.5


def new(**options: object) -> Method:
    return Method(Method.config_for("smoke", **options))


def power() -> Tensor:
    """Power spectrum (16, 9) of the Gaussian images below, whose noise has power 1: 6 where it is strongest."""
    k = torch.fft.fftfreq(SIZE)[:, None].square() + torch.fft.rfftfreq(SIZE).square()
    return 6 * torch.exp(-k / (2 * 0.12**2))


def fields(n: int, generator: torch.Generator) -> Tensor:
    white = torch.randn(n, SIZE, SIZE, generator=generator)
    return torch.fft.irfft2(torch.fft.rfft2(white) * power().sqrt(), s=(SIZE, SIZE))


def wiener(z: Tensor, tau: float) -> Tensor:
    """E[x | z] of such images in noise of variance 1 + tau^2."""
    gain = power() / (power() + 1 + tau**2)
    return torch.fft.irfft2(torch.fft.rfft2(z) * gain, s=(SIZE, SIZE))


@pytest.fixture(scope="module")
def fitted() -> Method:
    """Fitted on pairs of Gaussian images around 3, in units in which the noise is ``SIGMA``."""
    generator = torch.Generator().manual_seed(0)
    x = fields(1000, generator)
    first, second = (3 + SIGMA * (x + torch.randn(x.shape, generator=generator)) for _ in range(2))
    size = {"widths": (24, 32), "steps": 400, "batch_size": 16, "learning_rate": 4e-3, "ema": 0.97}
    method = new(**size, at_zero=0.4, self_ensemble=False)
    method.fit(TrainingData("noisy-pairs", first, None, SIGMA, 4.0, second=second), Budget(progress=False))
    return method


class Gains(nn.Module):
    """D(z, tau) = gain z with one gain for each of the ranges of tau."""

    def __init__(self, edges: Tensor) -> None:
        super().__init__()
        self.edges, self.gain = edges, nn.Parameter(torch.zeros(len(edges) + 1))

    def forward(self, z: Tensor, tau: Tensor) -> Tensor:
        return self.gain[torch.bucketize(tau, self.edges)][:, None, None, None] * z


def test_the_minimum_is_the_posterior_mean_at_every_level() -> None:
    """White Gaussian images of variance v: E[x | z] = v / (v + 1 + tau^2) z, although no clean image was shown."""
    v, generator = 2.0, torch.Generator().manual_seed(0)
    x = math.sqrt(v) * torch.randn(20_000, 1, 4, 4, generator=generator)
    first, second = (x + torch.randn(x.shape, generator=generator) for _ in range(2))
    method = new(at_zero=0.3)
    edges = torch.cat([torch.tensor([1e-6]), torch.logspace(math.log10(0.25), math.log10(4.0), 21)[1:-1]])
    net = Gains(edges)
    slopes = []
    for start in (0.0, 1.0):  # the loss is a parabola in each gain: two slopes give its minimum
        net.gain.data.fill_(start)
        torch.manual_seed(1)
        (slope,) = torch.autograd.grad(method.loss(net, first, second), net.gain)
        slopes.append(slope)
    found = slopes[0] / (slopes[0] - slopes[1])
    inner = (edges[1:-1] * edges[2:]).sqrt()
    tau = torch.cat([torch.zeros(1), (0.25 * edges[1:2]).sqrt(), inner, (edges[-1:] * 4.0).sqrt()])
    torch.testing.assert_close(found, v / (v + 1 + tau**2), atol=0.02, rtol=0.03)


def test_levels_drawn() -> None:
    method, source = new(at_zero=0.25), torch.randn(4000, 1, 4, 4)
    torch.manual_seed(0)
    z, tau = method.renoised(source)
    assert float((tau == 0).float().mean()) == pytest.approx(0.25, abs=0.03)
    some = tau > 0
    assert float(tau[some].min()) >= 0.25 > 0.24
    assert float(tau[some].max()) <= 4.0
    assert float(tau[some].log().mean()) == pytest.approx(0, abs=0.05)  # the mean of log 1/4 and log 4
    added = (z - source)[some] / tau[some, None, None, None]
    assert float(added.std()) == pytest.approx(1, abs=0.01)
    assert torch.equal(z[~some], source[~some])


def test_the_network_learns_the_score_of_gaussian_images(fitted: Method) -> None:
    """Against -(C + t^2)^-1 z, at the images' own level and above it."""
    generator = torch.Generator().manual_seed(9)
    x = fields(60, generator)
    for tau, allowed in ((0.0, 0.08), (0.5, 0.08), (2.0, 0.15)):
        z = x + math.sqrt(1 + tau**2) * torch.randn(x.shape, generator=generator)
        exact = wiener(z, tau)
        images = 3 + SIGMA * z
        error = (fitted.posterior_mean(images, SIGMA, tau) - 3) / SIGMA - exact
        assert float(error.square().mean() / exact.square().mean()) < allowed, tau
        exact_score = (exact - z) / ((1 + tau**2) * SIGMA)
        error = fitted.score(images, SIGMA, tau) - exact_score
        assert float(error.square().mean() / exact_score.square().mean()) < allowed, tau


def test_a_step_along_the_score_is_the_denoised_image(fitted: Method) -> None:
    images = 3 + SIGMA * torch.randn(3, SIZE, SIZE)
    step = images + SIGMA**2 * fitted.score(images, SIGMA)
    torch.testing.assert_close(step, fitted.denoise(images, SIGMA), atol=1e-5, rtol=1e-5)


def test_told_the_wrong_level_it_is_worse(fitted: Method) -> None:
    generator = torch.Generator().manual_seed(4)
    x = fields(100, generator)
    images = 3 + SIGMA * (x + math.sqrt(5) * torch.randn(x.shape, generator=generator))
    right, wrong = (((fitted.posterior_mean(images, SIGMA, t) - 3) / SIGMA - x).square().mean() for t in (2.0, 0.0))
    assert right < 0.9 * wrong


def test_needs_training() -> None:
    with pytest.raises(CryobenchError, match="not been trained"):
        new().score(torch.randn(1, SIZE, SIZE), 1.0)
