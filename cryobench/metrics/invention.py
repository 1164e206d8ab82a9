"""What a denoiser makes of pure noise, and whose picture it is.

Three questions about images without a particle. How much comes out (energy), and how much of that is more than one
fixed image (passed)? Does what comes out look like the structure (correlation with the nearest of its projections)?
Does it add up to the structure when it is aligned to it ("Einstein from noise": Shatsky et al. 2009, J. Struct. Biol.
166:67; Henderson 2013, PNAS 110:18037)?

The best of many correlations is large for every image, larger for smooth ones, which have few degrees of freedom. It
says something only beside its null distribution: *scrambled* images, with the same power spectrum and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cryobench.errors import CryobenchError
from cryobench.imaging.dct import dct2, idct2

#: scrambled images per output
DRAWS = 8
#: projections compared, or transforms correlated, at once
_CHUNK = 128


@dataclass(frozen=True)
class PureNoise:
    """Images (n, h, w) of noise alone, what came out of them, and the projection nearest to each output.

    correlation (n,) of each output with that projection; null (DRAWS, n): the same of that output scrambled.
    einstein: correlation with a reference of the average of all outputs, each aligned to it; einstein_null,
    einstein_raw: the same for the outputs scrambled, and for the noise itself.
    """

    noise: Tensor
    output: Tensor
    nearest: Tensor
    correlation: Tensor
    null: Tensor
    einstein: float
    einstein_null: float
    einstein_raw: float

    @property
    def energy(self) -> float:
        """Variance of the output per variance of the noise, over all pixels of the stack; a fixed image counts too."""
        return float(self.output.double().var() / self.noise.double().var())

    @property
    def passed(self) -> float:
        """The part of the energy that depends on the input: variance of the outputs about their own mean image, with
        n / (n - 1), per that of the noise. 0 for a fixed image, 1 for the noise itself; NaN for a single image."""
        if len(self.noise) < 2:
            return math.nan
        return float(self.output.double().var(0).mean() / self.noise.double().var(0).mean())

    @property
    def z(self) -> float:
        """Mean excess of the correlations over their own nulls, in its standard errors; 0 without any spread."""
        return excess(self.correlation, self.null)


def pure_noise(denoise: Callable[[Tensor], Tensor], noise: Tensor, projections: Tensor, seed: int = 0) -> PureNoise:
    """Denoise images of noise (n, h, w) and compare them with projections (m, h, w) of the structure in question.

    The first projection is the reference of the averaging experiment.
    """
    output = denoise(noise)
    correlation, index, null = against_null(output, projections, seed)
    scrambled = scramble(output, torch.Generator().manual_seed(seed))
    averages = [einstein(x, projections[0])[-1] for x in (output, scrambled, noise)]
    return PureNoise(noise, output, projections[index.to(projections.device)].cpu(), correlation, null, *averages)


def against_null(images: Tensor, projections: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Correlation (n,) of images with their nearest projections, the projections' index (n,), null (DRAWS, n)."""
    generator = torch.Generator().manual_seed(seed)
    correlation, index = nearest(images, projections)
    null = [nearest(scramble(images, generator), projections)[0] for _ in range(DRAWS)]
    return correlation, index, torch.stack(null)


def nearest(images: Tensor, projections: Tensor) -> tuple[Tensor, Tensor]:
    """Highest normalised cross-correlation of each image (n, h, w) with projections (m, h, w), and which it is.

    At the positions they have: no shifts are searched. A constant image correlates with nothing: 0.
    """
    if images.shape[1:] != projections.shape[1:] or not len(projections):
        raise CryobenchError(f"images {tuple(images.shape)} cannot be compared with {tuple(projections.shape)}")
    x = _normalised(images).flatten(1).to(projections.device)
    parts = [x @ _normalised(p).flatten(1).T for p in projections.split(_CHUNK)]
    best = torch.cat(parts, dim=1).max(dim=1)
    return best.values.cpu(), best.indices.cpu()


def scramble(images: Tensor, generator: torch.Generator) -> Tensor:
    """The given images (n, h, w) with random signs in their cosine transforms; each keeps its mean and its spectrum.

    For noise, and for noise behind a filter that reflects at the borders, this is another draw of the same. Random
    Fourier phases would not be: Fourier waves join opposite borders, which an image does not, and smooth images come
    out too much like a blob in the middle (z of filtered noise about -1.7 instead of 0).
    """
    coefficients = dct2(images.cpu().float())
    signs = torch.randint(2, images.shape, generator=generator) * 2.0 - 1
    signs[:, 0, 0] = 1
    return idct2(coefficients * signs)


