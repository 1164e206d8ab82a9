"""em3d: all particles are views of one object. It is estimated from the noisy images themselves, and seen through it.

Every other method of this book treats an image alone. Here expectation-maximisation over the unknown orientations
(Scheres 2012, J. Mol. Biol. 415:406, and Punjani et al. 2017, Nat. Methods 14:290, for the idea; the algorithm is our
own) finds the volume whose projections the images are, and each image is given its posterior mean E[A P_R V | y], as
in :mod:`cryobench.methods.bayes`, only with the volume that the noisy images gave. No clean image, no pair, no pose, no
reference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from cryobench.errors import CryobenchError
from cryobench.imaging.boxes import fit_into
from cryobench.imaging.rings import ring_frequencies
from cryobench.imaging.rotations import random_rotations, symmetry_matrices
from cryobench.imaging.slices import SliceTable
from cryobench.methods import em_classes
from cryobench.methods.base import Budget, Denoiser
from cryobench.methods.em_fit import Fit, caution, gains, volume_of_poses
from cryobench.methods.em_mean import mean_slices
from cryobench.methods.em_noise import SMALLEST, background_variance, learn_levels, noise_variances
from cryobench.methods.em_poses import FLOATS, Climb, Frame, Modes, PoseClimber, Views, sample_slices
from cryobench.methods.em_start import Annealing
from cryobench.methods.noise_level import corner_mask
from cryobench.methods.noise_spectrum import radial_noise_power

if TYPE_CHECKING:
    from cryobench.imaging.ctf import ContrastTransfer
    from cryobench.imaging.training_data import TrainingData

#: points a side of the transform that images are shown from: about 4 GB
TABLE = 585
#: times the modes of a fit that are followed where an image is shown: no later iteration finds what is missed here
THOROUGH = 4
#: noise weaker than this part of the images' standard deviation is taken for this much: float32 has its limits
LEAST_NOISE = 0.05
#: images differ in noise where this part of what their corners differ by is not scatter
UNEVEN = 0.2


@dataclass(frozen=True)
class Config:
    """symmetry: point group of the particle as RELION names it; C1 where it is not known. shift: particles are
    off-centre by up to so many pixels. contrast: standard deviation of their gains around 1 (0: all alike).

    starts: first volumes that each half may try. start_band, start_spacing: frequencies up to which they are made,
    cycles per image, and degrees of their grid; cooling: what the temperature is multiplied by. settling, settle_band:
    so many iterations with frequencies up to this; iterations: of the refinement that follows. spacing, band,
    modes: the grid of both, degrees; frequencies that it is compared at; poses of an image that are followed. folds
    (at least 2): an image is compared with a volume from the other folds of its half.
    """

    symmetry: str = "C1"
    shift: float = 0.0
    contrast: float = 0.0
    starts: int = 3
    start_band: float = 8.0
    start_spacing: float = 15.0
    cooling: float = 0.94
    settling: int = 10
    settle_band: float = 16.0
    iterations: int = 3
    folds: int = 4
    spacing: float = 7.5
    band: float = 12.0
    modes: int = 6

    def __post_init__(self) -> None:
        if min(self.starts, self.settling, self.iterations, self.modes) < 1 or self.folds < 2:
            raise CryobenchError("em3d needs starts, settling, iterations and modes of at least 1, and 2 folds")
        if not (self.shift >= 0 and self.contrast >= 0):
            raise CryobenchError("em3d: shift and contrast must not be negative")

    def annealing(self) -> Annealing:
        return Annealing(self.start_band, self.start_spacing, rate=self.cooling)


class Method(Denoiser):
    """Posterior mean over poses of the structure that the noisy images show together."""

    name = "em3d"
    paper = "scheres2012relion"
    supervision = "noisy"
    trained = True
    equivariant = False  # the volume has the scale of the images it was made from
    uses_ctf = True
    costly = True
    Config = Config
    profiles: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "starts": 1,
            "cooling": 0.8,
            "settling": 2,
            "folds": 2,
            "iterations": 1,
            "spacing": 15.0,
            "start_spacing": 20.0,
            "start_band": 6.0,
        }
    }

    def fit(self, train: TrainingData, budget: Budget) -> None:
        """Reconstruct the volume from the noisy images. ``info`` then has the correlation of the halves per ring, what
        became of the images, and times; :attr:`poses` where each came from, and :attr:`subset` the half it was in.

        Raises CryobenchError for images that are not square, tiny, fewer than 4 or without noise, for shifts beyond a
        quarter of the box, and BudgetSpent at its time limit.
        """
        views, config, n = self.views_of(train), self.config, len(train.noisy)
        fit = Fit(views, config, self.seed, budget)
        fit.run()
        result = fit.result
        assert result is not None
        kinds = torch.zeros(3, n, device=self.device)  # view, junk, empty
        for part, found in zip(fit.members, fit.classes, strict=True):
            kinds[:, part] = torch.stack([found.view, found.junk, found.empty])
        gain = views.gain[:, :1] * kinds[0, :, None]
        level = float((views.data[:, :1] * gain).real.sum() / (gain * views.gain[:, :1]).sum().clamp(min=1e-30))
        # of the whole volume's power more is signal than of a half's
        curve = result.filtered_curve.clamp(min=0)
        heat = caution(2 * curve / (1 + curve), ring_power(result.whole, views.frame), math.inf)
        self.state |= {
            "volume": result.whole,
            "half1": result.raw[0],
            "half2": result.raw[1],
        }
        self.info = {
            **self.info, "size": views.frame.size, "pixel_size": train.pixel_size, "level": level,
            "ctf": train.ctf is not None, "n": n, "order": len(fit.group),
            "fsc": [round(float(x), 4) for x in result.curve], "reach": result.reach(),
            "heat": heat, "settling": fit.at["settling"],
            "starts": len(fit.at["starts"]) // 2, "start_correlation": round(fit.at["correlation"], 4),
            "start_evidence": [round(e, 2) for e in fit.at["evidence"]], "likeness": fit.at.get("likeness"),
            "classes": dict(zip(("view", "junk", "empty"), kinds.mean(1).tolist(), strict=True)),
            "seconds": round(fit.at["seconds"], 2),
        }  # fmt: skip
        poses = [replace(m, owner=part[m.owner]) for m, part in zip(fit.modes, fit.members, strict=True)]
        self.state |= {f"poses.{name}": x for name, x in vars(Modes.cat(poses)).items()}
        self.state["subset"] = torch.ones(n, dtype=torch.long, device=self.device)
        self.state["subset"][fit.members[1]] = 2

    @property
    def poses(self) -> Modes:
        """Where the images of the fit came from (on the CPU). Raises CryobenchError when not fitted."""
        self._need_volume()
        return Modes(*(self.state[f"poses.{field.name}"].cpu() for field in fields(Modes)))

    @property
    def subset(self) -> Tensor:
        """The half (n,), 1 or 2, that each image of the fit was in. Raises CryobenchError when not fitted."""
        self._need_volume()
        return self.state["subset"].cpu()

    def _need_volume(self) -> None:
        if "volume" not in self.state:
            raise CryobenchError("em3d knows no volume yet: fit it to noisy images, or load weights")

    def denoise(self, images: Tensor, sigma: float | None = None, ctf: ContrastTransfer | None = None) -> Tensor:
        """Posterior means of images (n, h, w) at the pixel size learnt; sigma as in :class:`Denoiser`.

        What is no view of the particle is shown as junk (filtered by its power spectrum) or as nothing at all:
        ``classes`` (n, 3) has the probabilities of view, junk and empty of the stack denoised last. Raises
        CryobenchError when not fitted, and where the CTF is missing or was so in the fit.
        """
        self._need_volume()
        if self.info["ctf"] and ctf is None:
            raise CryobenchError("em3d learnt from images with a CTF: it needs that of these images too")
        if ctf is not None and not self.info["ctf"]:
            raise CryobenchError("em3d learnt from images without a CTF: it knows nothing of what is behind one")
        height, width = images.shape[1:]
        size, offset = max(height, width), self.info["offset"]
        frame = Frame(size, self.device)
        volume = fit_into(self.state["volume"], (size, size, size))
        table = SliceTable(volume, padding=max(1.5, min(2.6, TABLE / size)))
        some = random_rotations(8, torch.Generator().manual_seed(0))
        signal = float(frame.images(table.sample(some.to(self.device), frame.points)).std())
        noise = max(sigma or 0.0, LEAST_NOISE * signal, 1e-9)
        config = self.config
        climb = Climb(config.spacing, config.band, THOROUGH * config.modes, shift=config.shift)
        climber = PoseClimber(table, frame, symmetry_matrices(config.symmetry), climb)
        power = ring_power(volume, frame)
        out, classes = [], []
        # a third of the modes tried are left, each with ten slices at most, twice, of complex numbers
        floats = 40 * max(1, climb.most // 3) * len(frame.radius)
        for part in torch.arange(len(images)).split(max(1, FLOATS.get(self.device.type, 2**25) // floats)):
            own = None if ctf is None else ctf[part]
            views = self._views(frame, images[part] - offset, noise, own)
            mean, kinds = self._posterior(climber, views, power)
            if own is not None:
                mean = mean * own.images(size, self.device).flatten(1)[:, frame.pixels]
            shown = frame.images(mean)
            out.append((fit_into(shown, (height, width)) + offset).cpu())
            classes.append(torch.stack([kinds.view, kinds.junk, kinds.empty], 1).cpu())
        self.classes = torch.cat(classes)
        return torch.cat(out)

    def views_of(self, train: TrainingData) -> Views:
        """The noisy images as the fit wants them; notes their background and the spectrum of their noise on the way."""
        images = train.noisy
        n, height, width = images.shape
        if height != width or n < 4 or height < SMALLEST:
            needs = f"square boxes of at least {SMALLEST} px, at least 4"
            raise CryobenchError(f"em3d: {n} images of {width} x {height} px: it needs {needs}")
        if self.config.shift > height / 4:
            raise CryobenchError(
                f"em3d: shifts up to {self.config.shift:g} px in boxes of {height}: centre them better"
            )
        mask = corner_mask(height, width)
        offset = float(images[:, mask].double().mean()) if mask.any() else float(images.double().mean())
        if not train.sigma > 0:
            raise CryobenchError("em3d: the images' corners hold no noise: give their noise level (--sigma)")
        sigma = max(train.sigma, LEAST_NOISE * float(images.double().std()))
        power = radial_noise_power(images, ring_frequencies((height, width)))
        self.state = {"noise_power": power.float().to(self.device)}
        self.info = {"offset": offset, "noise": learn_levels(images, sigma)}
        self.info["background"] = background_variance(images, sigma)
        return self._views(Frame(height, self.device), images - offset, sigma, train.ctf)

    def _views(self, frame: Frame, images: Tensor, sigma: float, ctf: ContrastTransfer | None) -> Views:
        """Images (n, h, w) without their background, in units of the noise."""
        known = self.state["noise_power"]
        place = (2 * frame.radius / frame.size).clamp(max=1) * (len(known) - 1)
        low = place.floor().long().clamp(max=len(known) - 2)
        power = known[low].lerp(known[low + 1], place - low)
        transfer = None if ctf is None else ctf.images(frame.size, self.device)
        square = fit_into(images, (frame.size, frame.size))
        deviation = sigma * power.sqrt()
        deviation[0] *= (1 + self.info["background"] * frame.size**2) ** 0.5  # the sum of all pixels
        views = Views.of(frame, square, deviation, transfer)
        if self.info["noise"]["reliability"] < UNEVEN:
            return views
        return views.tempered(noise_variances(images, sigma, **self.info["noise"]).to(self.device))

    def _posterior(self, climber: PoseClimber, views: Views, power: Tensor) -> tuple[Tensor, em_classes.Classes]:
        """Mean coefficients (n, m) of the images without CTF, and what each shows."""
        contrast, scale = self.config.contrast, torch.ones(len(views), device=views.data.device)
        views = views.tempered(self.info["heat"])
        modes = climber.run(views)
        mean, evidence = mean_slices(climber, views, modes)
        if contrast:
            scale = gains(views, mean, contrast)
            views = views.scaled(scale)
            mean, evidence = mean_slices(climber, views, climber.follow(views, modes))
        mean[:, 0] = self.info["level"]  # all projections have the same sum
        poses = volume_of_poses(len(climber.group), self.config.shift)
        kinds = em_classes.classify(views, evidence, power, poses)
        mean = kinds.view[:, None] * mean + kinds.junk[:, None] * kinds.filtered
        return mean * scale[:, None], kinds


def ring_power(volume: Tensor, frame: Frame) -> Tensor:
    """Mean power of the slices of a volume in each ring."""
    rotations = random_rotations(64, torch.Generator().manual_seed(0), volume.device)
    slices = sample_slices(SliceTable(volume), rotations, frame, len(frame.radius))
    return em_classes.ring_means(slices, frame.radius)
