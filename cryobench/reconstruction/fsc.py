"""Fourier shell correlation of two volumes, and the resolution it stands for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cryobench.errors import CryobenchError
from cryobench.imaging.rings import correlation, resolution, ring_frequencies, ring_sums


def fsc(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Fourier shell correlation of volumes (z, y, x), (min(shape) // 2 + 1,), shell 0 being the mean.

    Re sum A conj(B) / sqrt(sum |A|^2 sum |B|^2) per shell one Fourier voxel wide (Harauz & van Heel 1986), 0
    where a shell is empty. mask: same shape, multiplied onto both; a mask with sharp edges correlates them.
    Raises CryobenchError for unequal shapes and for values that are not finite.
    """
    shapes = [tuple(v.shape) for v in (a, b, mask) if v is not None]
    if a.ndim != 3 or len(set(shapes)) != 1:
        raise CryobenchError(f"volumes and mask must have one shape, not {' and '.join(map(str, shapes))}: resample")
    if not all(torch.isfinite(v).all() for v in (a, b, mask) if v is not None):
        raise CryobenchError("a volume or the mask holds NaN or infinite values")
    weight = torch.ones((), dtype=torch.float64) if mask is None else mask.double()
    fa, fb = torch.fft.rfftn(a.double() * weight), torch.fft.rfftn(b.double() * weight)
    parts = ((fa * fb.conj()).real, fa.abs().square(), fb.abs().square())
    return correlation(*(ring_sums(part, shapes[0]) for part in parts))


def fsc_report(a: Tensor, b: Tensor, pixel_size: float, mask: Tensor | None = None) -> dict[str, Any]:
    """The curve with its axis, and the resolutions, as plain data.

    ``frequency`` in 1/angstrom; ``fsc``; ``resolution``, in angstrom, at the first fall below ``0.143`` (for two
    independent halves) and ``0.5`` (against the truth): None where the curve starts below.
    Denoising both halves with one network makes errors that they share: then 0.143 promises too much.
    """
    curve = fsc(a, b, mask)
    shape = tuple(a.shape)
    return {
        "pixel_size": pixel_size,
        "frequency": [float(f) / pixel_size for f in ring_frequencies(shape)],
        "fsc": [float(v) for v in curve],
        "resolution": {text: resolution(curve, pixel_size, shape, float(text)) for text in ("0.143", "0.5")},
    }
