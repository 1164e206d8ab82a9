"""On what scale images of a known structure are, where nobody says: from their power spectrum and their mean."""

from __future__ import annotations

import torch
from torch import Tensor

from cryobench.errors import CryobenchError
from cryobench.imaging.ctf import ContrastTransfer
from cryobench.imaging.projection import Projector
from cryobench.imaging.rotations import random_rotations

#: views of the structure that the images are compared with
VIEWS = 500
#: images transformed at once
CHUNK = 256


def image_scale(
    images: Tensor, volume: Tensor, sigma: float, ctf: ContrastTransfer | None = None
) -> tuple[float, float]:
    """scale and offset of images (n, h, w) = scale * CTF * projection of volume + offset + white noise.

    volume: (d, d, d) with d = max(h, w), on the device to use; ctf: of the images, only for square ones. Views are
    taken for uniform and particles for bright, so that scale > 0. The noise has power sigma^2 at every frequency, so
    that scale^2 is the slope of the images' power spectrum less sigma^2 over that of random projections. In the least
    squares fit strong, low frequencies count most, which makes it insensitive to errors in sigma.
    Raises CryobenchError where the slope is not positive: the images show nothing of the structure.
    """
    n, height, width = images.shape
    size = len(volume)
    top, left = size // 2 - height // 2, size // 2 - width // 2
    rotations = random_rotations(VIEWS, torch.Generator().manual_seed(0))
    filters = None if ctf is None else ctf[torch.arange(VIEWS) * n // VIEWS].images(size, volume.device)
    views = Projector(volume).project(rotations.to(volume.device), filters=filters)
    views = views[:, top : top + height, left : left + width].cpu()
    expected = _power(views)
    slope = float((expected * (_power(images) - sigma**2)).sum() / expected.square().sum())
    if not slope > 0:
        raise CryobenchError(
            f"nothing of the structure in these images above noise of sigma {sigma:.4g}: is --sigma right?"
        )
    scale = slope**0.5
    return scale, float(images.double().mean()) - scale * float(views.double().mean())


def _power(images: Tensor) -> Tensor:
    """Mean power spectrum of images (n, h, w) in the layout of rfft2, without the mean; white noise has sigma^2."""
    power = sum(torch.fft.rfft2(part).abs().double().square().sum(0) for part in images.split(CHUNK))
    power = torch.as_tensor(power) / images.numel()
    power[0, 0] = 0
    return power
