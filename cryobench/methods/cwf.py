"""Covariance Wiener filter: learn how particle images vary, and keep of each image what varies like that.

Bhamre, Zhang and Singer, J. Struct. Biol. 195:72 (2016). An image is y = A x + noise, with the contrast transfer A.
Particles lie on the grid in all in-plane directions and, since mirrored views are as frequent, both ways up. In a
steerable basis the mean of x is then radial and its covariance has one block C_k per angular frequency k, shared by
cosine and sine. Both are estimated from noisy images with different A, and each image is filtered with them:

    x^ = mean + C A^T (A C A^T + N)^-1 (y - A mean).

The noise covariance N is sigma^2 times a radial power spectrum, which is estimated from the corners of the boxes.
Images pass in small parts, to the device and back: memory grows by the stacks given and returned, and by nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from cryobench.errors import CryobenchError
from cryobench.imaging.ctf import ContrastTransfer, ctf_1d
from cryobench.imaging.steerable import SteerableBasis
from cryobench.methods.base import Budget, Denoiser
from cryobench.methods.covariance import Moments, by_frequency
from cryobench.methods.noise_level import corner_mask
from cryobench.methods.noise_spectrum import MOST, radial_noise_power

if TYPE_CHECKING:
    from cryobench.imaging.training_data import TrainingData

PIXELS = 2**21  # of the images that are expanded at once: more are no faster on a CPU
TURN = 0.125  # how far the CTF's phase at the band limit may turn from one defocus group to the next, in pi


@dataclass(frozen=True)
class Config:
    """What the paper leaves open.

    ctf_groups: most groups of mean defocus to learn from, each with one radial CTF (astigmatism is left out).
    whiten: estimate the noise's spectrum instead of taking it for white.
    band_limit: highest frequency of the basis in cycles per pixel.
    samples: independent samples of C_k in an image, cosine and sine, for k > 0. ASPIRE counts 1.
    """

    ctf_groups: int = 50
    whiten: bool = True
    band_limit: float = 0.5
    samples: int = 2


class Method(Denoiser):
    """Covariance Wiener filter in the Fourier-Bessel basis.

    What is learnt belongs to the box size of the training images, at their pixel size: other images are cropped
    or continued with the background to that size about their centre, and hold background outside.
    """

    name = "cwf"
    paper = "bhamre2016"
    supervision = "noisy"
    trained = True
    equivariant = False  # mean and covariance are in the training images' units
    uses_ctf = True
    streams = True
    Config = Config
    _basis: SteerableBasis | None = None

    def fit(self, train: TrainingData, budget: Budget) -> None:
        """Learn mean and covariance from noisy images, and their CTFs where they have one.

        Raises CryobenchError for images that are too large to be boxes of one particle.
        """
        size = min(train.noisy.shape[1:])
        basis = SteerableBasis(size, self.config.band_limit, device=self.device)
        images, corners, at_once = train.noisy, corner_mask(size, size), max(1, PIXELS // size**2)
        means = [_resize(part, size)[0][:, corners].mean(1) for part in images.split(at_once)]
        background = torch.cat(means).mean().to(self.device)
        whiten = self.config.whiten and train.sigma > 0
        first, _ = _resize(images[:MOST], size)
        noise = radial_noise_power(first, basis.nodes) if whiten else torch.ones_like(basis.nodes)
        self.info = {"size": size, "pixel_size": train.pixel_size, "ctf": train.ctf is not None, "images": len(images)}
        if train.ctf is not None:
            self.info |= self._defocus_steps(train.ctf)
        moments = Moments(basis, noise.to(self.device))
        for members, profile in self._groups(train.ctf, len(images), basis):
            parts = (_resize(images[part], size)[0].to(self.device) for part in members.split(at_once))
            moments.add((part - background for part in parts), profile)
        mean, covariance, eigenvalues, shrunk = moments.solve(train.sigma**2, self.config.samples)
        values, vectors = torch.linalg.eigh(covariance)
        values, vectors = values.flip(-1).clamp(min=0), vectors.flip(-1)
        # only the frequencies and components that carry something are kept, and k = 0 for the mean
        used = values > 1e-6 * values.max()
        used[0, 0] = True
        frequencies, rank = used.any(1).nonzero()[:, 0], int(used.any(0).sum())
        state = {
            "mean": mean,
            "frequencies": frequencies,
            "components": (vectors * values.sqrt()[:, None])[frequencies, :, :rank],
            "noise": noise,
            "background": background,
            "eigenvalues": eigenvalues,
            "shrunk": shrunk,
        }
        self.state = {name: value.to(self.device, torch.float32) for name, value in state.items()}

    def denoise(self, images: Tensor, sigma: float | None = None, ctf: ContrastTransfer | None = None) -> Tensor:
        """Denoise images (n, h, w), which keep the effect of their CTF; sigma 0 projects onto the components learnt.

        A method that learnt from images without CTF ignores ctf. Raises CryobenchError when not fitted, for images
        of more than twice the size learnt, and when the CTF is missing or belongs to another pixel size.
        """
        return self._filter(images, sigma or 0.0, ctf, contrast=True)

    def restore(self, images: Tensor, sigma: float, ctf: ContrastTransfer) -> Tensor:
        """As :meth:`denoise`, but the images as they were before the CTF."""
        with torch.no_grad():
            return self._filter(images.float(), sigma, ctf, contrast=False)

    def _filter(self, images: Tensor, sigma: float, ctf: ContrastTransfer | None, contrast: bool) -> Tensor:
        if not self.state:
            raise CryobenchError("cwf knows no covariance yet: fit it to noisy images, or load weights")
        size = self.info["size"]
        if max(images.shape[1:]) > 2 * size:
            h, w = images.shape[1:]
            raise CryobenchError(
                f"cwf learnt boxes of {size} px with one particle; {h} x {w} px is none: cut out boxes"
            )
        if self.info["ctf"]:
            if ctf is None:
                raise CryobenchError("cwf learnt from images with a CTF: it needs that of these images too")
            if abs(ctf.optics.pixel_size / self.info["pixel_size"] - 1) > 1e-3:
                learnt, given = self.info["pixel_size"], ctf.optics.pixel_size
                raise CryobenchError(f"cwf learnt at {learnt:g} A per pixel, these images have {given:g}: rescale them")
        state = {name: value.double() for name, value in self.state.items()}
        background, components = self.state["background"], state["components"]
        basis = self._learnt_basis()
        out = torch.empty_like(images, device="cpu")
        precision = basis.radial_matrices(1 / state["noise"])
        identity = torch.eye(components.shape[2], device=self.device)
        for members, profile in self._groups(ctf if self.info["ctf"] else None, len(images), basis):
            transfer = basis.radial_matrices(profile)
            # C A^T (A C A^T + N)^-1 = U (U^T A^T P^-1 A U + sigma^2)^-1 U^T A^T P^-1, with C = U U^T, N = sigma^2 P
            seen = transfer @ components
            inner = seen.mT @ precision @ seen
            floor = max(sigma**2, 1e-9 * float(inner.diagonal(dim1=1, dim2=2).max()), 1e-30)
            gain = components @ torch.linalg.solve(inner + floor * identity, seen.mT @ precision)
            shift = state["mean"] - gain[0] @ transfer[0] @ state["mean"]
            if contrast:
                gain, shift = transfer @ gain, transfer[0] @ shift
            gain, shift = gain.mT.float(), shift.float()
            for part in members.split(max(1, PIXELS // size**2)):
                inside, back = _resize(images[part].to(self.device) - background, size)
                coefficients = basis.expand(inside)
                filtered = (by_frequency(coefficients) @ gain).view(len(gain), -1, 2, gain.shape[2]).transpose(0, 1)
                filtered[:, 0, 0] += shift
                out[part] = (F.pad(basis.evaluate(filtered), back) + background).cpu()
        return out

    def _learnt_basis(self) -> SteerableBasis:
        """The basis without the angular frequencies that carry nothing; kept, as long as the method, for more calls."""
        size, frequencies = self.info["size"], self.state["frequencies"].long().cpu()
        basis = self._basis
        if basis is None or basis.size != size or not torch.equal(basis.frequencies, frequencies):
            basis = SteerableBasis(size, self.config.band_limit, tuple(frequencies.tolist()), self.device)
            self._basis = basis
        return basis

    def _defocus_steps(self, ctf: ContrastTransfer) -> dict[str, float]:
        """Middle and distance of the defocus groups in angstrom, for these images and all that come later.

        The distance turns the phase of the CTF at the band limit by TURN pi, or by the least multiple of it that
        gives no more than ``ctf_groups`` groups. Single outliers do not count.
        """
        defocus = _mean_defocus(ctf)
        middle, frequency = float(defocus.median()), self.config.band_limit / ctf.optics.pixel_size
        step = finest = TURN / (ctf.optics.wavelength * frequency**2)
        while len(((defocus - middle) / step).round().unique()) > self.config.ctf_groups:
            step += finest
        return {"defocus": middle, "defocus_step": step}

    def _groups(self, ctf: ContrastTransfer | None, n: int, basis: SteerableBasis) -> Iterator[tuple[Tensor, Tensor]]:
        """Images of similar defocus, as indices, and the radial CTF in the middle of each group, at the basis's nodes.

        What fit wrote down says which group an image belongs to, whatever other images there are.
        """
        if ctf is None:
            yield torch.arange(n), torch.ones_like(basis.nodes, device=self.device)
            return
        middle, step = self.info["defocus"], self.info["defocus_step"]
        number = ((_mean_defocus(ctf) - middle) / step).round()
        for group in number.unique():
            profile = ctf_1d(middle + step * group, basis.nodes, ctf.optics, ctf.bfactor)
            yield (number == group).nonzero()[:, 0], profile.to(self.device)


def _mean_defocus(ctf: ContrastTransfer) -> Tensor:
    """In angstrom (n,), float64, on the CPU."""
    defocus = ctf.defocus[:, :2].double().mean(1).cpu()
    if not torch.isfinite(defocus).all():
        raise CryobenchError("the defocus holds NaN or infinite values: mend or remove those images first")
    return defocus


def _resize(images: Tensor, size: int) -> tuple[Tensor, list[int]]:
    """Images (n, h, w) cropped or continued with zeros to (n, size, size) about their centre, and the way back."""
    h, w = images.shape[1:]
    margins = [size // 2 - w // 2, 0, size // 2 - h // 2, 0]
    margins[1], margins[3] = size - w - margins[0], size - h - margins[2]
    return F.pad(images, margins) if any(margins) else images, [-margin for margin in margins]
