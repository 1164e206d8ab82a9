"""Named scoring conventions: ``fair``, and the habits that the published tables probably had.

A convention says what a method is fed and what is scored. ``fair`` leaves the images as they are: one global
scale per data set, noise unclipped, data range 1. The ``legacy-*`` conventions are guesses, read from the
public code around the papers (their texts give no scale), to approach published rows on purpose:

* every clean image is scaled to its own [0, 1];
* the noisy image is scaled to *its* own [0, 1] - another gain and offset - or brought to the scale of the
  clean one and clipped there; some code then takes the noise for sigma = 25 grey levels of 255;
* PSNR = 10 log10(1 / MSE) whatever the range; SSIM with scikit-image's default 7x7 window and the range 2
  that it assumed for floating-point images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cryobench.errors import CryobenchError
from cryobench.metrics.images import affine_fit, mse, psnr, ssim, ssim_uniform

Prepare = Callable[[Tensor, Tensor, float], tuple[Tensor, float]]


@dataclass(frozen=True)
class Convention:
    """One way of feeding and scoring.

    scale: whose minimum and maximum become 0 and 1, image by image, in what is fed and scored: "none" (as
    given), "noisy", "clean", or "output" (nothing is fed; each denoised image is scaled on its own).
    clip: the noisy image is cut to [0, 1]. eight_bit: all images are rounded to 256 grey levels.
    sigma: noise level told to the method instead of the true one. ssim_range: data range of the 7x7 SSIM.
    """

    title: str
    scale: str = "none"
    clip: bool = False
    eight_bit: bool = False
    sigma: float | None = None
    ssim_range: float = 2.0

    @property
    def prepare(self) -> Prepare | None:
        """``prepare(clean, noisy, sigma) -> (noisy, sigma)`` as fed to a method; None: fed as they are."""
        return self._prepare if self.scale in ("noisy", "clean") else None

    def _prepare(self, clean: Tensor, noisy: Tensor, sigma: float) -> tuple[Tensor, float]:
        low, gain = _range_map(clean if self.scale == "clean" else noisy)
        fed = (noisy - low) * gain
        if self.clip:
            fed = fed.clamp(0, 1)
        # the scale differs from image to image, by a few percent in a stack of one specimen
        return self._levels(fed), float(sigma * gain.mean()) if self.sigma is None else self.sigma

    def score(
        self, denoised: Tensor, clean: Tensor, noisy: Tensor | None = None, prepared: bool = False
    ) -> dict[str, Tensor]:
        """Per-image values by metric; see :func:`score`."""
        if self.scale == "none":
            return _fair(denoised, clean)
        if self.scale == "output":
            denoised = _unit(denoised)
        elif not prepared:
            if self.scale == "noisy" and noisy is None:
                raise CryobenchError("this convention scales by the noisy images: give them too (--noisy)")
            low, gain = _range_map(clean if noisy is None or self.scale == "clean" else noisy)
            denoised = (denoised - low) * gain
        x, ref = self._levels(denoised), self._levels(_unit(clean))
        return {"mse": mse(x, ref), "psnr": psnr(x, ref, 1.0), "ssim": ssim_uniform(x, ref, self.ssim_range)}

    def _levels(self, images: Tensor) -> Tensor:
        return (images.clamp(0, 1) * 255).round() / 255 if self.eight_bit else images


CONVENTIONS = {
    "fair": Convention("one global scale, unclipped, range 1; raw and after a gain-and-offset fit (_fit)"),
    "legacy-zhang2024": Convention("noisy images scaled to their own [0, 1], true sigma", "noisy"),
    "legacy-zhang2024-sigma25": Convention(
        "noisy images scaled to their own [0, 1], sigma 25/255", "noisy", sigma=25 / 255
    ),
    "legacy-zhang2024-clipped": Convention(
        "noisy images clipped to the range of the clean ones, true sigma", "clean", clip=True
    ),
    "legacy-zhang2024-clipped-sigma25": Convention(
        "noisy images clipped to the range of the clean ones, sigma 25/255",
        "clean",
        clip=True,
        sigma=25 / 255,
    ),
    "legacy-zhang2024-rescaled": Convention("denoised images scaled to their own [0, 1]", "output"),
    "legacy-tang2022": Convention(
        "noisy images as 8-bit files on their own scale, peak 255", "noisy", eight_bit=True, ssim_range=1.0
    ),
}


def score(
    name: str, denoised: Tensor, clean: Tensor, noisy: Tensor | None = None, prepared: bool = False
) -> dict[str, Tensor]:
    """Per-image scores (n,) of denoised images (n, h, w) by metric, under the convention ``name``.

    ``fair``: mse, psnr (dB), ssim, each raw and ``_fit`` after a least-squares gain and offset per image;
    the clean images must lie in [0, 1] (:func:`unit_range`). ``legacy-*``: mse, psnr, ssim.
    noisy: the noisy images in the units of ``denoised``, where the convention scales by them.
    prepared: ``denoised`` came out of what ``CONVENTIONS[name].prepare`` returned. Otherwise it is in the
    units of ``clean`` and is brought to those of the convention: for a method that is equivariant to gain
    and offset that is the same, short of clipping and rounding.
    Raises CryobenchError for unknown names, unequal shapes, missing noisy images, clean images of another
    range.
    """
    if name not in CONVENTIONS:
        raise CryobenchError(f"no scoring convention {name!r}; there are: {', '.join(CONVENTIONS)}")
    return CONVENTIONS[name].score(denoised, clean, noisy, prepared)


def unit_range(clean: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """The clean stack with its range brought to [0, 1] by one gain and offset, and the others by the same."""
    low, high = clean.min(), clean.max()
    if not high > low:
        raise CryobenchError("the clean images are constant: there is nothing to compare with")
    return tuple((images - low) / (high - low) for images in (clean, *others))


def _fair(denoised: Tensor, clean: Tensor) -> dict[str, Tensor]:
    if clean.numel() and not (clean.min() > -0.01 and clean.max() < 1.01):
        raise CryobenchError(
            f"fair scores need clean images scaled to [0, 1] by one gain and offset per data set, "
            f"not a range of {float(clean.min()):.3g} to {float(clean.max()):.3g}"
        )
    out = {}
    for suffix, x in (("", denoised), ("_fit", affine_fit(denoised, clean))):
        out[f"mse{suffix}"] = mse(x, clean)
        out[f"psnr{suffix}"] = psnr(x, clean, 1.0)
        out[f"ssim{suffix}"] = ssim(x, clean, 1.0)
    return out


def _range_map(images: Tensor) -> tuple[Tensor, Tensor]:
    """Per image: minimum, and 1 / (maximum - minimum), both (n, 1, 1); gain 1 for a constant image."""
    low, high = images.amin(dim=(1, 2), keepdim=True), images.amax(dim=(1, 2), keepdim=True)
    spread = high - low
    return low, 1 / torch.where(spread > 0, spread, 1.0)


def _unit(images: Tensor) -> Tensor:
    low, gain = _range_map(images)
    return (images - low) * gain
