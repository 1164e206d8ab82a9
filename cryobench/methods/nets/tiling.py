"""Run a convolutional network over images of any size within a bounded memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

#: pixels computed at once; 64 channels of float32 make 256 MB of a million. A GPU wants many
PIXELS = {"cpu": 1_000_000, "cuda": 4_000_000}


def apply_tiled(
    net: Callable[[Tensor], Tensor], images: Tensor, margin: int, multiple: int = 1, tile: int = 512
) -> Tensor:
    """``net`` ((n, c, h, w) -> (n, 1, h, w)) applied to images (n, h, w), or (n, c, h, w), in chunks and, if larger,
    in tiles; returns (n, h, w).

    multiple: sides that the network can take; images are padded at the far edges by repeating the last pixel.
    margin: how far the network sees; tiles overlap by it, rounded up, so that no seam can be seen (exactly
    none for a network that sees no farther).
    """
    height, width = images.shape[-2:]
    padded = F.pad(
        images if images.ndim == 4 else images[:, None], (0, -width % multiple, 0, -height % multiple), mode="replicate"
    )
    tile, margin = (multiple * -(-v // multiple) for v in (tile, margin))
    out = torch.empty_like(padded[:, :1])
    for top in range(0, padded.shape[2], tile):
        for left in range(0, padded.shape[3], tile):
            # the tile, grown by the margin where the image goes on
            y0, x0 = max(0, top - margin), max(0, left - margin)
            part = padded[:, :, y0 : top + tile + margin, x0 : left + tile + margin]
            step = max(1, PIXELS.get(part.device.type, 1_000_000) // (part.shape[2] * part.shape[3]))
            done = torch.cat([net(chunk) for chunk in part.split(step)])
            out[:, :, top : top + tile, left : left + tile] = done[:, :, top - y0 :, left - x0 :][:, :, :tile, :tile]
    return out[:, 0, :height, :width]
