"""What the networks share: they see images in units of the noise, relative to the mean of the stack.

The noise then has standard deviation 1 whatever the scale of the images, and a network trained on one data set can be
applied to another. A method of this kind gives its network and its loss; one whose networks learn against each other,
or that draws samples, replaces :meth:`Learned.fit` or :meth:`Learned.denoise` and keeps the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cryobench.errors import CryobenchError
from cryobench.imaging.particles import stream_seed
from cryobench.imaging.turns import over_turns
from cryobench.methods.base import Budget, Denoiser
from cryobench.methods.nets.tiling import apply_tiled
from cryobench.methods.training import Batch, seeded
from cryobench.methods.training import train as run_training

if TYPE_CHECKING:
    from cryobench.imaging.training_data import TrainingData


class Learned(Denoiser):
    """Base of methods that train a network; not a method itself.

    ``multiple``: what the sides of an image must be a multiple of (others are padded). ``margin``: how many pixels
    beyond itself a block of that size depends on; by as many the tiles overlap in which larger images are computed.
    """

    trained = True

    @property
    def multiple(self) -> int:
        return 1

    @property
    def margin(self) -> int:
        return 64

    @property
    def self_ensemble(self) -> bool:
        """Whether the result is the mean over the eight turns and mirrors of the input (see ``over_turns``)."""
        return bool(getattr(self.config, "self_ensemble", False))

    def network(self) -> nn.Module:
        """The network with fresh weights: normalised images (n, 1, h, w) -> the same shape, denoised."""
        raise NotImplementedError

    def loss(self, net: nn.Module, source: Tensor, target: Tensor) -> Tensor:
        """Scalar to be minimised; mean squared error unless a method has its own."""
        return F.mse_loss(net(source), target)

    def seen(self, images: Tensor) -> Tensor:
        """What the network is given, (n, c, h, w), of normalised images (n, h, w)."""
        return images[:, None]

    def batches(self, train: TrainingData) -> Batch:
        """Normalised pairs (n, 1, h, w) of what the supervision allows, see :meth:`TrainingData.batch` and :func:`cut`.

        Raises SupervisionError where less is allowed, CryobenchError for images too small for the network or without
        noise.
        """
        train.require(self.supervision)  # with less the targets would be others, and this another method
        sigma = train.sigma
        if sigma <= 0:
            raise CryobenchError(f"{self.name}: the training images have no noise to learn from")

        def batch(step: int, batch_size: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
            source, target = cut(train.batch(step, batch_size, seed, device), self.multiple, stream_seed(seed, step))
            mean = source.mean()
            return self.seen((source - mean) / sigma), (target - mean)[:, None] / sigma

        return batch

    def fresh(self) -> nn.Module:
        """The network as it starts to learn, on the device; its weights depend on the seed alone."""
        with seeded(self.seed, self.device):
            return self.network().to(self.device)

    def fit(self, train: TrainingData, budget: Budget) -> None:
        """Train on what the supervision allows. Raises SupervisionError where less is allowed."""
        batch, net = self.batches(train), self.fresh()
        self.info = run_training(net, batch, self.loss, self.config, budget, self.seed, self.device, self.name)
        self.state = net.state_dict()

    def weights(self) -> dict[str, Tensor]:
        """The network's part of what was learned."""
        return self.state

    def trained_network(self) -> nn.Module:
        """The network with what was learned, ready to be applied. Raises CryobenchError before fit or load."""
        if not self.state:
            raise CryobenchError(f"{self.name} has not been trained: fit it, or give weights (--weights, --train-on)")
        net = self.network().to(self.device)
        net.load_state_dict(self.weights())
        return net.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def unit(self, images: Tensor, sigma: float | None) -> float:
        """What the network sees as 1: sigma, but no less than a thousandth of the images' spread (0 for blank ones).

        Far above any SNR of the training, the network would only see numbers too large for it.
        """
        return max(float(sigma or 0), 1e-3 * float(images.std(correction=0)))

    def denoise(self, images: Tensor, sigma: float | None = None) -> Tensor:
        """Images of any size; sigma as in :class:`Denoiser`. Raises CryobenchError before fit or load."""
        net, mean, unit = self.trained_network(), images.mean(), self.unit(images, sigma)
        if unit == 0:
            return images
        return self.apply(net, self.seen((images - mean) / unit)) * unit + mean

    def apply(self, net: Callable[[Tensor], Tensor], seen: Tensor) -> Tensor:
        """What ``net`` makes of images (n, c, h, w) of any size, in tiles and, if asked for, over turns: (n, h, w)."""

        def tiled(x: Tensor) -> Tensor:
            return apply_tiled(net, x, self.margin, self.multiple)

        return over_turns(tiled)(seen) if self.self_ensemble else tiled(seen)


def cut(stacks: Sequence[Tensor], multiple: int, seed: int) -> list[Tensor]:
    """Images (..., h, w) of one size, or where its sides are no multiples the same window of all of them whose sides
    are, as large as can be, at a random place. Raises CryobenchError where there is none."""
    sides = stacks[0].shape[-2:]
    height, width = (side - side % multiple for side in sides)
    if not height or not width:
        raise CryobenchError(
            f"training images of {sides[0]} x {sides[1]} px are too small: the network sees {multiple} px as one"
        )
    if (height, width) == tuple(sides):
        return list(stacks)
    generator = torch.Generator().manual_seed(seed)
    top, left = (int(torch.randint(side % multiple + 1, (), generator=generator)) for side in sides)
    return [images[..., top : top + height, left : left + width] for images in stacks]
