"""Score-based denoising guided by a reference. The formulation is OURS.

Wu et al. (arXiv 2604.17734; only the abstract is public to us) add "reference-density guidance" to the score that is
learned from noisy pairs (:mod:`cryobench.methods.score`), "to stabilize score learning under weak and ambiguous signal
conditions". They do not say how in what we can read. Three candidates, with P the projection of the reference that is
nearest to a particle (:mod:`cryobench.methods.reference_match`), in units of the noise:

* ``loss``: a second term, |D(z, tau) - y2|^2 + w(tau) |D(z, tau) - P|^2, inside the particle's mask. We take
  w(tau) = w tau^2 / (1 + tau^2): the part of the noise that was added. The reference then speaks only where signal is
  weaker than in the images, and not at tau = 0, where they are denoised. The minimum is, inside the mask,
  (E[x|z] + w(tau) E[P|z]) / (1 + w(tau)).
* ``mixture``: the network is that of ``score``; when denoising, its score is mixed with that of a Gaussian around P of
  variance s_ref^2 under the same noise, s = (1 - w) s_theta + w (P - z) / (t^2 + s_ref^2). One Tweedie step gives
  (1 - w) D(z, 0) + w (s_ref^2 z + P) / (1 + s_ref^2). (A sum s_theta + w (...), without 1 - w, would count the noise
  twice: it leaves -w n in the result.)
* ``convex``: regression on (1 - w) y2 + w P. The minimum is (1 - w) E[x|z] + w E[P|z], so that the bias due to the
  reference is known: w (E[P|z] - E[x|z]).

While it learns, P is found from the half that is the target, never from the input: its errors are then independent
of the input's noise given the particle, just as Noise2Noise asks of a target. When denoising, ``mixture`` has only the
input to find it from.

No clean image is used, although the supervision would allow it: pairs of noisy images and the reference's volume.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cryobench.errors import CryobenchError
from cryobench.imaging.ctf import bfactor_2d
from cryobench.imaging.noise import ice_spectrum
from cryobench.imaging.particles import stream_seed
from cryobench.imaging.training_data import Reference, TrainingData, augmented
from cryobench.methods import score
from cryobench.methods.base import Budget
from cryobench.methods.learned import cut
from cryobench.methods.reference_match import ReferenceMatch
from cryobench.methods.training import Batch

if TYPE_CHECKING:
    from cryobench.imaging.ctf import ContrastTransfer

GUIDANCES = ("loss", "mixture", "convex")


@dataclass(frozen=True)
class Config(score.Config):
    """Everything here is ours, as in ``score``.

    guidance: one of the three above; the default is the one that does the least harm where the reference is wrong.
    weight: w. spread: s_ref, in units of the noise.
    """

    guidance: str = "loss"
    weight: float = 0.5
    spread: float = 0.1

    def __post_init__(self) -> None:
        if self.guidance not in GUIDANCES:
            raise CryobenchError(f"guidance must be one of {', '.join(GUIDANCES)}, not {self.guidance!r}")


class Method(score.Method):
    """The network of ``score``, guided by projections of a reference."""

    name = "score-target"
    paper = "wu2026"
    supervision = "reference"
    uses_ctf = True
    Config = Config

    def weights(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.state.items() if name != "volume"}

    def fit(self, train: TrainingData, budget: Budget) -> None:
        """Learn from pairs and the reference. Raises SupervisionError where the structure may not be seen, and
        CryobenchError for particles off-centre, whose projections are searched over orientations only."""
        reference = train.reference
        if reference.shift:
            raise CryobenchError("score-target: the reference is matched over orientations; simulate without shifts")
        super().fit(train, budget)
        self.info |= {"noise": reference.noise, "bfactor": reference.bfactor, "pixel_size": train.pixel_size}
        if self.config.guidance == "mixture":
            self.state["volume"] = _in_noise_units(train).to(self.device)

    def batches(self, train: TrainingData) -> Batch:
        """Normalised pairs: one exposure, and the other, in more channels the projection nearest to it and the mask.

        Drawn, turned and mirrored as :meth:`TrainingData.pair_batch` does.
        """
        sigma = train.sigma
        if sigma <= 0:
            raise CryobenchError(f"{self.name}: the training images have no noise to learn from")
        stacks: list[Tensor] = []
        for images in train.pairs():
            stacks.append(images)
            if self.config.guidance != "mixture":
                reference = train.reference
                match = _match(
                    _in_noise_units(train).to(self.device), reference.noise, reference.bfactor, train.pixel_size
                )
                mean = images.mean()
                found = match.projections((images - mean) / sigma, train.ctf)
                stacks.append((found - found.mean()) * sigma + mean)
        half, mask = len(stacks) // 2, _disc(train.reference.volume, stacks[0].shape[1:])
        stacks.append(mask.expand_as(stacks[0]))

        def batch(step: int, batch_size: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
            drawn = cut(
                augmented(stacks, batch_size, stream_seed(seed, step, "choice")), self.multiple, stream_seed(seed, step)
            )
            *images, masks = drawn
            halves = [torch.stack(images[:half], 1), torch.stack(images[half:], 1)]
            swap = stream_seed(seed, step, "which is the input") % 2
            source, target = halves[swap][:, :1].to(device), halves[1 - swap].to(device)
            mean = source.mean()
            target = torch.cat([(target - mean) / sigma, masks[:, None].to(device)], 1)
            return (source - mean) / sigma, target

        return batch

    def loss(self, net: nn.Module, source: Tensor, target: Tensor) -> Tensor:
        config = self.config
        if config.guidance == "mixture":
            return super().loss(net, source, target[:, :1])
        z, tau = self.renoised(source)
        restored, (noisy, nearest, mask) = net(z, tau), target.split(1, dim=1)
        if config.guidance == "convex":
            return F.mse_loss(restored, (1 - config.weight) * noisy + config.weight * nearest)
        pull = config.weight * tau**2 / (1 + tau**2)
        guided = ((restored - nearest).square() * mask).mean((1, 2, 3))
        return F.mse_loss(restored, noisy) + (pull * guided).mean()

    def denoise(self, images: Tensor, sigma: float | None = None, ctf: ContrastTransfer | None = None) -> Tensor:
        """Images of any size; sigma as in :class:`Denoiser`. Raises CryobenchError before fit or load.

        With the guidance ``mixture`` they must be centred particles at the reference's pixel size and in noise as
        strong as that of the training images; ctf: theirs.
        """
        sigma = float(sigma or 0)
        restored, unit, mean = self.posterior_mean(images, sigma), self.unit(images, sigma), images.mean()
        if self.config.guidance != "mixture" or unit == 0:
            return restored
        info, z = self.info, (images - mean) / unit
        nearest = _match(self.state["volume"], info["noise"], info["bfactor"], info["pixel_size"]).projections(z, ctf)
        nearest = nearest - nearest.mean()
        anchored = (self.config.spread**2 * z + nearest) / (1 + self.config.spread**2)
        return (1 - self.config.weight) * restored + self.config.weight * (anchored * unit + mean)


def with_reference(train: TrainingData, reference: Reference) -> TrainingData:
    """The same pairs behind a gate with another reference: the control for what a wrong one does."""
    first, second = train.pairs()
    return TrainingData(
        "reference", first, None, train.sigma, train.pixel_size, second=second, ctf=train.ctf, reference=reference
    )


def _in_noise_units(train: TrainingData) -> Tensor:
    return train.reference.volume.float() * (train.reference.scale / train.sigma)


def _match(volume: Tensor, noise: str, bfactor: float, pixel_size: float) -> ReferenceMatch:
    size = len(volume)
    power = ice_spectrum(size, size) if noise == "coloured" else None
    return ReferenceMatch(volume, power, bfactor_2d(bfactor, pixel_size, size)[None] if bfactor else None)


def _disc(volume: Tensor, shape: tuple[int, ...]) -> Tensor:
    """1 inside the circle around the density of the volume above 5 % of its maximum, else 0; (h, w) = shape."""
    z, y, x = (volume > 0.05 * volume.max()).nonzero().unbind(1)
    centre = len(volume) // 2
    reach = max(float(((x - centre) ** 2 + (y - centre) ** 2 + (z - centre) ** 2).max()), 1.0)
    rows, columns = (torch.arange(n) - n // 2 for n in shape)
    return (rows[:, None] ** 2 + columns**2 <= reach).float()
