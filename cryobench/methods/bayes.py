"""The limit: the Bayes-optimal denoiser of images whose structure is known and whose pose is not.

For y = A P_R V + noise with V, A and the noise known and R uniform on SO(3), the posterior mean E[A P_R V | y] has the
least mean squared error of all estimates. What a method lacks to it is the method's own; what it lacks to the truth
nobody can have. Where the noise is weak only the pose is uncertain, three angles, and the error per pixel tends to
3 sigma^2 / n_pixels: each unknown number costs sigma^2, as in every regression.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from cryobench.errors import CryobenchError
from cryobench.imaging.boxes import fit_into
from cryobench.imaging.ctf import bfactor_2d
from cryobench.imaging.noise import ice_spectrum
from cryobench.imaging.projection import Projector
from cryobench.imaging.rotations import random_rotations, symmetry_matrices
from cryobench.methods.base import Budget, Denoiser
from cryobench.methods.pose_posterior import PoseSearch, Posterior, Search

if TYPE_CHECKING:
    from cryobench.imaging.ctf import ContrastTransfer
    from cryobench.imaging.training_data import TrainingData

#: a volume counts as symmetric when equivalent views differ by less than this part of their norm
SYMMETRIC = 0.03
#: noise weaker than this part of the signal's standard deviation is taken for this much: float32 has its limits
LEAST_NOISE = 0.05
#: images searched at once: up to about 2 MB each, and 0.2 GB where the noise is so strong that all poses count
IMAGES = {"cpu": 128, "cuda": 500}


class Method(Denoiser):
    """Posterior mean over poses of the known structure."""

    name = "bayes"
    paper = "scheres2012relion"
    supervision = "reference"
    equivariant = False  # it knows the images' scale
    uses_ctf = True
    costly = True
    Config = Search
    profiles: ClassVar[dict[str, dict[str, Any]]] = {"smoke": {"spacing": 15.0, "most": 300, "levels": 6}}

    def fit(self, train: TrainingData, budget: Budget) -> None:
        """Keep the structure and the kind of noise. Raises SupervisionError where the structure may not be seen, and
        CryobenchError for data whose posterior is over more than poses."""
        reference = train.reference
        if reference.noise == "poisson":
            raise CryobenchError("bayes: the posterior is for Gaussian noise; simulate with white or coloured noise")
        if reference.shift or reference.contrast:
            raise CryobenchError("bayes: the posterior is over orientations only; simulate without shifts and contrast")
        group = reference.symmetry if _is_symmetric(reference.volume, reference.symmetry) else "C1"
        self.state = {"volume": reference.volume.to(self.device, torch.float32) * reference.scale}
        self.info = {"symmetry": group, "offset": reference.offset, "noise": reference.noise}
        self.info |= {"bfactor": reference.bfactor, "pixel_size": train.pixel_size}

    def denoise(self, images: Tensor, sigma: float | None = None, ctf: ContrastTransfer | None = None) -> Tensor:
        """Posterior means of images (n, h, w) at the structure's pixel size; sigma as in :class:`Denoiser`.

        Of the largest stack so far, ``expected`` (n,) then holds the posterior variance per pixel of each image, which
        is its expected squared error, and ``info["limit"]`` says: n; ``posterior_variance``, their mean; ``mc_error``,
        by what part of it the last doubling of the poses changed the means; ``poses``, the median number that share
        the weight. Images of another shape than the structure's box are filled up with
        background. Raises CryobenchError before fit.
        """
        posterior = self.posterior(images, float(sigma or 0), ctf)
        expected = posterior.variance.double()
        if len(images) > self.info.get("limit", {"n": 0})["n"]:
            self.info["limit"] = {
                "n": len(images),
                "posterior_variance": float(expected.mean()),
                "mc_error": float((posterior.change * expected).sum() / expected.sum().clamp(min=1e-30)),
                "poses": float(posterior.cells.median()),
            }
            self.info["mc_error"] = self.info["limit"]["mc_error"]
            self.expected = posterior.variance
        return posterior.mean

    def posterior(self, images: Tensor, sigma: float, ctf: ContrastTransfer | None = None) -> Posterior:
        """Posterior over poses of images (n, h, w); its mean is the denoised images."""
        if "volume" not in self.state:
            raise CryobenchError("bayes knows the structure only after fit: give --reference or --weights")
        height, width = images.shape[1:]
        size, offset = max(height, width), self.info["offset"]
        images = fit_into(images.to(self.device, torch.float32) - offset, (size, size))
        volume = fit_into(self.state["volume"], (size, size, size))
        projector = Projector(volume)
        signal = float(projector.project(torch.eye(3, device=self.device)[None]).std())
        power = ice_spectrum(size, size) if self.info["noise"] == "coloured" else torch.ones(size, size // 2 + 1)
        power = power.float() * max(sigma, LEAST_NOISE * signal) ** 2
        search = PoseSearch(projector, power, symmetry_matrices(self.info["symmetry"]), _radius(volume), self.config)
        constant = None
        if ctf is None and self.info["bfactor"]:
            constant = bfactor_2d(self.info["bfactor"], self.info["pixel_size"], size)[None]
        found = []
        step = IMAGES.get(self.device.type, 128)
        for start in range(0, len(images), step):
            part = slice(start, start + step)
            found.append(search.run(images[part], constant if ctf is None else ctf[part].images(size, self.device)))
        mean, variance, change, cells = (
            torch.cat([getattr(p, name) for p in found]) for name in ("mean", "variance", "change", "cells")
        )
        return Posterior(fit_into(mean, (height, width)) + offset, variance, change, cells)


def _radius(volume: Tensor) -> float:
    """Root mean square distance of the density from the centre, in pixels."""
    axis = torch.arange(len(volume), device=volume.device, dtype=torch.float32) - len(volume) // 2
    squared = axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2
    energy = volume.square()
    return float(((energy * squared).sum() / energy.sum().clamp(min=1e-30)).sqrt().clamp(min=1.0))


def _is_symmetric(volume: Tensor, symmetry: str) -> bool:
    """Whether equivalent views of the volume (d, d, d) are equal as far as projections are exact."""
    group = symmetry_matrices(symmetry).float().to(volume.device)
    rotations = random_rotations(4, torch.Generator().manual_seed(0), volume.device)
    projector = Projector(volume)
    views = projector.project(rotations)
    views = views - views.mean((1, 2), keepdim=True)
    for element in group[1:]:
        other = projector.project(element @ rotations)
        other = other - other.mean((1, 2), keepdim=True)
        if float((other - views).norm()) > SYMMETRIC * float(views.norm()):
            return False
    return True
