"""What DenoiseGAN and RobustGAN share: a generator and a critic of strided 4 x 4 convolutions with residual units
between them, and the fit in which the two take turns.

Layer by layer after the authors' code (cianfrocco-lab/GAN-for-Cryo-EM-image-denoising and
ghl1995/denoise-gan-in-cryo-em), where the generator ends in tanh. Here the last layer is linear: tanh fits images that
were scaled to [-1, 1], but ours are in units of the noise, without bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from torch import Tensor, nn

from cryobench.errors import CryobenchError
from cryobench.methods.base import Budget
from cryobench.methods.learned import Learned
from cryobench.methods.training import Player, seeded
from cryobench.methods.training import train as run_training

if TYPE_CHECKING:
    from cryobench.imaging.training_data import TrainingData


class PlainUnit(nn.Module):
    """relu(x + BN(conv 3 x 3)), (n, width, h, w) -> the same shape (Gu et al.)."""

    reach = 1  # how many places away it sees

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x + self.layers(x))


class BottleneckUnit(nn.Module):
    """elu(x + ...) with kernels of 1, 4 and 1 px, the inner two on a quarter of the channels (Su et al.)."""

    reach = 2

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = max(1, width // 4)
        self.layers = nn.Sequential(
            *(nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ELU()),
            *(nn.ZeroPad2d((1, 2, 1, 2)), nn.Conv2d(inner, inner, 4, bias=False), nn.BatchNorm2d(inner), nn.ELU()),
            *(nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)),
        )
        self.activation = nn.ELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x + self.layers(x))


#: makes a residual unit of a width; its ``activation`` is that of the whole network
Unit = type[PlainUnit] | type[BottleneckUnit]


def _units(unit: Unit, width: int, count: int) -> nn.Sequential:
    """The activation, then ``count`` residual units."""
    return nn.Sequential(unit(width).activation, *(unit(width) for _ in range(count)))


class Generator(nn.Module):
    """Noisy images (n, 1, h, w) -> denoised ones, same shape; the sides are multiples of 2^len(widths).

    widths: channels per level, each half as fine as the one before. units: residual units per level, the same on the
    way back. What a level made before its activation is added on the way back.
    """

    def __init__(self, widths: Sequence[int], units: Sequence[int], unit: Unit) -> None:
        super().__init__()
        self.down, self.encode, self.up, self.decode = (nn.ModuleList() for _ in range(4))
        for before, width, count in zip((1, *widths), widths, units, strict=False):
            self.down.append(_strided(before, width))
            self.encode.append(_units(unit, width, count))
        for (width, before), count in zip(pairwise(widths), units, strict=False):
            self.up.append(nn.Sequential(nn.ConvTranspose2d(before, width, 4, 2, 1, bias=False), nn.BatchNorm2d(width)))
            self.decode.append(_units(unit, width, count))
        self.leave = nn.ConvTranspose2d(widths[0], 1, 4, 2, 1)
        small_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        h, kept = x, []
        for down, encode in zip(self.down, self.encode, strict=True):
            kept.append(down(h))
            h = encode(kept[-1])
        for k in reversed(range(len(self.up))):
            h = self.decode[k](self.up[k](h) + kept[k])
        return self.leave(h).to(x.dtype)


def critic_trunk(inputs: int, widths: Sequence[int], units: Sequence[int], unit: Unit) -> list[nn.Module]:
    """Layers of a critic, (n, inputs, h, w) -> (n, widths[-1], h / 2^len(widths), w / 2^len(widths))."""
    layers: list[nn.Module] = []
    for before, width, count in zip((inputs, *widths), widths, units, strict=False):
        layers += [_strided(before, width), _units(unit, width, count)]
    return layers


def small_weights(net: nn.Module) -> None:
    """Weights of all convolutions from N(0, 0.02), no offsets, as DCGAN began the custom."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(module.weight, 0.0, 0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _strided(before: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, width, 4, 2, 1, bias=False), nn.BatchNorm2d(width))


class ResidualGAN(Learned):
    """Base of the two methods: :meth:`network` is the generator, the only part that is kept.

    The configuration has ``widths`` and ``units`` of the generator, ``critic_widths``, and ``adversarial``, the weight
    of the critic's opinion in the generator's loss; with 0 there is no critic at all.
    """

    residual_unit: Unit
    #: sides of what the critic's last layers need, in places of its coarsest level
    critic_places: int

    @property
    def multiple(self) -> int:
        return int(2 ** len(self.config.widths))

    @property
    def margin(self) -> int:
        """At most so far: a unit sees ``reach`` places of 2, 4, 8 ... pixels, on the way down and, but for the
        coarsest, on the way up; a step between two levels, one place of the coarser or two of the finer."""
        units = list(self.config.units)[: len(self.config.widths)]
        places = [2 ** (k + 1) for k in range(len(units))]
        seen = sum(count * place for count, place in zip(units, places, strict=True))
        return self.residual_unit.reach * (2 * seen - units[-1] * places[-1]) + 2 * sum(places)

    def network(self) -> nn.Module:
        return Generator(self.config.widths, self.config.units, self.residual_unit)

    def critic(self) -> nn.Module:
        """The critic with fresh weights."""
        raise NotImplementedError

    def generator_loss(self, game: nn.ModuleDict, noisy: Tensor, clean: Tensor) -> Tensor:
        raise NotImplementedError

    def critic_loss(self, game: nn.ModuleDict, noisy: Tensor, clean: Tensor) -> Tensor:
        raise NotImplementedError

    def turns(self) -> tuple[float, int]:
        """The critic's learning rate as a multiple of the generator's, and how many steps lie between its turns."""
        raise NotImplementedError

    def fit(self, train: TrainingData, budget: Budget) -> None:
        """Learn from pairs of a noisy and the clean image. Raises SupervisionError where none are allowed, and
        CryobenchError for images that are too small for the critic."""
        batch, game = self.batches(train), self.fresh_game()
        least = self.critic_places * 2 ** len(self.config.critic_widths)
        if self.config.adversarial and min(batch(0, 1, self.seed, self.device)[0].shape[-2:]) < least:
            raise CryobenchError(f"{self.name}: its critic needs training images of at least {least} px")
        players = [Player(game["generator"], self.generator_loss)]
        if self.config.adversarial:
            rate, every = self.turns()
            players.insert(0, Player(game["critic"], self.critic_loss, rate, every))
        self.info = run_training(game, batch, players, self.config, budget, self.seed, self.device, self.name)
        self.state = game["generator"].state_dict()

    def fresh_game(self) -> nn.ModuleDict:
        """Generator and critic as they start to learn, on the device."""
        with seeded(self.seed, self.device):
            parts = {"generator": self.network()}
            if self.config.adversarial:
                parts["critic"] = self.critic()
            return nn.ModuleDict(parts).to(self.device)
