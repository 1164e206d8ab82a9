"""Image scores: one value per image, computed in float64; the data range is always named.

SSIM is computed as scikit-image does it, with the border that the window cannot reach left out. torchmetrics
averages over the border too and differs by 12 % on small images.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cryobench.errors import CryobenchError

#: images handled at once by SSIM, in pixels: its five filtered maps should stay small
_CHUNK_PIXELS = 2**18


def mse(x: Tensor, ref: Tensor) -> Tensor:
    """Mean squared error over all pixels; x, ref (n, h, w), result (n,) in squared units of the images."""
    x, ref = _pair(x, ref)
    return (x - ref).square().mean(dim=(1, 2))


def psnr(x: Tensor, ref: Tensor, data_range: float) -> Tensor:
    """10 log10(data_range^2 / MSE) in dB, (n,); infinite where x equals ref."""
    return 10 * torch.log10(_positive(data_range) ** 2 / mse(x, ref))


def ssim(x: Tensor, ref: Tensor, data_range: float) -> Tensor:
    """Structural similarity of Wang et al. 2004 (doi 10.1109/TIP.2003.819861), (n,), at most 1.

    Gaussian window of 11x11 pixels, sigma 1.5, K1 = 0.01, K2 = 0.03, population covariances, mean over the
    pixels whose window lies inside the image. Raises CryobenchError for images smaller than the window.
    """
    position = torch.arange(-5, 6, dtype=torch.float64)
    window = torch.exp(-(position**2) / (2 * 1.5**2))
    return _ssim(x, ref, data_range, window / window.sum(), unbiased=1.0)


def ssim_uniform(x: Tensor, ref: Tensor, data_range: float) -> Tensor:
    """SSIM with a uniform 7x7 window and sample covariances, scikit-image's default, (n,).

    Raises CryobenchError for images smaller than the window.
    """
    window = torch.full((7,), 1 / 7, dtype=torch.float64)
    return _ssim(x, ref, data_range, window, unbiased=49 / 48)


def affine_fit(x: Tensor, ref: Tensor) -> Tensor:
    """Each image of x (n, h, w) with the gain and offset that bring it closest to ref in least squares.

    A constant image becomes the mean of its reference. Result float64, (n, h, w).
    """
    x, ref = _pair(x, ref)
    mean_x, mean_ref = x.mean(dim=(1, 2), keepdim=True), ref.mean(dim=(1, 2), keepdim=True)
    centred = x - mean_x
    power = centred.square().sum(dim=(1, 2), keepdim=True)
    # what rounding leaves of a constant image is no signal to be scaled up
    flat = power <= 1e-12 * x.square().sum(dim=(1, 2), keepdim=True)
    gain = (centred * (ref - mean_ref)).sum(dim=(1, 2), keepdim=True) / power.where(~flat, 1.0)
    return gain.where(~flat, 0.0) * centred + mean_ref


def _ssim(x: Tensor, ref: Tensor, data_range: float, window: Tensor, unbiased: float) -> Tensor:
    x, ref = _pair(x, ref)
    _positive(data_range)
    height, width = x.shape[1:]
    if min(height, width) < len(window):
        raise CryobenchError(f"SSIM needs images of at least {len(window)} pixels a side, not {height}x{width}")
    window = window.to(x.device)
    step = max(1, _CHUNK_PIXELS // (height * width))
    parts = [
        _ssim_map(x[i : i + step], ref[i : i + step], data_range, window, unbiased).mean(dim=(1, 2))
        for i in range(0, len(x), step)
    ]
    return torch.cat(parts) if parts else x.new_zeros(0)


def _ssim_map(x: Tensor, ref: Tensor, data_range: float, window: Tensor, unbiased: float) -> Tensor:
    maps = torch.stack([x, ref, x * x, ref * ref, x * ref], dim=1).flatten(0, 1)
    # the window is separable; as a product with banded matrices it takes a tenth of the time of conv2d
    maps = _band(window, maps.shape[1]) @ maps @ _band(window, maps.shape[2]).T
    mean_x, mean_ref, xx, rr, xr = maps.view(len(x), 5, *maps.shape[1:]).unbind(1)
    var_x = unbiased * (xx - mean_x**2)
    var_ref = unbiased * (rr - mean_ref**2)
    cov = unbiased * (xr - mean_x * mean_ref)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    return ((2 * mean_x * mean_ref + c1) * (2 * cov + c2)) / ((mean_x**2 + mean_ref**2 + c1) * (var_x + var_ref + c2))


def _band(window: Tensor, size: int) -> Tensor:
    """Matrix (size - len(window) + 1, size) that filters a vector where the window lies inside it."""
    rows = size - len(window) + 1
    band = window.new_zeros(rows, size)
    for i, value in enumerate(window):
        band.diagonal(i)[:rows] = value
    return band


def _positive(data_range: float) -> float:
    if not (data_range > 0 and math.isfinite(data_range)):
        raise CryobenchError(f"the data range must be a positive number, not {data_range}")
    return float(data_range)


def _pair(x: Tensor, ref: Tensor) -> tuple[Tensor, Tensor]:
    if x.ndim != 3 or x.shape != ref.shape:
        raise CryobenchError(
            f"images and reference must have the same shape (n, height, width), "
            f"not {tuple(x.shape)} and {tuple(ref.shape)}"
        )
    return x.double(), ref.to(x.device).double()
