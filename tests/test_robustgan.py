"""RobustGAN and DenoiseGAN: the proper scores, contamination, and who changes whose weights."""

import math
from collections.abc import Iterator

import pytest
import torch
from blobs import BlobData
from scipy.integrate import quad
from torch import Tensor

from cryobench.errors import CryobenchError
from cryobench.methods import denoisegan, robustgan
from cryobench.methods.base import Budget
from cryobench.methods.robustgan import beta_score, contaminate

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0), (0.5, -0.5), (2.0, 0.3)])
def test_beta_scores_are_proper(alpha: float, beta: float) -> None:
    """Who believes in q earns most by saying q; the values are those of numerical integration."""
    p = torch.linspace(0.01, 0.99, 99)
    for q in (0.1, 0.5, 0.83):
        earned = q * beta_score(p, True, alpha, beta) + (1 - q) * beta_score(p, False, alpha, beta)
        assert float(p[earned.argmax()]) == pytest.approx(q, abs=0.011)
    for value in (0.02, 0.4, 0.97):
        yes = -quad(lambda c: c ** (alpha - 1) * (1 - c) ** beta, value, 1)[0]
        no = -quad(lambda c: c**alpha * (1 - c) ** (beta - 1), 0, value)[0]
        assert float(beta_score(torch.tensor(value), True, alpha, beta)) == pytest.approx(yes, rel=1e-3)
        assert float(beta_score(torch.tensor(value), False, alpha, beta)) == pytest.approx(no, rel=1e-3)


def test_logarithmic_and_brier_scores() -> None:
    p = torch.tensor([0.05, 0.3, 0.9])
    assert torch.allclose(beta_score(p, True, 0.0, 0.0), p.log(), atol=1e-4)
    assert torch.allclose(beta_score(p, False, 0.0, 0.0), (1 - p).log(), atol=1e-4)
    assert torch.allclose(beta_score(p, True, 1.0, 1.0), -((1 - p) ** 2) / 2, atol=1e-5)


def images(step: int, batch_size: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.full((batch_size, 1, 9, 12), 2.0), torch.full((batch_size, 1, 9, 12), 5.0)


@pytest.mark.parametrize("kind", ["targets", "inputs", "both"])
def test_contamination(kind: str) -> None:
    plain = contaminate(images, kind, 0.25)
    a, b = plain(3, 50, 1, CPU), plain(3, 50, 1, CPU)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    def ramp(step: int, n: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
        flat = torch.arange(n).float().view(n, 1, 1, 1).expand(n, 1, 9, 12)
        return flat, flat

    x, y = contaminate(ramp, kind, 0.25)(3, 4000, 1, CPU)
    replaced = [(v.flatten(1).std(1) > 0) for v in (x, y)]
    for stack, name in zip(replaced, ("inputs", "targets"), strict=True):
        wanted = 0.25 if kind in (name, "both") else 0.0
        assert float(stack.float().mean()) == pytest.approx(wanted, abs=0.03)
    if kind == "both":
        assert torch.equal(*replaced)


def test_contamination_is_checked() -> None:
    assert contaminate(images, "", 0.0) is images
    for kind, share in (("outputs", 0.1), ("both", 1.5)):
        with pytest.raises(CryobenchError, match="contamination"):
            contaminate(images, kind, share)


@pytest.mark.parametrize("module", [denoisegan, robustgan])
def test_learns_and_keeps_the_generator_only(module) -> None:
    """Both players have a finite loss, the result beats the best multiple of the input, and no critic is saved."""
    data = BlobData()
    method = module.Method(module.Method.config_for("smoke"))
    method.fit(data, Budget(progress=False))
    assert all(len(row) == 3 and all(map(math.isfinite, row)) for row in method.info["loss"])
    assert method.state.keys() == method.network().state_dict().keys()
    clean, noisy = data._images(48, seed=5)
    centred = noisy - noisy.mean()
    gain = ((clean - clean.mean()) * centred).sum() / centred.square().sum()
    best = (clean.mean() + gain * centred - clean).square().mean()
    assert (method.denoise(noisy, data.sigma) - clean).square().mean() < 0.6 * best


@pytest.mark.parametrize("module", [denoisegan, robustgan])
def test_each_player_moves_only_itself(module) -> None:
    method = module.Method(module.Method.config_for("smoke"))
    torch.manual_seed(0)
    game = torch.nn.ModuleDict({"generator": method.network(), "critic": method.critic()})
    noisy, clean = torch.randn(2, 3, 1, 32, 32)
    method.critic_loss(game, noisy, clean).backward()
    assert all(w.grad is None for w in game["generator"].parameters())
    assert any(w.grad.abs().sum() > 0 for w in game["critic"].parameters() if w.grad is not None)
    method.generator_loss(game, noisy, clean).backward()
    assert any(w.grad.abs().sum() > 0 for w in game["generator"].parameters() if w.grad is not None)
