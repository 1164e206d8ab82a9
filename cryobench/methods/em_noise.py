"""How noisy each image is, and how bright: thickness of the ice and dose differ from place to place, and the images.

The noise of an image is measured in its four corners, outside the largest ellipse, where there is no particle. What the
corners of one image have in common and other images do not is a difference of levels; what they do not have in common
is the scatter of measuring variances from few pixels. The first over the sum is how far a measured level is believed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cryobench.methods.noise_level import corner_mask

#: factor around the stack's noise within which that of an image is looked for
WIDEST = 4.0
#: pixels a side, below which a corner holds next to nothing
SMALLEST = 12
#: variance of the median of four measurements, in that of one
MEDIAN = 0.3


def corner_levels(images: Tensor, sigma: float) -> Tensor:
    """Log variance (n, 4), relative to sigma^2, in each corner of images (n, h, w); 0 where corners are too small."""
    n, height, width = images.shape
    if min(height, width) < SMALLEST:
        return images.new_zeros(n, 4)
    mask, middle = corner_mask(height, width, images.device), (height // 2, width // 2)
    variances = []
    for rows in (slice(None, middle[0]), slice(middle[0], None)):
        for columns in (slice(None, middle[1]), slice(middle[1], None)):
            inside = images[:, rows, columns][:, mask[rows, columns]]
            variances.append(inside.double().var(1) / sigma**2)
    found = torch.stack(variances, 1)
    # a corner of next to no variance has been filled up, at the edge of a micrograph or by a mask, and says nothing
    return found.where(found > WIDEST**-2, 1.0).clamp(max=WIDEST**2).log().to(images.dtype)


def learn_levels(images: Tensor, sigma: float) -> dict[str, float]:
    """``reliability``: the part, 0 to 1, of the variance of the levels of a stack that is not scatter; ``level``: what
    makes the mean variance of its images sigma^2."""
    levels = corner_levels(images, sigma).double()
    moments = torch.cov(levels.T)
    alone = float(moments.trace()) / 4
    shared = max((float(moments.sum()) - 4 * alone) / 12, 0.0)
    reliability = shared / (shared + MEDIAN * max(alone - shared, 1e-12))
    believed = reliability * median_of_four(levels)
    return {"reliability": reliability, "level": float(believed.exp().mean().log())}


def noise_variances(images: Tensor, sigma: float, reliability: float, level: float) -> Tensor:
    """Variance (n, 1) of the noise of each image, over sigma^2, with what :func:`learn_levels` says of the stack."""
    return (reliability * median_of_four(corner_levels(images, sigma)) - level).exp()[:, None]


def background_variance(images: Tensor, sigma: float) -> float:
    """Variance of the background of images (n, h, w), from image to image, over sigma^2: that of their corners' means,
    beyond what noise makes of them. 0 where it is not clear."""
    n, height, width = images.shape
    mask = corner_mask(height, width, images.device)
    if min(height, width) < SMALLEST or n < 2:
        return 0.0
    corners = images[:, mask].double()
    by_noise = float(corners.var(1).mean()) / corners.shape[1]
    excess = float(corners.mean(1).var()) - by_noise * (1 + 3 * (2 / n) ** 0.5)
    return max(excess, 0.0) / sigma**2


def median_of_four(levels: Tensor) -> Tensor:
    """A neighbour that reaches into one corner does not count."""
    return levels.sort(1).values[:, 1:3].mean(1)
