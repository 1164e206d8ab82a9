"""What two independent half maps show, place by place and frequency by frequency.

The Fourier shell correlation says how much of a shell is signal, averaged over the box. But most of the box is solvent,
where nothing is. Here each band of frequencies is looked at in a Gaussian window around each voxel. Half the mean
square of the halves' difference is the power N of the noise in one of them (taken as uniform in a band; on axes of
symmetry there is more); the covariance of the halves in the window is the power S of the signal. S / (S + N / 2) is
what is left of the band at that place in the whole: a Wiener filter in space and frequency.

As references the halves must stay independent. Were they filtered by their covariance, each would keep of pure noise
what both show by chance; the images would be turned to it, and the next halves would show more of it. So the signal of
a half is what its own power exceeds the noise by; only the level of the noise is taken from the difference.

A band is narrow in frequency, so its windows must be wide in space: much noise is left beside the particle. So the sum
of all bands is filtered in the same way once more, in the narrow windows that a whole spectrum allows. That serves as
the mask which other programs ask for. Small parts that are not well above the noise are weakened by it; as references,
where what is uncertain does harm, the halves are without them.
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
SAMPLES = 30
#: narrowest window, voxels
NARROW = 2.0
#: window for all bands together, voxels: standard deviation of a Gaussian
TIGHT = 1.0
#: a half's power in that window counts as signal beyond so many times the noise that is left where the halves show
#: something (not in the box, most of which is empty by then)
DOUBT = 3.0
#: power, in that of the particle, that gridding leaves of it elsewhere, the same in both halves
GHOSTS = 2e-4


def local_wiener(first: Tensor, second: Tensor, parts: Sequence[Tensor] = (), share: float = 1.0) -> list[Tensor]:
    """Half maps (d, d, d), unfiltered, as [whole, first, second, ...] filtered; then the same of ``parts``, maps from
    this share of a half's images: as many of the first half as of the second."""
    d = len(first)
    radius = shells(d, first.device)
    k = torch.fft.fftfreq(d, device=first.device)
    squared = k[:, None, None] ** 2 + k[:, None] ** 2 + torch.fft.rfftfreq(d, device=first.device) ** 2

    def windowed(z: Tensor, width: float) -> Tensor:
        """Mean in a Gaussian window around each voxel."""
        blur = torch.exp(-2 * (math.pi * width) ** 2 * squared)
        return torch.fft.irfftn(torch.fft.rfftn(z) * blur, s=(d, d, d)).clamp(min=0)

    a, b = torch.fft.rfftn(first), torch.fft.rfftn(second)
    others = [torch.fft.rfftn(part) for part in parts]
    out = [torch.zeros_like(first) for _ in range(3 + len(others))]
    # of each of them, whether it belongs to the whole (0), the first half or the second
    kin = [0, 1, 2, *(1 + 2 * i // len(others) for i in range(len(others)))]
    top = d // 2
    for centre in range(0, top + BAND, BAND):
        hat = (1 - (radius - centre).abs() / BAND).clamp(min=0) * (radius <= top)
        members = float(2 * hat.square().sum())
        if not members:
            continue
        # the wider the window the more it holds: enough to tell signal from noise
        volume = SAMPLES * d**3 / members
        width = min(max(volume ** (1 / 3) / (2 * math.sqrt(math.pi)), NARROW), d / 4)
        x, y = (torch.fft.irfftn(f * hat, s=(d, d, d)) for f in (a, b))
        noise = float((x - y).square().mean()) / 2  # of a half
        signals = [windowed(z, width) for z in (x * y, x * x - noise, y * y - noise)]
        bands = [(x + y) / 2, x, y, *(torch.fft.irfftn(f * hat, s=(d, d, d)) for f in others)]
        powers = [noise / 2, noise, noise, *[noise / share] * len(others)]
        for target, band, power, half in zip(out, bands, powers, kin, strict=True):
            target += band * signals[half] / (signals[half] + power + 1e-30)
    x, y = out[1:3]
    noise = (x - y).square() / 2  # type: ignore[assignment]  # of a half, place by place
    shown = windowed(x * x + y * y, TIGHT)
    doubt = DOUBT * (noise * shown).sum() / shown.sum().clamp(min=1e-30)
    # so few samples know their noise badly: the box's mean is added to it
    spread = windowed(noise, TIGHT) + noise.mean()  # type: ignore[arg-type, attr-defined]
    masks = []
    for z, least, part in ((x * y, 0.0, 0.5), (x * x, doubt, 1.0), (y * y, doubt, 1.0)):
        signal = (windowed(z, TIGHT) - least).clamp(min=0)
        ghosts = GHOSTS * signal.square().sum() / signal.sum().clamp(min=1e-30)
        masks.append(signal / (signal + part * spread + ghosts + 1e-30))
    return [volume * masks[half] for volume, half in zip(out, kin, strict=True)]
