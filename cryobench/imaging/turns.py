"""The eight turns by 90 degrees and mirrors of an image, about the pixel that projections are centred on.

A projection so treated is another projection of the same structure: mirrored, it is the view from behind. That holds
about pixel n // 2. Reversing the pixels of an even side turns them about (n - 1) / 2 instead, half a pixel off, which
moves the particle by one pixel: more than a network forgives that knows where particles are centred (chapter "unet").
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: (quarter turns, mirrored)
TURNS = [(quarters, mirror) for mirror in (False, True) for quarters in range(4)]


def reverse(images: Tensor, axis: int) -> Tensor:
    """Pixel n // 2 + k of the axis goes to n // 2 - k; of an even side the first pixel, without partner, stays."""
    return images.flip(axis).roll(1 - images.shape[axis] % 2, axis)


def turn(images: Tensor, quarters: int, mirror: bool = False) -> Tensor:
    """Images (..., h, w), mirrored left to right if ``mirror``, then turned by quarters of a full turn, as rot90 does.

    (..., w, h) after an odd number of quarters.
    """
    images = reverse(images, -1) if mirror else images
    for _ in range(quarters % 4):
        images = reverse(images.mT, -2)
    return images


def turn_back(images: Tensor, quarters: int, mirror: bool = False) -> Tensor:
    """Undoes :func:`turn`."""
    images = turn(images, -quarters)
    return reverse(images, -1) if mirror else images


def over_turns(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``function`` of images (..., h, w), averaged over the eight turns of its input, each undone after it.

    The posterior mean of projections in white noise commutes with turning, a trained network only nearly. The mean
    commutes, and its squared error is the mean of those of the eight less their spread about it.
    """

    def averaged(images: Tensor) -> Tensor:
        return torch.stack([turn_back(function(turn(images, *t)), *t) for t in TURNS]).mean(0)

    return averaged
