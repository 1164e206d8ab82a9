"""The Fourier-Bessel basis: images as sums of functions that a rotation only mixes in pairs.

In Fourier space, on the disc of radius c (the band limit, cycles per pixel),

    f_kq(xi, theta) = N_kq J_k(R_kq xi / c) cos(k theta), and the same with sin(k theta),

with the q-th zero R_kq of the Bessel function J_k, and N_kq such that they are orthonormal. The functions with
R_kq <= 2 pi c R are those concentrated within the radius R of the image. Their inverse Fourier transforms,
real after a factor of i^k, are

    g_kq(r, phi) = 2 pi N_kq c^2 R_kq J_{k+1}(R_kq) J_k(2 pi c r) / (R_kq^2 - (2 pi c r)^2) cos(k phi).

(Zhao and Singer, J. Opt. Soc. Am. A 30:871, 2013, equations 4 to 9; Zhao, Shkolnisky and Singer, IEEE Trans. Comput.
Imaging 2:1, 2016.) A radial filter mixes q but neither k nor cos with sin.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from cryobench.errors import CryobenchError
from cryobench.imaging.bessel import BesselTable, bessel

#: bytes that the basis functions of one size may take
LARGEST_BASIS = 4e9


class SteerableBasis:
    """Fourier-Bessel functions of images of size x size pixels, centre at pixel size // 2.

    ``frequencies`` (K,): the angular frequencies k; ``counts`` (K,): number of radial functions of each; Q is the
    largest. Coefficients are (n, K, 2, Q), cos then sin, with zeros beyond the counts and for the sine of k = 0.

    A dense matrix product per image, yet a small one: functions and pixel grid share the symmetries of the square,
    so an image is first folded eight times; what is even in x, odd in y and symmetric under x <-> y, say, meets
    only the functions that are so too. That takes 3/16 of the products and 1/8 of the memory of the full matrix.
    """

    def __init__(
        self,
        size: int,
        band_limit: float = 0.5,
        frequencies: tuple[int, ...] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """band_limit in cycles per pixel, at most 0.5; frequencies: rising, leave out all other k.

        Raises CryobenchError for a size or band limit that gives no functions, or more than fit into memory.
        """
        if size < 4 or not 0 < band_limit <= 0.5 or band_limit * size < 1:
            raise CryobenchError(f"no Fourier-Bessel functions for {size} px and a band limit of {band_limit}")
        if 4 * size**2 / 8 * (math.pi * band_limit * size) ** 2 / 4 > LARGEST_BASIS:
            raise CryobenchError(
                f"the basis of {size} px and band limit {band_limit} does not fit into {LARGEST_BASIS / 1e9:.0f} GB: "
                "cut out smaller boxes, bin the images or lower the band limit"
            )
        self.size, self.band_limit, self.device = size, band_limit, torch.device(device)
        limit = math.pi * band_limit * size  # 2 pi c R with R = size / 2
        self._table = BesselTable(math.ceil(limit) + 2, limit)
        k, zeros = self._table.zeros(limit)
        every = tuple(range(int(k.max()) + 1))
        self.frequencies = torch.tensor(every if frequencies is None else frequencies)
        kept = torch.isin(k, self.frequencies)
        #: of each radial function (m,): angular frequency k, zero R_kq, index of k among the frequencies, number q
        self.k, self.zeros = k[kept], zeros[kept]
        self.block = torch.searchsorted(self.frequencies, self.k)
        self.counts = torch.bincount(self.block)
        self.q = torch.cat([torch.arange(count) for count in self.counts.tolist()])
        self.shape = (len(self.counts), 2, int(self.counts.max()))
        self._ends = self._table(self.k + 1, self.zeros)
        self._side = size // 2 + 1
        triangle = torch.tril_indices(self._side, self._side)
        self._lower = (triangle[0] * self._side + triangle[1]).to(self.device)
        self._upper = (triangle[1] * self._side + triangle[0]).to(self.device)
        self._parts = self._matrices()
        # sin(k t) = (-1)^((k-1)/2) cos(k (pi/2 - t)) for odd k: the same functions with x and y exchanged
        odd = self.k[self.k % 2 == 1]
        self._odd_sign = (2 - odd % 4).float().to(self.device)

    def _matrices(self) -> list[tuple[Tensor, Tensor]]:
        """Of each symmetry: functions (m, pixels) on the pixels that are left, and their places in K * 2 * Q.

        In order: cos of k = 0, 4, 8 ... (even in x and y, symmetric under x <-> y), cos of k = 2, 6 ...
        (antisymmetric), sin of k = 2, 6 ... (odd in x and y, symmetric), sin of k = 4, 8 ... (antisymmetric),
        cos of odd k (odd in x, even in y), whose pixels are a quadrant, of the others half a quadrant.
        """
        y, x = torch.meshgrid(torch.arange(self._side), torch.arange(self._side), indexing="ij")
        squares, radius = (y**2 + x**2).flatten().unique(return_inverse=True)
        angle = torch.atan2(y.double(), x.double()).flatten()
        at = 2 * math.pi * self.band_limit * squares.double().sqrt()
        values = bessel(int(self.k.max()) + 1, at)
        lower = self._lower.cpu()
        parts = []
        for sine, rest, step in ((0, 0, 4), (0, 2, 4), (1, 2, 4), (1, 0, 4), (0, 1, 2)):
            chosen = ((self.k % step == rest) & (self.k >= sine)).nonzero()[:, 0]
            pixels = lower if step == 4 else torch.arange(self._side**2)
            turns = self.frequencies[:, None] * angle[pixels]
            wave = (turns.sin() if sine else turns.cos()).float()
            block = self.block[chosen]
            matrix = self._radial(chosen, values[self.k[chosen]], at).float()[:, radius[pixels]].mul_(wave[block])
            place = (block * 2 + sine) * self.shape[2] + self.q[chosen]
            parts.append((matrix.to(self.device), place.to(self.device)))
        return parts

    def _radial(self, chosen: Tensor, values: Tensor, at: Tensor) -> Tensor:
        """Radial part of the chosen g_kq where 2 pi c r = at (u,) and J_k(at) = values (m, u)."""
        zeros, end = self.zeros[chosen, None], self._ends[chosen, None]
        near = (zeros - at).abs() < 1e-5
        # J_k(at) / (R^2 - at^2) tends to J_{k+1}(R) / 2R where at = R = R_kq
        fraction = torch.where(near, end / (2 * zeros), values / torch.where(near, 1, zeros**2 - at**2))
        angular = torch.where(self.k[chosen] == 0, 2 * math.pi, math.pi).sqrt()[:, None]
        return math.sqrt(8) * math.pi * self.band_limit / angular * zeros * end.sign() * fraction

    def expand(self, images: Tensor) -> Tensor:
        """Inner products of images (n, size, size) with the functions: (n, K, 2, Q)."""
        out = images.new_zeros(len(images), math.prod(self.shape))
        edge = 1 - self.size % 2  # the grid of an even size becomes symmetric with a row and a column of zeros
        even_x, odd_x = _fold(F.pad(images, (0, edge, 0, edge)), -1)
        (even, sine), (cosine, odd) = _fold(even_x, -2), _fold(odd_x, -2)
        folded = []
        for quadrant in (even, odd):
            symmetric, antisymmetric = quadrant + quadrant.mT, quadrant - quadrant.mT
            symmetric.diagonal(dim1=1, dim2=2).div_(2)
            folded += [symmetric.flatten(1)[:, self._lower], antisymmetric.flatten(1)[:, self._lower]]
        for values, (matrix, place) in zip([*folded, cosine.flatten(1)], self._parts, strict=True):
            out[:, place] = values @ matrix.T
        matrix, place = self._parts[-1]
        out[:, place + self.shape[2]] = (sine.mT.flatten(1) @ matrix.T) * self._odd_sign
        return out.view(-1, *self.shape)

    def evaluate(self, coefficients: Tensor) -> Tensor:
        """Images (n, size, size) with the given coefficients (n, K, 2, Q): the transpose of :meth:`expand`."""
        flat = coefficients.flatten(1)
        values = [flat[:, place] @ matrix for matrix, place in self._parts]
        quadrants = []
        for symmetric, antisymmetric in (values[:2], values[2:4]):
            quadrant = flat.new_empty(len(flat), self._side**2)
            quadrant[:, self._upper] = symmetric - antisymmetric
            quadrant[:, self._lower] = symmetric + antisymmetric
            quadrants.append(quadrant.view(-1, self._side, self._side))
        matrix, place = self._parts[-1]
        cosine = values[4].view(-1, self._side, self._side)
        sine = ((flat[:, place + self.shape[2]] * self._odd_sign) @ matrix).view(-1, self._side, self._side).mT
        even_x, odd_x = _unfold(quadrants[0], sine, -2), _unfold(cosine, quadrants[1], -2)
        return _unfold(even_x, odd_x, -1)[:, : self.size, : self.size]

    @cached_property
    def nodes(self) -> Tensor:
        """Frequencies in cycles per pixel at which :meth:`radial_matrices` takes a filter, (nodes,), float64."""
        return self._quadrature[0]

    @cached_property
    def _quadrature(self) -> tuple[Tensor, Tensor]:
        """Gauss-Legendre nodes and weights on [0, c]."""
        from numpy.polynomial.legendre import leggauss

        nodes, weights = (torch.from_numpy(values) for values in leggauss(2 * self.size))
        return self.band_limit * (nodes + 1) / 2, self.band_limit * weights / 2

    @cached_property
    def _fourier(self) -> Tensor:
        """Radial parts of f_kq at the nodes times the root of the weights: (K, nodes, Q), float64."""
        nodes, weights = self._quadrature
        scale = math.sqrt(2) / self.band_limit * (weights * nodes).sqrt()
        values = self._table(self.k[:, None], self.zeros[:, None] * nodes / self.band_limit) * scale
        out = torch.zeros(self.shape[0], self.shape[2], len(nodes), dtype=torch.float64)
        out[self.block, self.q] = values / self._ends[:, None].abs()
        return out.mT.to(self.device)

    def radial_matrices(self, profile: Tensor) -> Tensor:
        """The radial filter with values ``profile`` (nodes,) at :attr:`nodes`, in the basis: (K, Q, Q), float64.

        Coefficients of filtered images are those of the images times this matrix.
        """
        return self._fourier.mT @ (profile.to(self._fourier)[:, None] * self._fourier)

    def radial_matrix(self, block: int, profiles: Tensor) -> Tensor:
        """Several filters (G, nodes) for one angular frequency, by its index: (G, count, count), float64."""
        waves = self._fourier[block, :, : self.counts[block]]
        return (waves.T * profiles.to(waves)[:, None]) @ waves


def _fold(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Sum and difference of x (2 h + 1 long) and its mirror image, from the centre on (h + 1); the centre once."""
    half = x.shape[axis] // 2
    right, left = x.narrow(axis, half, half + 1), x.narrow(axis, 0, half + 1).flip(axis)
    even = right + left
    even.select(axis, 0).div_(2)
    return even, right - left


def _unfold(even: Tensor, odd: Tensor, axis: int) -> Tensor:
    """The function whose even and odd parts, from the centre on, are given (h + 1): 2 h + 1 long."""
    left = (even - odd).narrow(axis, 1, even.shape[axis] - 1).flip(axis)
    return torch.cat([left, even + odd], axis)
