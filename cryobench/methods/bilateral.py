"""Bilateral filter (Tomasi & Manduchi, ICCV 1998): an average over pixels that are near in place and in value."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cryobench.methods.base import Denoiser
from cryobench.methods.linear import reflect


@dataclass(frozen=True)
class Config:
    """width: standard deviation of the window in pixels (the window is cut at 2 of them);
    value_width: that of the difference in value, in units of the noise sigma.
    ``None``: the least Stein risk for each stack.
    """

    width: float | None = None
    value_width: float | None = None


WIDTHS = (0.7, 1.0, 1.5, 2.0, 3.0, 4.0)  # pixels
VALUE_WIDTHS = (1.5, 3.0, 10.0)  # units of sigma
SURE_PIXELS = 2**14  # as many pixels are enough to choose by


class Method(Denoiser):
    """Gaussian weights in place and in value, reflected borders."""

    name = "bilateral"
    paper = "tomasi1998bilateral"
    supervision = "sigma"
    Config = Config

    def denoise(self, images: Tensor, sigma: float | None = None) -> Tensor:
        """Filter images (n, h, w); sigma in their units, 0 returns them unchanged."""
        if not sigma:
            return images
        width, value_width = self._choose(images, sigma)
        return bilateral(images, width, value_width * sigma)[0]

    def _choose(self, images: Tensor, sigma: float) -> tuple[float, float]:
        """The fixed widths, or those of the grid with the least Stein risk over part of the stack."""
        config = self.config
        widths = WIDTHS if config.width is None else (config.width,)
        values = VALUE_WIDTHS if config.value_width is None else (config.value_width,)
        options = [(width, value) for width in widths for value in values]
        if len(options) == 1:
            return options[0]
        h, w = images.shape[1:]
        step = math.ceil(len(images) * h * w / SURE_PIXELS)
        some = images[:: min(step, len(images))]
        if h * w > SURE_PIXELS:  # a micrograph: the middle of it
            some = some[:1, h // 2 - min(h // 2, 64) : h // 2 + 64, w // 2 - min(w // 2, 64) : w // 2 + 64]

        def risk(option: tuple[float, float]) -> float:
            filtered, slope = bilateral(some, option[0], option[1] * sigma)
            return float((filtered - some).square().mean() + 2 * sigma**2 * slope.mean())

        return min(options, key=risk)


def bilateral(images: Tensor, width: float, value_width: float) -> tuple[Tensor, Tensor]:
    """Filtered images (n, h, w) and d(filtered pixel) / d(same noisy pixel), (n, h, w).

    The slope is what Stein's risk needs in place of the trace of a linear filter. With weights w_j about a
    pixel i, normalised by W, it is w_i / W + (variance of the y_j under the weights) / value_width^2.
    """
    reach = max(1, math.ceil(2 * width))
    out, slope = torch.empty_like(images), torch.empty_like(images)
    chunk = max(1, 2**15 // images[0].numel())
    for start in range(0, len(images), chunk):
        part = images[start : start + chunk]
        h, w = part.shape[1:]
        wide = reflect(part, reach)
        total, first, second = torch.zeros_like(part), torch.zeros_like(part), torch.zeros_like(part)
        for dy in range(-reach, reach + 1):
            for dx in range(-reach, reach + 1):
                # differences from the centre keep the variance exact whatever the offset of the images
                step = wide[:, reach + dy : reach + dy + h, reach + dx : reach + dx + w] - part
                near = math.exp(-(dy * dy + dx * dx) / (2 * width**2))
                weight = near * torch.exp(step.square() / (-2 * value_width**2))
                total += weight
                weight *= step
                first += weight
                second += weight * step
        mean = first / total
        out[start : start + chunk] = part + mean
        slope[start : start + chunk] = 1 / total + (second / total - mean**2) / value_width**2
    return out, slope
