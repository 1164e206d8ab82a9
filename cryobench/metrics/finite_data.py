"""The limit of a finite data set: how much of the Bayes limit is lost since the structure itself has to be estimated.

Let the poses of all n images be known. In shell k (cycles per box) there are then 4 pi k^2 real numbers to estimate by
least squares from n * order slices; and since an estimate with p numbers from n slices costs each slice p / n of
sigma^2, ring k of a slice has the squared error

    N_k = 4 pi k^2 sigma^2 / (n order),

which is spread evenly over the box. The structure is not: of its power in the ring, s_k, the place x has S_k(x) = s_k
w(x), w being its local power, 1 on average. Where that is less than the noise its mean is the better estimate. Could
place and frequency be told apart, a Wiener filter would leave the mean over x of

    E_k = N_k S_k(x) / (N_k + S_k(x)),

never more than either: of a structure that fills the part f of its box evenly, f N_k s_k / (f N_k + s_k).

The images to be denoised do not tell their pose, so what they become is a mean of slices over the posterior
(:mod:`cryobench.methods.bayes`). With the true volume it has the error P_k, at least 3 sigma^2 over all rings, and
keeps s_k - P_k of the structure's power: the error of a posterior mean is orthogonal to it. The volume's error goes
through the same mean. Where it varies with direction as the structure does, as much of it is kept, and ring k has in
all

    P_k + E_k (1 - P_k / s_k).

P_k + E_k is more than em3d leaves where the posterior is wide (``channel``, 64 px, SNR 0.1).

A yardstick, a little too good. A band of frequencies is not as narrow in space as w: a filter with these powers leaves
1.3 to 2.7 times E_k (the built-in structures in white noise), most in the lowest rings; the posterior over poses is
wider with a wrong volume, which counts in the low rings and where images are few; and with unknown poses the volume is
known less well.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def volume_error(power: Tensor, sigma: float, n: int, order: int = 1, envelope: Tensor | None = None) -> Tensor:
    """Squared error per ring (rings,) of a slice of the estimated volume, summed over the pixels of an image.

    power (rings,): of the clean images less their background, |transform|^2 / pixels summed over each ring; sigma: of
    white noise, in the units of the images; n: images that the volume comes from; order: of its point group; envelope:
    see :func:`local_power` (None: the structure fills its box evenly).
    """
    k = torch.arange(len(power), dtype=torch.float64)
    noise = 4 * math.pi * k**2 * sigma**2 / (n * order)
    noise[0] = sigma**2 / n  # one number, seen in every image
    places = torch.ones(1, dtype=torch.float64) if envelope is None else envelope.flatten().cpu().double()
    signals = (s * places for s in power.cpu().double())
    return torch.stack([(e * s / (e + s).clamp(min=1e-300)).mean() for e, s in zip(noise, signals, strict=True)])


def local_power(volume: Tensor, width: float = 1.0) -> Tensor:
    """Mean square (d, d, d) of a density about each voxel, 1 on average over the box; ``width``: standard deviation, in
    voxels, of the Gaussian about it. The narrower, the more is known of the structure, and the less error is left: of
    the built-in channel, 64 px, with 2 voxels a third more than with 1."""
    d = len(volume)
    k = torch.fft.fftfreq(d, device=volume.device)
    squared = k[:, None, None] ** 2 + k[:, None] ** 2 + torch.fft.rfftfreq(d, device=volume.device) ** 2
    blur = torch.exp(-2 * (math.pi * width) ** 2 * squared)
    power = torch.fft.irfftn(torch.fft.rfftn(volume**2) * blur, s=(d, d, d)).clamp(min=0)
    return power / power.mean().clamp(min=1e-30)


def with_poses_unknown(volume: Tensor, pose: Tensor, power: Tensor) -> Tensor:
    """Squared error per ring (rings,) of denoised images: ``pose``, what the limit with the true volume leaves, and of
    the volume's, from :func:`volume_error`, what a posterior mean over poses keeps; ``power`` as there."""
    return pose + volume * (1 - pose / power.clamp(min=1e-30)).clamp(0, 1)
