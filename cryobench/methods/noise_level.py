"""The noise level of particle images, estimated where there is no particle."""

from __future__ import annotations

import torch
from torch import Tensor


def corner_mask(height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Pixels outside the largest centred ellipse, shape (height, width), boolean."""
    y = (torch.arange(height, device=device) - (height - 1) / 2) / (height / 2)
    x = (torch.arange(width, device=device) - (width - 1) / 2) / (width / 2)
    return y[:, None] ** 2 + x[None, :] ** 2 > 1


def estimate_sigma(images: Tensor) -> float:
    """Noise standard deviation of a stack (n, h, w), in its units, from the corners of the images.

    The mean of each image's corners is removed first, so that a varying background does not count.
    On whole micrographs the corners may hold particles: then this is an upper bound.
    """
    height, width = images.shape[-2:]
    mask = corner_mask(height, width, images.device)
    if int(mask.sum()) < 2:
        return float(images.std())
    variances = [part[:, mask].double().var(dim=1) for part in images.split(1024)]
    return float(torch.cat(variances).mean().sqrt())
