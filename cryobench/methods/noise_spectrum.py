"""The noise's power spectrum, estimated where there is no particle: in the corners of the boxes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cryobench.methods.noise_level import corner_mask

#: images whose corners are looked at; their pixels are many more than the numbers that are estimated
MOST = 500


def radial_noise_power(images: Tensor, frequencies: Tensor, reach: float = 0.25) -> Tensor:
    """Power of stationary, isotropic noise in boxes (n, size, size) at radial frequencies (m,) in cycles per pixel.

    Scaled to a mean of 1 over the square of all frequencies, so that white noise has 1 everywhere; float64, on the
    CPU. Blackman and Tukey (1958): the autocovariance at the lags between corner pixels, averaged over the images,
    under a Hann window that ends at ``reach`` times the size, and its transform
    P(f) = sum over lags t of C(t) cos(2 pi f . t), with the cosine averaged over directions, J_0(2 pi f |t|).
    Images without noise in their corners count as white.
    """
    size = images.shape[-1]
    mask = corner_mask(size, size, images.device)
    chosen = images[:MOST]
    background = chosen[:, mask].mean()
    padded = (2 * size, 2 * size)
    power = torch.zeros(2 * size, size + 1, dtype=torch.float64)
    for part in chosen.split(128):
        corners = (part - background) * mask
        power += torch.fft.rfft2(corners, s=padded).abs().square().sum(0).cpu()
    pairs = torch.fft.irfft2(torch.fft.rfft2(mask.double().cpu(), s=padded).abs().square(), s=padded).round()
    lag = torch.fft.fftfreq(2 * size, 1 / (2 * size)).double()
    distance = torch.hypot(lag[:, None], lag[None, :])
    end = max(2.0, reach * size)
    used = (pairs > 0) & (distance < end)
    covariance = torch.fft.irfft2(power, s=padded)[used] / (pairs[used] * len(chosen))
    variance = covariance[distance[used] == 0]
    if not len(variance) or not variance > 0:
        return torch.ones_like(frequencies, dtype=torch.float64, device="cpu")
    weight = 0.5 + 0.5 * torch.cos(math.pi * distance[used] / end)
    waves = torch.special.bessel_j0(2 * math.pi * frequencies.double().cpu()[:, None] * distance[used])
    # a spectrum is positive; a window over few samples does not know that
    return (waves @ (covariance * weight) / variance).clamp(min=0.02)
