"""A U-Net trained on clean images: the plain regression that every other network of the tables is measured against.

No paper of the tables has it. It is the shortest way to E[x | y] that a network has: mean squared error to the clean
image, new views and new noise in every batch (Ronneberger, Fischer, Brox, "U-Net", MICCAI 2015, for the network).

It may also start from where the covariance Wiener filter ends (``start="cwf"``): the network then sees the noisy image
beside CWF's result, and learns what to add to the latter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from cryobench.errors import CryobenchError
from cryobench.methods import cwf
from cryobench.methods.base import Budget
from cryobench.methods.learned import Learned
from cryobench.methods.nets.unet import UNet, reach
from cryobench.methods.training import TrainConfig

if TYPE_CHECKING:
    from cryobench.imaging.training_data import TrainingData

CWF = "cwf."  # before the names of the filter's tensors among those of the state


@dataclass(frozen=True)
class Settings(TrainConfig):
    """What the methods on this network share; ours throughout.

    widths, blocks, patch, norm: see :class:`~cryobench.methods.nets.unet.UNet`. self_ensemble: the result is the mean
    over eight turns and mirrors of the input.
    """

    widths: tuple[int, ...] = (48, 96, 192, 192)
    blocks: int = 2
    # At SNR 0.1 a pixel says next to nothing: 4 x 4 pixels at once are four times cheaper than 2 x 2
    patch: int = 4
    # Off: a normalised image depends on how much of it is empty, so that a particle in a wide field comes out otherwise
    # than in a box of its own (chapter "unet")
    norm: bool = False
    self_ensemble: bool = True
    # A step of 32 images takes an H200 15 ms and one of 128 takes it 17: it mostly waits for Python
    steps: int = 4000
    batch_size: int = 64
    learning_rate: float = 1.5e-3
    ema: float = 0.999


@dataclass(frozen=True)
class Config(Settings):
    """Ours throughout. start: "noisy", or "cwf" (see above)."""

    start: str = "noisy"


class AddTo(nn.Module):
    """(n, 2, h, w), an image beside a first result -> (n, 1, h, w), the first result and what the network adds."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 1:] + self.net(x)


class OnUNet(Learned):
    """Base of methods whose network is the U-Net of these settings; not a method itself."""

    profiles: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "widths": (8, 16),
            "blocks": 1,
            "patch": 2,
            "steps": 120,
            "batch_size": 8,
            "learning_rate": 5e-3,
            "warmup": 5,
            "ema": 0.9,
        },
        "quick": {
            "widths": (32, 64, 128),
            "blocks": 1,
            "steps": 2000,
            "batch_size": 8,
            "learning_rate": 2e-3,
            "warmup": 50,
            "ema": 0.99,
        },
    }

    @property
    def multiple(self) -> int:
        return int(self.config.patch * 2 ** (len(self.config.widths) - 1))

    @property
    def margin(self) -> int:
        return reach(len(self.config.widths), self.config.blocks, self.config.patch)


class Method(OnUNet):
    """Regression on the clean image with a U-Net, in units of the noise."""

    name = "unet"
    paper = "ronneberger2015"
    supervision = "clean-pairs"
    Config = Config
    #: the filter that the network starts from, with start="cwf"
    _cwf: cwf.Method | None = None

    def network(self) -> nn.Module:
        c = self.config
        if c.start not in ("noisy", "cwf"):
            raise CryobenchError(f'{self.name}: start must be "noisy" or "cwf", not {c.start!r}')
        net = UNet(2 if c.start == "cwf" else 1, 1, c.widths, c.blocks, c.patch, norm=c.norm)
        return AddTo(net) if c.start == "cwf" else net

    def fit(self, train: TrainingData, budget: Budget) -> None:
        """Train on what the supervision allows; CWF learns from the noisy images. Raises SupervisionError for less."""
        if self.config.start == "cwf":
            self._cwf = cwf.Method(device=self.device)
            self._cwf.fit(train, budget)
            self._cwf.info |= {"unit": train.sigma, "origin": float(train.noisy.mean())}
        super().fit(train, budget)
        if self._cwf is not None:
            self.state |= {CWF + name: value for name, value in self._cwf.state.items()}
            self.info["cwf"] = self._cwf.info

    def weights(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.state.items() if not name.startswith(CWF)}

    def seen(self, images: Tensor) -> Tensor:
        """Beside each image what CWF, in its own units, makes of it: (n, 2, h, w)."""
        if self.config.start == "noisy":
            return super().seen(images)
        if self._cwf is None:  # after load
            self._cwf = cwf.Method(device=self.device)
            self._cwf.info = self.info["cwf"]
            self._cwf.state = {k.removeprefix(CWF): v for k, v in self.state.items() if k.startswith(CWF)}
        unit, origin = self._cwf.info["unit"], self._cwf.info["origin"]
        filtered = (self._cwf.denoise(images * unit + origin, unit) - origin) / unit
        return torch.stack([images, filtered.to(images)], dim=1)
