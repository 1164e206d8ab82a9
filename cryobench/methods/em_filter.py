"""What two independent half maps agree on, place by place and frequency by frequency.

The Fourier shell correlation says how much of a shell is signal, averaged over the box. But most of the box is solvent,
where nothing is. Here each band of frequencies is looked at in a Gaussian window around each voxel: the covariance of
the halves there is the power of the signal S, the power of their difference that of the noise N (uniform in a band),
and S / (S + N) what is left of the band at that place: a Wiener filter in space and frequency. Where the halves agree
on nothing, nothing is left.

A band is narrow in frequency, so its windows must be wide in space: much noise is left beside the particle. So the sum
of all bands is filtered in the same way once more, in the narrow windows that a whole spectrum allows. That serves as
the mask which other programs ask for. What has less than some 5 % of the particle's density is weakened by it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cryobench.reconstruction.fourier import shells

#: distance of the bands' centres, shells
BAND = 5
#: independent numbers that a window should hold at least
SAMPLES = 40
#: narrowest window, voxels
NARROW = 2.0
#: window for all bands together, voxels: standard deviation of a Gaussian
TIGHT = 1.0
#: power, in that of the particle, that gridding leaves of it elsewhere, the same in both halves
GHOSTS = 2e-4


def local_wiener(first: Tensor, second: Tensor, parts: Sequence[Tensor] = (), share: float = 1.0) -> list[Tensor]:
    """Half maps (d, d, d), unfiltered, as [whole, first, second, ...] filtered: what both together are worth with the
    powers that they show, and what each is worth alone; then the same of ``parts``, maps from this share of a half's
    images."""
    d = len(first)
    radius = shells(d, first.device)
    k = torch.fft.fftfreq(d, device=first.device)
    squared = k[:, None, None] ** 2 + k[:, None] ** 2 + torch.fft.rfftfreq(d, device=first.device) ** 2
    a, b = torch.fft.rfftn(first), torch.fft.rfftn(second)
    others = [torch.fft.rfftn(part) for part in parts]
    out = [torch.zeros_like(first) for _ in range(3 + len(others))]
    top = d // 2
    for centre in range(0, top + BAND, BAND):
        hat = (1 - (radius - centre).abs() / BAND).clamp(min=0) * (radius <= top)
        members = float(2 * hat.square().sum())
        if not members:
            continue
        # the wider the window the more it holds: enough to tell signal from noise
        volume = SAMPLES * d**3 / members
        width = min(max(volume ** (1 / 3) / (2 * math.sqrt(math.pi)), NARROW), d / 4)
        blur = torch.exp(-2 * (math.pi * width) ** 2 * squared)
        x, y = (torch.fft.irfftn(f * hat, s=(d, d, d)) for f in (a, b))
        signal = torch.fft.irfftn(torch.fft.rfftn(x * y) * blur, s=(d, d, d)).clamp(min=0)
        noise = float((x - y).square().mean()) / 2  # of a half
        bands = [(x + y) / 2, x, y, *(torch.fft.irfftn(f * hat, s=(d, d, d)) for f in others)]
        powers = [noise / 2, noise, noise, *[noise / share] * len(others)]
        for target, band, power in zip(out, bands, powers, strict=True):
            target += band * signal / (signal + power + 1e-30)
    blur = torch.exp(-2 * (math.pi * TIGHT) ** 2 * squared)
    x, y = out[1:3]
    signal, spread = (
        torch.fft.irfftn(torch.fft.rfftn(z) * blur, s=(d, d, d)).clamp(min=0) for z in (x * y, (x - y) ** 2)
    )
    # so few samples know their noise badly: the box's mean is added to it
    ghosts = GHOSTS * signal.square().sum() / signal.sum().clamp(min=1e-30)
    mask = signal / (signal + (spread + spread.mean()) / 2 + ghosts + 1e-30)
    return [volume * mask for volume in out]
