"""A plain U-Net (Ronneberger et al. 2015) of residual blocks, shared by the methods whose paper asks for "a U-Net".

It works on patches: ``patch`` x ``patch`` neighbouring pixels become channels first and are put back last. At the SNR
of cryo-EM a single pixel says next to nothing, so that little is lost, and the costly first level has patch^2 times
fewer places.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """x + conv(silu(gn(conv(silu(gn(x)))))), gn the group normalisation if asked for, with a bias from the noise level
    between the two convolutions if there is one.

    The last kernel starts at zero, so that a new block passes its input on.
    """

    def __init__(self, inputs: int, width: int, embedding: int, norm: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList(
            nn.GroupNorm(math.gcd(8, channels), channels) if norm else nn.Identity() for channels in (inputs, width)
        )
        self.first = nn.Conv2d(inputs, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.bias = nn.Linear(embedding, width) if embedding else None
        self.skip = nn.Conv2d(inputs, width, 1) if inputs != width else nn.Identity()
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor, level: Tensor | None) -> Tensor:
        h = self.first(F.silu(self.norms[0](x)))
        if self.bias is not None and level is not None:
            h = h + self.bias(level)[:, :, None, None]
        return self.skip(x) + self.second(F.silu(self.norms[1](h)))


class LevelEmbedding(nn.Module):
    """A number per image (n,) -> (n, width): sines and cosines of it at geometric frequencies, then two layers."""

    def __init__(self, width: int, highest: float = 1000.0) -> None:
        super().__init__()
        half = width // 2
        frequencies = torch.exp(torch.linspace(0, math.log(highest), half))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.layers = nn.Sequential(nn.Linear(2 * half, 2 * width), nn.SiLU(), nn.Linear(2 * width, width), nn.SiLU())

    def forward(self, level: Tensor) -> Tensor:
        angle = level[:, None] * torch.as_tensor(self.frequencies)
        return self.layers(torch.cat([angle.sin(), angle.cos()], dim=1))


class UNet(nn.Module):
    """Images (n, inputs, h, w) -> (n, outputs, h, w); the sides are multiples of :attr:`multiple`.

    widths: channels per level, each half as fine as the one before. blocks: residual blocks per level and side.
    patch: see above. levels: whether :meth:`forward` takes a noise level per image. norm: group normalisation.
    """

    def __init__(
        self,
        inputs: int = 1,
        outputs: int = 1,
        widths: Sequence[int] = (64, 128, 256),
        blocks: int = 1,
        patch: int = 2,
        levels: bool = False,
        norm: bool = False,
    ) -> None:
        super().__init__()
        self.patch, self.multiple = patch, patch * 2 ** (len(widths) - 1)
        embedding = 64 if levels else 0
        self.embed = LevelEmbedding(embedding) if levels else None
        self.enter = nn.Conv2d(inputs * patch**2, widths[0], 3, padding=1)
        self.down, self.shrink, self.grow, self.up = (nn.ModuleList() for _ in range(4))
        for k, width in enumerate(widths):
            self.down.append(nn.ModuleList(Block(width, width, embedding, norm) for _ in range(blocks)))
            if k + 1 < len(widths):
                self.shrink.append(nn.Conv2d(width, widths[k + 1], 2, stride=2))
                self.grow.append(nn.Conv2d(widths[k + 1], 4 * width, 1))
                self.up.append(
                    nn.ModuleList(Block(2 * width if j == 0 else width, width, embedding, norm) for j in range(blocks))
                )
        self.leave = nn.Conv2d(widths[0], outputs * patch**2, 3, padding=1)

    def forward(self, x: Tensor, level: Tensor | None = None) -> Tensor:
        embedded = None if self.embed is None else self.embed(level)
        h, kept = self.enter(F.pixel_unshuffle(x, self.patch)), []
        for k, level_blocks in enumerate(self.down):
            h = _through(level_blocks, h, embedded)
            if k < len(self.shrink):
                kept.append(h)
                h = self.shrink[k](h)
        for k in reversed(range(len(self.up))):
            h = _through(self.up[k], torch.cat([F.pixel_shuffle(self.grow[k](h), 2), kept[k]], dim=1), embedded)
        return F.pixel_shuffle(self.leave(F.silu(h)), self.patch).to(x.dtype)


def reach(levels: int, blocks: int, patch: int) -> int:
    """How many pixels beyond itself a place of the coarsest level, as part of the result, depends on.

    Two 3 x 3 kernels a block see one place each, of 1, 2, 4 ... patches; the first and the last kernel one patch each;
    on the way to a coarser level the edge moves out to that of a place there.
    """
    down, up = 2**levels - 1, 2 ** (levels - 1) - 1
    return patch * (2 + 2 * blocks * (down + up) + up)


def _through(blocks: nn.Module, h: Tensor, level: Tensor | None) -> Tensor:
    for block in blocks.children():
        h = block(h, level)
    return h
