"""DenoiseGAN: the networks of the authors' code, the losses, and who learns when."""

import itertools
import math

import pytest
import torch
from blobs import BlobData
from torch import nn

from cryobench.errors import CryobenchError
from cryobench.imaging.training_data import TrainingData
from cryobench.methods import robustgan
from cryobench.methods.base import Budget
from cryobench.methods.denoisegan import Config, Critic, Method
from cryobench.methods.nets.residual_gan import BottleneckUnit, Generator, ResidualGAN

QUIET = Budget(progress=False)


def count(net: nn.Module) -> int:
    return sum(w.numel() for w in net.parameters())


def unit(width: int) -> int:
    """1 x 1 to a quarter, 4 x 4 there, 1 x 1 back, each with the two numbers of a batch normalisation."""
    inner = width // 4
    return width * inner + 16 * inner**2 + inner * width + 2 * (inner + inner + width)


def test_the_codes_networks() -> None:
    """Weights counted by hand; from 256 px six levels lead to 4 x 4 places, and the critic has 26 x 26 opinions."""
    widths, units = (64, 128, 256, 512, 512, 512), (3, 3, 3, 3, 2, 0)
    with torch.device("meta"):
        net, critic = Generator(widths, units, BottleneckUnit), Critic(Config())
        image = torch.empty(1, 1, 256, 256)
    enter = sum(16 * a * b + 2 * b for a, b in zip((1, *widths), widths, strict=False))
    leave = sum(16 * a * b + 2 * a for a, b in itertools.pairwise(widths)) + 16 * 64 + 1
    inside = 2 * sum(n * unit(w) for w, n in zip(widths, units, strict=True))
    assert count(net) == enter + leave + inside
    kernels = {m.kernel_size for m in net.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)}
    assert kernels == {(1, 1), (4, 4)}
    h = image
    for down, encode in zip(net.down, net.encode, strict=True):
        h = encode(down(h))
    assert h.shape == (1, 512, 4, 4)
    assert net(image).shape == image.shape
    assert critic(image, image).shape == (1, 1, 26, 26)


def test_default_ends_in_the_same_four_places() -> None:
    config = Config()
    assert 128 // 2 ** len(config.widths) == 256 // 2**6 == 4


@pytest.mark.parametrize(("method", "least"), [(Method, 7), (robustgan.Method, 4)])
def test_the_critic_needs_so_many_pixels(method: type[ResidualGAN], least: int) -> None:
    """Its smoke critic halves the image twice; what is left of one row less it cannot judge."""
    made = method(method.config_for("smoke", steps=1, batch_size=2))
    for size, enough in ((4 * least, True), (4 * least - 4, False)):
        images = torch.randn(2, size, size, generator=torch.Generator().manual_seed(0))
        data = TrainingData("clean-pairs", images, images / 2, 1.0, 4.0)
        if enough:
            made.fit(data, QUIET)
        else:
            with pytest.raises(CryobenchError, match=f"at least {4 * least} px"):
                made.fit(data, QUIET)


def test_output_has_no_bounds() -> None:
    """A tanh could not follow images in units of the noise."""
    net, x = Generator((8, 16), (1, 0), BottleneckUnit).eval(), torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        once = net(x)
        net.leave.weight.mul_(1000.0)
        net.leave.bias.fill_(5.0)
        assert torch.allclose(net(x), 1000 * once + 5, rtol=1e-4, atol=1e-4)


def test_skip_is_what_a_level_made_before_its_activation() -> None:
    """Without anything from below, the way back continues with the activation of the way down."""
    net = Generator((4, 8), (0, 0), BottleneckUnit).eval()
    nn.init.zeros_(net.up[0][0].weight)
    x = torch.randn(1, 1, 8, 8)
    assert torch.allclose(net(x), net.leave(nn.functional.elu(net.down[0](x))), atol=1e-6)


class Undecided(nn.Module):
    def forward(self, images: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(images), 1, 2, 2)


def test_losses() -> None:
    """A critic that cannot tell costs log 2; the generator pays log 2 and 100 times the distance."""
    method = Method(Method.config_for("smoke"))
    game = nn.ModuleDict({"generator": nn.Identity(), "critic": Undecided()})
    noisy, clean = torch.full((2, 1, 8, 8), 0.25), torch.zeros(2, 1, 8, 8)
    assert float(method.critic_loss(game, noisy, clean)) == pytest.approx(math.log(2))
    assert float(method.generator_loss(game, noisy, clean)) == pytest.approx(math.log(2) + 25)
    without = Method(Method.config_for("smoke", adversarial=0.0))
    assert float(without.generator_loss(game, noisy, clean)) == pytest.approx(25)


def test_each_learns_from_its_own_loss() -> None:
    method = Method(Method.config_for("smoke"))
    game = method.fresh_game()
    noisy, clean = torch.randn(4, 1, 32, 32), torch.randn(4, 1, 32, 32)
    method.critic_loss(game, noisy, clean).backward()
    assert all(w.grad is None for w in game["generator"].parameters())
    assert all(w.grad is not None for w in game["critic"].parameters())
    game.zero_grad()
    method.generator_loss(game, noisy, clean).backward()
    assert all(w.grad is not None for w in game["generator"].parameters())
    assert "critic" not in Method(Method.config_for("smoke", adversarial=0.0)).fresh_game()


def test_critic_moves_in_its_own_turn_only() -> None:
    """With its rate at zero the critic ends as it began; the generator does not."""
    method = Method(Method.config_for("smoke", critic_rate=0.0, ema=0.0, steps=3))
    games = []
    original = method.fresh_game
    method.fresh_game = lambda: games.append(original()) or games[-1]  # type: ignore[method-assign,func-returns-value]
    method.fit(BlobData(), QUIET)
    before, after = original(), games[0]
    for name, same in (("critic", True), ("generator", False)):
        pairs = zip(before[name].parameters(), after[name].parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs) == same


def test_beats_the_noise_and_a_scaled_copy() -> None:
    data = BlobData()
    method = Method(Method.config_for("smoke"))
    method.fit(data, QUIET)
    assert method.state.keys() == method.network().state_dict().keys(), "only the generator is kept"
    assert len(method.info["loss"][0]) == 3
    clean, noisy = data._images(64, seed=77)
    error = (method.denoise(noisy, data.sigma) - clean).square().mean()
    shrink = float(((clean - clean.mean()) * (noisy - noisy.mean())).sum() / (noisy - noisy.mean()).square().sum())
    best_scaled = (noisy.mean() + shrink * (noisy - noisy.mean()) - clean).square().mean()
    assert error < 0.5 * best_scaled < 0.5 * data.sigma**2
