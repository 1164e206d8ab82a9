"""Boxes of other sizes around the same centre."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def fit_into(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Pad the last axes of x with zeros, or crop them, to ``shape``; the centre, index size // 2, stays the centre."""
    padding: list[int] = []
    for old, new in zip(reversed(x.shape), reversed(shape), strict=False):
        before = new // 2 - old // 2
        padding += [before, new - old - before]
    return F.pad(x, padding)
