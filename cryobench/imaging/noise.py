"""Noise of a wanted strength: white, coloured, Poisson; and the contrast that varies between particles.

SNR is var(clean) / var(noise), both over all pixels of the stack, after the CTF. Random numbers are drawn on
the generator's device, by default the CPU, where a seed gives the same noise whatever the images' device; images
keep theirs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cryobench.errors import CryobenchError

#: what :func:`add_noise` knows
KINDS = ("white", "coloured", "poisson")


def noise_sigma(clean: Tensor, snr: float) -> float:
    """Standard deviation of the noise that gives the stack this SNR, in the units of the images.

    Raises CryobenchError for an SNR that is not positive and for images without contrast.
    """
    if not (snr > 0 and math.isfinite(snr)):
        raise CryobenchError(f"the SNR must be a positive number, not {snr}")
    variance = float(clean.double().var(correction=0))
    if not variance > 0:
        raise CryobenchError("the clean images have no contrast: no noise level gives them an SNR")
    return math.sqrt(variance / snr)


def white_noise(shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
    """Independent Gaussian noise of variance 1, float32, on the generator's device."""
    return torch.randn(shape, generator=generator, device=generator.device if generator is not None else "cpu")


def ice_spectrum(height: int, width: int, exponent: float = 2.0, knee: float = 0.05, floor: float = 0.2) -> Tensor:
    """Power spectrum (h, w // 2 + 1), float64, of a background like vitreous ice over a white floor.

    ``1 / (1 + (k / knee)^exponent) + floor`` with k in cycles per pixel, then scaled to a mean of 1 over all
    h * w frequencies, so that noise filtered with its square root keeps its variance. Divide a spectrum by it
    to whiten. The shape is a plain model of micrograph backgrounds (falling power, white detector noise), not
    a fit to one; exponent 0 is white.
    """
    ky = torch.fft.fftfreq(height, dtype=torch.float64)[:, None]
    kx = torch.fft.rfftfreq(width, dtype=torch.float64)[None, :]
    power = 1 / (1 + (torch.hypot(ky, kx) / knee) ** exponent) + floor
    # each column but the first, and the last of an even width, stands for two frequencies
    weight = torch.full((width // 2 + 1,), 2.0, dtype=torch.float64)
    weight[0] = 1
    if width % 2 == 0:
        weight[-1] = 1
    return power / ((power * weight).sum() / (height * width))


def coloured_noise(
    shape: tuple[int, int, int], spectrum: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Stationary Gaussian noise (n, h, w), float32, on the generator's device, of a given power spectrum.

    spectrum: (h, w // 2 + 1), not negative, in the layout of rfft2; by default :func:`ice_spectrum`. A
    pixel's expected variance is the spectrum's mean over all h * w frequencies: 1 for ``ice_spectrum``.
    """
    _, height, width = shape
    if spectrum is None:
        spectrum = ice_spectrum(height, width)
    if spectrum.shape != (height, width // 2 + 1):
        raise CryobenchError(
            f"the noise spectrum must have shape ({height}, {width // 2 + 1}), not {tuple(spectrum.shape)}"
        )
    transform = torch.fft.rfft2(white_noise(shape, generator))
    return torch.fft.irfft2(transform * spectrum.sqrt().to(transform.device, torch.float32), s=shape[-2:])


def poisson_noise(clean: Tensor, snr: float, generator: torch.Generator | None = None, dose: float = 20.0) -> Tensor:
    """What counting electrons adds to images (n, h, w): zero on average, stronger where more arrive.

    Model: the expected count in a pixel is ``N = dose + gain * (clean - mean(clean))``, the detector counts
    Poisson(N), and the image is the count brought back to the units of clean, so the noise is
    (count - N) / gain, of variance N / gain^2. ``gain = sqrt(dose * snr / var(clean))`` makes the SNR exact
    in expectation. dose: electrons per pixel, raised where the darkest pixel would count fewer than none.
    The lower the dose, the more the noise follows the signal; at high doses it is white and Gaussian.
    """
    variance = noise_sigma(clean, 1.0) ** 2
    sigma = noise_sigma(clean, snr)
    centred = clean.to(generator.device if generator is not None else "cpu").double()
    centred = centred - centred.mean()
    dose = max(dose, snr * float(centred.min()) ** 2 / variance)
    gain = math.sqrt(dose) / sigma
    expected = (dose + gain * centred).clamp(min=0)
    counts = torch.poisson(expected, generator=generator)
    return ((counts - expected) / gain).to(clean.device, torch.float32)


def add_noise(
    clean: Tensor, snr: float, kind: str = "white", generator: torch.Generator | None = None, sigma: float | None = None
) -> tuple[Tensor, float]:
    """Noisy images (n, h, w), not clipped, and the standard deviation of their noise, in the images' units.

    kind: one of :data:`KINDS`. The SNR holds in expectation: sigma = sqrt(var(clean) / snr), unless sigma is given.
    """
    sigma = noise_sigma(clean, snr) if sigma is None else sigma
    if kind == "white":
        noise = sigma * white_noise(tuple(clean.shape), generator).to(clean.device)
    elif kind == "coloured":
        noise = sigma * coloured_noise((len(clean), *clean.shape[1:]), generator=generator).to(clean.device)
    elif kind == "poisson":
        noise = poisson_noise(clean, noise_sigma(clean, 1.0) ** 2 / sigma**2, generator)
    else:
        raise CryobenchError(f"unknown noise {kind!r}: use {', '.join(KINDS)}")
    return clean + noise, sigma


def vary_contrast(images: Tensor, sd: float, generator: torch.Generator | None = None) -> Tensor:
    """Images (n, h, w) each multiplied by a gain of its own: log-normal, mean 1, standard deviation sd."""
    if sd < 0:
        raise CryobenchError(f"the standard deviation of the contrast must not be negative, not {sd}")
    width2 = math.log1p(sd**2)
    gains = torch.exp(math.sqrt(width2) * torch.randn(len(images), generator=generator) - width2 / 2)
    return images * gains.to(images.device)[:, None, None]
