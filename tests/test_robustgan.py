"""RobustGAN: the score is proper, the networks are the authors', contamination does what it says."""

import math

import pytest
import torch
from blobs import BlobData
from torch import Tensor, nn

from cryobench.errors import CryobenchError
from cryobench.methods.base import Budget
from cryobench.methods.nets.residual_gan import Generator, PlainUnit
from cryobench.methods.robustgan import Config, Critic, Method, beta_score, contaminate

QUIET = Budget(progress=False)
CPU = torch.device("cpu")
FAMILY = [(0.5, 0.5), (0.0, 0.0), (1.0, 1.0), (-0.5, -0.5), (0.5, 2.0), (3.0, 0.2)]


def probabilities() -> Tensor:
    return torch.linspace(0.01, 0.99, 981)


@pytest.mark.parametrize(
    ("alpha", "beta", "closed"),
    [
        (0.0, 0.0, lambda p: p.log()),
        (1.0, 1.0, lambda p: -((1 - p) ** 2) / 2),
        (0.5, 0.5, lambda p: (p * (1 - p)).sqrt() - p.sqrt().arccos()),
        (-0.5, -0.5, lambda p: -2 * ((1 - p) / p).sqrt()),  # the loss of boosting
    ],
)
def test_score_in_closed_form(alpha: float, beta: float, closed: object) -> None:
    p = probabilities().double()
    wanted = closed(p)  # type: ignore[operator]
    assert torch.allclose(beta_score(p.float(), True, alpha, beta).double(), wanted, atol=1e-4, rtol=1e-4)
    assert torch.allclose(beta_score(1 - p.float(), False, alpha, beta).double(), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("alpha", "beta"), FAMILY)
