"""What a denoised stack is made of: signal, bias and noise, in total and per ring (Palovcak et al. 2020).

Two exposures of the same particles, y1 = s + n1 and y2 = s + n2 with independent noise, are denoised apart:
d1 = f(y1), d2 = f(y2). Write d = s + b + e: b is what the denoiser does to this particle in every exposure (its
bias), e what differs between exposures (the noise that is left). Averages over particles and pixels then give

* S = cov(y1, y2) and N = var(y) - S: signal and noise of the input, SNR = S / N;
* N_d = var(d) - cov(d1, d2): noise of the output;
* B = cov(d1, d2) + S - 2 cov(d1, y2): its bias. N_d + B is the mean squared error about the mean images (see
  below): that of d - mean(d) against s - mean(s). SNBR = S / (N_d + B) is one over this error, relative to S, and
  does not say how much was *learned* about the particle: an output that does not depend on its input has SNBR 1,
  and y times the best number has SNBR 1 + SNR;
* g = cov(d1, y2) / S, the gain, and B' = cov(d1, d2) - g^2 S, the bias that no rescaling would take away. The
  scale-free SNBR' = g^2 S / (N_d + B') is 0 for an output that does not depend on its input, exactly SNR for any
  multiple of y, and rho^2 / (1 - rho^2) for a correlation rho of d with s. In a ring, what exceeds SNR was gained.
  In total a filter raises it too, by weighing rings; :func:`best_filter` says how far that goes.

Covariances are taken about the *mean image of the stack*, pixel by pixel: centred particles share a mean image, and
to draw it is no knowledge of any of them (in patches of micrographs, for which the paper defines SNBR, it is flat).
S, and with it SNR, is therefore that of the differences between particles, smaller than var(clean) / var(noise).
The paper's code uses one cross term, one variance and absolute values; here both are averaged and the real parts
kept, which leaves a small negative number where there is nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cryobench.errors import CryobenchError
from cryobench.imaging.rings import ring_index, ring_sums


@dataclass(frozen=True)
class Powers:
    """The measured powers per pixel, squared units of the images: shape () in total, (rings,) per ring.

    signal S; noise N; output var(d); common cov(d1, d2); cross cov(d, s). White noise has its variance in each ring.
    """

    signal: Tensor
    noise: Tensor
    output: Tensor
    common: Tensor
    cross: Tensor

    @property
    def noise_out(self) -> Tensor:
        """N_d."""
        return self.output - self.common

    @property
    def bias(self) -> Tensor:
        """B, with the loss of signal in it: an output of nothing has B = S."""
        return self.common + self.signal - 2 * self.cross

    @property
    def gain(self) -> Tensor:
        """g, 0 where there is no signal."""
        return _ratio(self.cross, self.signal)

    @property
    def bias_scale_free(self) -> Tensor:
        """B'."""
        return self.common - self.gain * self.cross

    @property
    def snr(self) -> Tensor:
        return _ratio(self.signal, self.noise)

    @property
    def snbr(self) -> Tensor:
        """S / (N_d + B)."""
        return _ratio(self.signal, self.noise_out + self.bias)

    @property
    def snbr_scale_free(self) -> Tensor:
        """g^2 S / (N_d + B')."""
        return _ratio(self.gain * self.cross, self.noise_out + self.bias_scale_free)


def powers(y1: Tensor, y2: Tensor, d1: Tensor, d2: Tensor, clean: Tensor | None = None) -> tuple[Powers, Powers]:
    """Powers in total and per ring (min(h, w) // 2 + 1) of two exposures and their denoised versions, all (n, h, w).

    With ``clean`` signal, noise and cross are taken from the truth, which is the same in expectation and much less
    noisy: S = var(s), N = var(y - s), cross = cov(d, s). The total is over all frequencies, those beyond the last
    ring too. Raises CryobenchError for stacks that differ in shape or hold fewer than two images.
    """
    stacks = [y1, y2, d1, d2, *([] if clean is None else [clean])]
    if y1.ndim != 3 or any(x.shape != y1.shape for x in stacks):
        raise CryobenchError(f"stacks of one shape (n, h, w) are needed, not {[tuple(x.shape) for x in stacks]}")
    if len(y1) < 2:
        raise CryobenchError("one particle has no variance: signal, bias and noise need at least two")
    f1, f2, e1, e2, *truth = (_transforms(x) for x in stacks)
    if truth:
        signal, noise = _cov(truth[0], truth[0]), _mean(f1 - truth[0], f2 - truth[0])
        cross = (_cov(e1, truth[0]) + _cov(e2, truth[0])) / 2
    else:
        signal = _cov(f1, f2)
        noise = _mean(f1, f2) - signal
        cross = (_cov(e1, f2) + _cov(e2, f1)) / 2
    planes = (signal, noise, _mean(e1, e2), _cov(e1, e2), cross)
    shape = (int(y1.shape[1]), int(y1.shape[2]))
    weight = ring_index(shape)[1].view(signal.shape)
    count = ring_sums(torch.ones_like(signal), shape)
    total = Powers(*((plane * weight).sum() / weight.sum() for plane in planes))
    return total, Powers(*(ring_sums(plane, shape) / count for plane in planes))


def best_filter(rings: Powers, shape: tuple[int, ...]) -> float:
    """SNBR' in total of the best filter that only weighs rings, S / (S + N) in each (Wiener), without any bias.

    From the powers per ring of images of ``shape`` (h, w); frequencies beyond the last ring are taken for empty.
    """
    count = ring_sums(torch.ones(shape[0], shape[1] // 2 + 1), shape)
    signal = rings.signal.clamp(min=0)
    kept = count * _ratio(signal.square(), signal + rings.noise)
    lost = count * _ratio(signal * rings.noise, signal + rings.noise)
    return float(kept.sum() / lost.sum())


def _transforms(stack: Tensor) -> Tensor:
    """What is left of each image without the stack's mean image; a coefficient of white noise has its variance."""
    stack = stack.cpu().double()
    return torch.fft.rfft2(stack - stack.mean(0), norm="ortho")


def _cov(x: Tensor, y: Tensor) -> Tensor:
    """Sample covariance of each coefficient over the stack, real part; (h, w // 2 + 1)."""
    return (x * y.conj()).real.sum(0) / (len(x) - 1)


def _mean(x: Tensor, y: Tensor) -> Tensor:
    """Mean of the two variances."""
    return (_cov(x, x) + _cov(y, y)) / 2


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b; 0 where a is nothing beside b, or both are nothing."""
    return torch.where(a.abs() > 1e-12 * b.abs(), a / b, 0.0)
