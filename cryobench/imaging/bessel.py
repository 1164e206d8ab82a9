"""Bessel functions of the first kind J_k of many orders at once, and their zeros.

J_k(x) is the k-th Fourier coefficient of exp(i x sin t), so that one FFT gives all orders to double precision.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

STEP = 1 / 32  # of the table; cubic interpolation between its entries is good to STEP^4 / 384, 2e-9


def bessel(orders: int, x: Tensor) -> Tensor:
    """J_k(x) for k = 0 ... orders - 1, float64, (orders, len(x)), on the CPU; x (m,) not negative."""
    # samples of t: what is aliased into J_k is J of an order far above x, nothing in double precision
    samples = 2 ** math.ceil(math.log2(orders + 1.1 * float(x.max()) + 64))
    t = torch.arange(samples, dtype=torch.float64) * (2 * math.pi / samples)
    parts = [torch.fft.fft(torch.exp(1j * part[:, None] * t.sin()))[:, :orders].real for part in x.double().split(2048)]
    return torch.cat(parts).T / samples


class BesselTable:
    """J_k for k < orders and 0 <= x <= limit, by interpolation in a table."""

    def __init__(self, orders: int, limit: float) -> None:
        x = torch.arange(math.ceil(limit / STEP) + 2) * STEP
        values = bessel(orders + 1, x)
        self.values = values[:-1]
        # J_k' = (J_{k-1} - J_{k+1}) / 2, with J_{-1} = -J_1
        self.slopes = (torch.cat([-values[1:2], values[:-2]]) - values[1:]) / 2

    def __call__(self, k: Tensor, x: Tensor) -> Tensor:
        """J_k(x), float64, for integer k and real x of one shape after broadcasting."""
        at = (x / STEP).long()
        t = x / STEP - at
        left, right = self.values[k, at], self.values[k, at + 1]
        rise, fall = self.slopes[k, at] * STEP, self.slopes[k, at + 1] * STEP
        bend = rise + fall - 2 * (right - left)
        return left + t * (rise + t * ((right - left) - rise - bend + t * bend))

    def zeros(self, limit: float) -> tuple[Tensor, Tensor]:
        """All zeros 0 < x <= limit, by order and then by size: orders (m,) and zeros (m,), float64."""
        sign = self.values[:, :-1] * self.values[:, 1:] <= 0
        # below x = k there is no zero, and the table holds rounding errors
        sign &= torch.arange(sign.shape[1]) * STEP > torch.arange(len(sign))[:, None]
        k, at = sign.nonzero(as_tuple=True)
        x = at * STEP + STEP * self.values[k, at] / (self.values[k, at] - self.values[k, at + 1])
        for _ in range(2):  # Newton
            x = x - self(k, x) / self.slopes[k, (x / STEP).round().long()]
        found = x <= limit
        return k[found], x[found]