def test_slopes_are_the_authors_codes(alpha: float, beta: float) -> None:
    """The code gives the slopes alone: p^(alpha - 1) (1 - p)^beta, and -p^alpha (1 - p)^(beta - 1)."""
    p = probabilities().requires_grad_(True)
    (up,) = torch.autograd.grad(beta_score(p, True, alpha, beta).sum(), p)
    (down,) = torch.autograd.grad(beta_score(p, False, alpha, beta).sum(), p)
    q = p.detach()
    assert torch.allclose(up, q ** (alpha - 1) * (1 - q) ** beta, rtol=2e-3, atol=1e-4)
    assert torch.allclose(down, -(q**alpha) * (1 - q) ** (beta - 1), rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize(("alpha", "beta"), FAMILY)
@pytest.mark.parametrize("truth", [0.1, 0.3, 0.5, 0.85])
def test_score_is_proper(alpha: float, beta: float, truth: float) -> None:
    """Who says the true probability loses least; with the halves of two different scores that is not so."""
    p = probabilities().double()
    lost = -truth * beta_score(p, True, alpha, beta) - (1 - truth) * beta_score(p, False, alpha, beta)
    assert float(p[lost.argmin()]) == pytest.approx(truth, abs=0.003)
    mixed = -truth * beta_score(p, True, alpha, beta) - (1 - truth) * beta_score(p, False, alpha, beta + 1)
    assert abs(float(p[mixed.argmin()]) - truth) > 0.01


def test_the_codes_networks() -> None:
    """Weights counted by hand, 4.2 million in the generator; 13 x 13 opinions on 128 px."""
    widths, units = (64, 128, 256), (3, 3, 3)
    config = Config()
    assert (config.widths, config.units) == (widths, units)
    with torch.device("meta"):
        net, critic = Generator(widths, units, PlainUnit), Critic(config)
        image = torch.empty(1, 1, 128, 128)
    unit = {w: 9 * w * w + 2 * w for w in widths}
    strided = (16 * 64 + 2 * 64) + (16 * 64 * 128 + 2 * 128) + (16 * 128 * 256 + 2 * 256)
    back = (16 * 256 * 128 + 2 * 128) + (16 * 128 * 64 + 2 * 64) + (16 * 64 + 1)
    weights = sum(w.numel() for w in net.parameters())
    assert weights == strided + back + 3 * sum(unit.values()) + 3 * (unit[64] + unit[128])
    assert weights == pytest.approx(4.2e6, rel=0.02)
    assert net(image).shape == image.shape
    assert critic(image).shape == (1, 1, 13, 13)


class Says(nn.Module):
    """A critic with one opinion on everything."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = nn.Parameter(torch.tensor(probability))

    def forward(self, images: Tensor) -> Tensor:
        return self.probability.expand(len(images), 1, 2, 2)


def test_losses() -> None:
    """Cross-entropy at alpha = beta = 0; beyond epsilon nobody is pushed; L1, or L2 where asked for."""
    noisy, clean = torch.full((2, 1, 8, 8), 0.5), torch.zeros(2, 1, 8, 8)
    method = Method(Method.config_for("smoke", alpha=0.0, beta=0.0))
    game = nn.ModuleDict({"generator": nn.Identity(), "critic": Says(0.25)})
    assert float(method.critic_loss(game, noisy, clean)) == pytest.approx(-math.log(0.25) - math.log(0.75), rel=1e-4)
    assert float(method.generator_loss(game, noisy, clean)) == pytest.approx(math.log(0.75) + 10 * 0.5, rel=1e-4)
    squared = Method(Method.config_for("smoke", adversarial=0.0, penalty="l2"))
    assert float(squared.generator_loss(game, noisy, clean)) == pytest.approx(10 * 0.25)
    sure = nn.ModuleDict({"generator": nn.Identity(), "critic": Says(0.001)})
    method.critic_loss(sure, noisy, clean).backward()
    assert float(sure["critic"].probability.grad) == 0.0


def test_critic_learns_every_second_step() -> None:
    method = Method(Method.config_for("smoke", steps=8))
    method.fit(BlobData(), QUIET)
    losses = [row[1] for row in method.info["loss"]]
    assert all(losses[k] == losses[k + 1] for k in range(0, 8, 2))
    assert len(set(losses)) == 4


def pairs(step: int, batch_size: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed * 1000 + step)
    return tuple(2 + k + torch.randn(batch_size, 1, 8, 8, generator=generator) for k in (0, 7))  # type: ignore[return-value]


@pytest.mark.parametrize(("kind", "inputs", "targets"), [("inputs", 1, 0), ("targets", 0, 1), ("both", 1, 1)])
def test_contamination(kind: str, inputs: int, targets: int) -> None:
    """The share it says, what it says, uniform over the range of its kind; by seed and step alone."""
    batch = contaminate(pairs, kind, 0.3)
    clean, dirty = pairs(5, 2000, 3, CPU), batch(5, 2000, 3, CPU)
    for was, now, expected in zip(clean, dirty, (inputs, targets), strict=True):
        changed = (was != now).flatten(1).any(1)
        assert float(changed.float().mean()) == pytest.approx(0.3 * expected, abs=0.04)
        if expected:
            noise, (low, high) = now[changed], was.aminmax()
            assert low <= noise.min() < noise.max() <= high
            assert float(noise.std()) == pytest.approx(float(high - low) / 12**0.5, rel=0.02)
    changed = [(a != b).flatten(1).any(1) for a, b in zip(clean, dirty, strict=True)]
    if kind == "both":
        assert torch.equal(changed[0], changed[1])
        a, b = (d[changed[0]] - d[changed[0]].mean() for d in dirty)
        assert abs(float((a * b).mean() / (a.std() * b.std()))) < 0.02, "input and target are independent noise"
    again = batch(5, 2000, 3, CPU)
    assert all(torch.equal(a, b) for a, b in zip(dirty, again, strict=True))
    assert not torch.equal(batch(6, 2000, 3, CPU)[0], again[0])


def test_contamination_reaches_the_training_alone() -> None:
    data = BlobData()
    plain, dirty = (
        Method(Method.config_for("smoke", contaminated="targets", contamination=share)).batches(data)  # type: ignore[arg-type]
        for share in (0.0, 0.5)
    )
    a, b = plain(0, 32, 0, CPU), dirty(0, 32, 0, CPU)
    assert torch.equal(a[0], b[0])
    assert not torch.equal(a[1], b[1])
    for kind, share in (("labels", 0.5), ("both", 1.5)):
        with pytest.raises(CryobenchError, match="contamination"):
            contaminate(pairs, kind, share)


def test_median_is_robust_mean_is_not() -> None:
    """A network of one number, three quarters of its targets 0, a quarter uniform noise far away: L2 is drawn to it."""
    targets = torch.zeros(400)
    targets[:100] = 5 + torch.rand(100, generator=torch.Generator().manual_seed(0))
    answers = torch.linspace(-1, 6, 701)
    l1 = (answers[:, None] - targets).abs().mean(1)
    l2 = (answers[:, None] - targets).square().mean(1)
    assert abs(float(answers[l1.argmin()])) < 0.02
    assert float(answers[l2.argmin()]) > 1


def test_beats_the_noise_and_a_scaled_copy() -> None:
    data = BlobData()
    method = Method(Method.config_for("smoke"))
    method.fit(data, QUIET)
    assert method.state.keys() == method.network().state_dict().keys(), "only the generator is kept"
    clean, noisy = data._images(64, seed=77)
    error = (method.denoise(noisy, data.sigma) - clean).square().mean()
    shrink = float(((clean - clean.mean()) * (noisy - noisy.mean())).sum() / (noisy - noisy.mean()).square().sum())
    best_scaled = (noisy.mean() + shrink * (noisy - noisy.mean()) - clean).square().mean()
    assert error < 0.5 * best_scaled < 0.5 * data.sigma**2
