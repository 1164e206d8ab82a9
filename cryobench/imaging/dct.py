"""The orthonormal DCT-II of images, and the frequencies of its coefficients.

Coefficient k of n belongs to the frequency k / (2n) cycles per pixel. The transform is that of the image continued by
half-sample reflection (d c b a | a b c d | d c b a), so that borders do not wrap around.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def dct_matrix(n: int, device: torch.device | str = "cpu") -> Tensor:
    """Orthonormal DCT-II of length n: (n, n) float32, rows are frequencies k / (2n) cycles per pixel."""
    k = torch.arange(n, dtype=torch.float64, device=device)
    matrix = torch.cos(math.pi * k[:, None] * (k[None, :] + 0.5) / n) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix.float()


def dct2(images: Tensor) -> Tensor:
    """DCT-II of images (n, h, w) along both axes."""
    h, w = images.shape[-2:]
    return dct_matrix(h, images.device) @ images @ dct_matrix(w, images.device).T


def idct2(coefficients: Tensor) -> Tensor:
    """Inverse of :func:`dct2`."""
    h, w = coefficients.shape[-2:]
    return dct_matrix(h, coefficients.device).T @ coefficients @ dct_matrix(w, coefficients.device)


def frequencies(n: int, device: torch.device | str = "cpu") -> Tensor:
    """Frequencies of a DCT-II of length n, (n,), in cycles per pixel, from 0 to just below 0.5."""
    return torch.arange(n, device=device) / (2 * n)


def radius(h: int, w: int, device: torch.device | str = "cpu") -> Tensor:
    """Radial frequency of each DCT coefficient, (h, w), in cycles per pixel."""
    return torch.hypot(frequencies(h, device)[:, None], frequencies(w, device)[None, :])