def excess(correlation: Tensor, null: Tensor) -> float:
    """Mean of correlation (n,) - mean of its nulls (k, n), in standard errors of that mean; paired, image by image.

    0 without any spread, as for a single image.
    """
    difference = (correlation - null.mean(0)).double()
    if len(difference) < 2:
        return 0.0
    error = float(difference.std()) / math.sqrt(len(difference))
    return float(difference.mean()) / error if error > 0 else 0.0


def einstein(images: Tensor, reference: Tensor, angles: int = 24) -> list[float]:
    """Correlation with the reference (h, w) of the average of the first 1, 2, 4, ... and of all n images (n, h, w).

    Each image is aligned to the reference before: turned by the best of ``angles`` equal steps and shifted
    (cyclically, by whole pixels) by the best of all shifts, found by FFT. Images that hold nothing of the reference
    still average to it; :func:`einstein_expected` says how fast.
    """
    aligned = align(images, reference, angles)
    counts = einstein_counts(len(images))
    sums = aligned.double().cumsum(0)
    average = torch.stack([sums[n - 1] for n in counts])
    return (_normalised(average) * _normalised(reference[None].cpu().double())).sum((1, 2)).tolist()


def einstein_counts(n: int) -> list[int]:
    """Numbers of images at which :func:`einstein` states the correlation: powers of 2, and n."""
    return [2**k for k in range(n.bit_length()) if 2**k < n] + [n]


def einstein_expected(counts: list[int], pixels: int, hypotheses: int) -> list[float]:
    """What pure white noise gives against a reference that looks like none of its own shifted or turned copies.

    The best of M independent correlations has the mean e(M) of the maximum of M normal numbers, so the average keeps
    e(M) of the reference, while of the noise in all other directions 1 / sqrt(n) is left:
    ``e / sqrt(e^2 + (pixels - 1) / n)``. Neighbouring hypotheses are alike, and so M counts for less than it is: an
    upper bound in practice.
    """
    x = torch.linspace(-2, 10, 20001, dtype=torch.float64)
    below = torch.special.log_ndtr(x).mul(hypotheses).exp()
    best = float(x[0]) + float(torch.trapezoid(1 - below, x))
    return [best / math.sqrt(best**2 + (pixels - 1) / n) for n in counts]


def align(images: Tensor, reference: Tensor, angles: int) -> Tensor:
    """Each image (n, h, w), less its mean, turned and cyclically shifted to fit the reference (h, w); on the CPU."""
    shape = reference.shape
    turns = torch.arange(angles) * (2 * math.pi / angles)
    reference = (reference - reference.mean()).to(torch.float32)
    turned = torch.fft.rfft2(torch.cat([rotate(reference[None], float(t)) for t in turns]))
    found = []
    images = images - images.mean(dim=(1, 2), keepdim=True)
    for part in images.to(reference.device, torch.float32).split(max(1, _CHUNK // angles)):
        transforms = torch.fft.rfft2(part)[:, None] * turned.conj()
        best = torch.fft.irfft2(transforms, s=shape).flatten(1).argmax(1)
        turn, place = best // (shape[0] * shape[1]), best % (shape[0] * shape[1])
        for image, k, p in zip(part, turn.tolist(), place.tolist(), strict=True):
            centred = torch.roll(image, (-(p // shape[1]), -(p % shape[1])), dims=(0, 1))
            found.append(rotate(centred[None], -float(turns[k])))
    return torch.cat(found).cpu()


def rotate(images: Tensor, angle: float) -> Tensor:
    """Images (n, h, w) turned about pixel (h // 2, w // 2) by an angle in radians from x towards y; bicubic, 0 outside.

    An angle of 0 changes nothing.
    """
    if angle == 0:
        return images
    h, w = images.shape[-2:]
    y = torch.arange(h, dtype=images.dtype, device=images.device)[:, None] - h // 2
    x = torch.arange(w, dtype=images.dtype, device=images.device)[None, :] - w // 2
    cosine, sine = math.cos(angle), math.sin(angle)
    source_x, source_y = cosine * x + sine * y + w // 2, -sine * x + cosine * y + h // 2
    grid = torch.stack([(2 * source_x + 1) / w - 1, (2 * source_y + 1) / h - 1], dim=-1)
    grid = grid.expand(len(images), h, w, 2)
    return torch.nn.functional.grid_sample(images[:, None], grid, mode="bicubic", align_corners=False)[:, 0]


def _normalised(images: Tensor) -> Tensor:
    """Mean 0 and norm 1 over each image; constant images become 0."""
    centred = images - images.mean(dim=(1, 2), keepdim=True)
    norm = centred.square().sum(dim=(1, 2), keepdim=True).sqrt()
    flat = norm <= 1e-6 * images.square().sum(dim=(1, 2), keepdim=True).sqrt()
    return torch.where(flat, 0.0, centred / norm.where(~flat, 1.0))
