"""BM3D: blocks that look alike are stacked, and the stack is shrunk in a transform where the image is sparse.

K. Dabov, A. Foi, V. Katkovnik, K. Egiazarian, IEEE Trans. Image Process. 16:2080 (2007), from its parameters
for heavy noise (sigma > 40 of 255). What differs is better or faster on particle images at SNR 0.05 to 1:

* Reference blocks *and* candidates lie on one grid of ``step`` pixels. Neighbours one pixel apart share
  nearly all their noise, which makes them look alike whatever the image; a coarse grid has few such pairs.
* Blocks of a group that overlap share noise: the variance of the coarse coefficients of a group follows from
  the overlaps (Makinen, Azzari, Foi, IEEE Trans. Image Process. 29:8339, 2020) instead of being sigma^2.
* Every group is full (no limit on the distance), and distances of step 1 are plain (no ``lambda_2D``).
* Step 2 runs twice, the second time with its own result as pilot: 0.2 dB for half as much time again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cryobench.errors import CryobenchError
from cryobench.imaging.dct import dct_matrix
from cryobench.methods.base import Denoiser
from cryobench.methods.noise_level import corner_mask


@dataclass(frozen=True)
class Config:
    """Symbols of the paper in brackets; lengths in pixels, levels in units of sigma.

    block_basic, block_wiener: sides of the square blocks of steps 1 and 2 (N1; the paper has 12 and 11).
    group_basic, group_wiener: blocks in a group, powers of two (N2; the paper has 16 and 32).
    step: spacing of blocks (N_step; the paper has 4 and 6, with candidates at every pixel).
    window: side of the search window (N_S; the paper has 39). wiener_passes: runs of step 2 (the paper has 1).
    threshold: a smaller coefficient of step 1 is taken for noise (lambda_3D; the paper has 2.8).
    wiener_noise: noise variance assumed in step 2, in units of the true one (the paper has 1).
    kaiser: shape of the window under which blocks are put back (beta; the paper has 2).
    """

    block_basic: int = 12
    block_wiener: int = 10
    group_basic: int = 16
    group_wiener: int = 16
    step: int = 4
    window: int = 63
    threshold: float = 2.7
    wiener_noise: float = 0.6
    kaiser: float = 3.0
    wiener_passes: int = 2


#: Haar coefficients of a group, from the coarsest, whose noise is computed from the overlaps
COARSE = 4


def haar_matrix(n: int) -> Tensor:
    """Orthonormal Haar transform, shape (n, n), n a power of two; coarse rows first."""
    rows = torch.ones(1, 1)
    while len(rows) < n:
        average = torch.kron(rows, torch.tensor([[1.0, 1.0]]))
        detail = torch.kron(torch.eye(len(rows)), torch.tensor([[1.0, -1.0]]))
        rows = torch.cat([average, detail]) / math.sqrt(2)
    return rows


def grid_positions(length: int, block: int, step: int) -> Tensor:
    """First pixels of the blocks along an axis: from edge to edge, at most ``step`` apart, evenly spread."""
    last = length - block
    return torch.linspace(0, last, math.ceil(last / step) + 1).round().long()


def block_matrix(length: int, positions: Tensor, basis: Tensor) -> Tensor:
    """Matrix (len(positions) * k, length) that takes a line of pixels to ``basis`` (k, block) of each block."""
    pixels = positions[:, None] + torch.arange(basis.shape[1], device=positions.device)
    return (basis.to(pixels.device) @ torch.eye(length, device=pixels.device)[pixels]).reshape(-1, length)


def block_spectra(images: Tensor, rows: Tensor, columns: Tensor, block: int) -> Tensor:
    """2D DCT of the blocks that begin at (rows, columns): (n, h, w) -> (n, rows, columns, block^2)."""
    dct = dct_matrix(block)
    n, h, w = images.shape
    spectra = block_matrix(h, rows, dct) @ images @ block_matrix(w, columns, dct).T
    spectra = spectra.view(n, len(rows), block, len(columns), block).transpose(2, 3)
    return spectra.reshape(n, len(rows), len(columns), block * block)


def search_start(count: int, reach: int) -> tuple[Tensor, int]:
    """First grid point of every grid point's search window, and its width; at edges it is moved inwards."""
    width = min(2 * reach + 1, count)
    return (torch.arange(count) - reach).clamp(0, count - width), width


def match_blocks(spectra: Tensor, rows: range, columns: range, group: int, reach: int) -> Tensor:
    """The blocks nearest to each reference block in squared distance, the block itself first.

    spectra: (n, grid rows, grid columns, k), any orthonormal coefficients of the blocks.
    rows, columns: grid points of the reference blocks. reach: how many grid points the search goes each way.
    Returns indices into the flat grid, shape (n, len(rows) * len(columns), group), nearest first.
    """
    n, grid_h, grid_w, _ = spectra.shape
    energy = spectra.square().sum(-1)
    (top, height), (start, width) = search_start(grid_h, reach), search_start(grid_w, reach)
    here = torch.arange(len(columns), device=spectra.device)
    left = start.to(spectra.device)[columns.start + here]
    found = []
    for y in rows:
        band = slice(y0 := int(top[y]), y0 + height)
        # |a - b|^2 without |a|^2, which is the same for all candidates b of a
        distance = torch.baddbmm(
            energy[:, band].reshape(n, 1, -1),
            spectra[:, y, columns.start : columns.stop],
            spectra[:, band].flatten(1, 2).transpose(1, 2),
            alpha=-2,
        ).view(n, len(columns), height, grid_w)
        distance = distance.unfold(3, width, 1)[:, here, :, left].flatten(2)  # (columns, n, height * width)
        distance[here, :, (y - y0) * width + columns.start + here - left] = -torch.inf
        nearest = distance.topk(group, largest=False).indices
        found.append((nearest // width + y0) * grid_w + nearest % width + left[:, None, None])
    return torch.stack(found).flatten(0, 1).transpose(0, 1)


def coarse_variance(points: Tensor, grid_w: int, block: int, gaps: list[int], haar: Tensor) -> Tensor:
    """Noise variance of the coarsest Haar coefficients of groups whose blocks overlap, for white noise of variance 1.

    points: (group, m) flat grid indices. gaps: pixels between grid points along y and x.
    Returns (coarse, m, block^2): sum over pairs of blocks of their Haar weights times the autocorrelation
    of the DCT function at their displacement; 1 where no two blocks overlap.
    """
    dct = dct_matrix(block).to(points.device)
    coarse = haar[:COARSE]
    i, j = torch.triu_indices(len(haar), len(haar), offset=1, device=points.device)
    y, x = points.int() // grid_w, points.int() % grid_w
    dy, dx = (y[i] - y[j]).abs(), (x[i] - x[j]).abs()  # (pairs, m)
    weights = 2 * coarse[:, i] * coarse[:, j]
    last_y, last_x = ((block - 1) // gap for gap in gaps)
    displacement = torch.where((dy <= last_y) & (dx <= last_x), dy * (last_x + 1) + dx, 0).to(torch.uint8)
    variance = torch.ones(len(coarse), points.shape[1], block * block, device=points.device)
    for k in range(1, (last_y + 1) * (last_x + 1)):
        shift_y, shift_x = k // (last_x + 1) * gaps[0], k % (last_x + 1) * gaps[1]
        along_y = (dct[:, shift_y:] * dct[:, : block - shift_y]).sum(1)
        along_x = (dct[:, shift_x:] * dct[:, : block - shift_x]).sum(1)
        pairs = weights @ (displacement == k).float()  # (coarse, m)
        variance += pairs[..., None] * (along_y[:, None] * along_x).flatten()
    return variance.clamp_(min=0.02)


def _shrink(group: Tensor, pilot: Tensor | None, variance: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Shrink Haar spectra (group, m, k) of groups; returns them and the weight of each group (m,).

    Hard threshold without a pilot, empirical Wiener filter with the pilot's spectra.
    """
    coarse = len(variance)
    if pilot is None:
        gain = (group.abs() > config.threshold).float()
        gain[:coarse] = (group[:coarse].square() > config.threshold**2 * variance).float()
    else:
        gain = pilot.square_()
        gain[:coarse] /= variance
        gain /= gain + config.wiener_noise
    left = torch.linalg.vector_norm(gain[:coarse] * variance.sqrt(), dim=(0, 2)).square()
    left += torch.linalg.vector_norm(gain[coarse:], dim=(0, 2)).square()
    return group.mul_(gain), 1 / left.clamp(min=0.1)


def _filter_tile(
    images: Tensor, pilot: Tensor | None, grid: list[Tensor], refs: list[range], sizes: list[int], config: Config
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the shrunk blocks of a tile, and the sum of the weights, both (n, h, w).

    grid: first pixels of the blocks along y and x; refs: which of them are references;
    sizes: side of a block, blocks in a group, reach of the search in grid points.
    """
    n, h, w = images.shape
    rows, columns = grid
    block, group, reach = sizes
    gaps = [round(float(p[-1] - p[0]) / (len(p) - 1)) if len(p) > 1 else block for p in grid]
    spectra = block_spectra(images, rows, columns, block)
    pilot_spectra = None if pilot is None else block_spectra(pilot, rows, columns, block)
    points = match_blocks(spectra if pilot_spectra is None else pilot_spectra, refs[0], refs[1], group, reach)
    m = n * points.shape[1]
    first = torch.arange(n, device=images.device)[:, None, None] * (len(rows) * len(columns))
    flat = (points + first).reshape(m, group).T.flatten()  # the group is the slowest index
    haar = haar_matrix(group).to(images.device)
    variance = coarse_variance(points.reshape(m, group).T, len(columns), block, gaps, haar)

    def stack(values: Tensor) -> Tensor:
        return (haar @ values.view(-1, block * block)[flat].view(group, -1)).view(group, m, -1)

    gains_from = None if pilot_spectra is None else stack(pilot_spectra)
    shrunk, weight = _shrink(stack(spectra), gains_from, variance, config)
    shrunk = haar.T @ shrunk.mul_(weight[:, None]).view(group, -1)
    total = torch.zeros_like(spectra).view(-1, block**2).index_add_(0, flat, shrunk.view(-1, block**2))
    weights = torch.zeros(len(total), device=images.device).index_add_(0, flat, weight.repeat(group))

    # blocks go back through the same matrices, transposed, under the Kaiser window
    kaiser = torch.kaiser_window(block, periodic=False, beta=config.kaiser)[None]
    dct = dct_matrix(block) * kaiser
    total = total.view(n, len(rows), len(columns), block, block).transpose(2, 3).reshape(n, len(rows) * block, -1)
    summed = block_matrix(h, rows, dct).T @ total @ block_matrix(w, columns, dct)
    return summed, block_matrix(h, rows, kaiser).T @ weights.view(n, len(rows), -1) @ block_matrix(w, columns, kaiser)


def _grid(images: Tensor, block: int, group: int, config: Config) -> tuple[Tensor, Tensor, list[int]]:
    """First pixels of the blocks along y and x; block, group and reach of the search, smaller in small images."""
    block = min(block, *images.shape[1:])
    rows, columns = (grid_positions(size, block, config.step).to(images.device) for size in images.shape[1:])
    reach = max(1, round(config.window / 2 / config.step))
    candidates = search_start(len(rows), reach)[1] * search_start(len(columns), reach)[1]
    return rows, columns, [block, min(group, 2 ** int(math.log2(candidates))), reach]


def _tiles(grid: Tensor, reach: int, most: int = 32) -> Iterator[tuple[Tensor, range]]:
    """Grid points in reach of ``most`` references at a time, and which of them are those references."""
    start, width = search_start(len(grid), reach)
    for first in range(0, len(grid), most):
        last = min(first + most, len(grid))
        low = int(start[first])
        yield grid[low : int(start[last - 1]) + width], range(first - low, last - low)


def _estimate(images: Tensor, pilot: Tensor | None, config: Config) -> Tensor:
    """One step of BM3D on images (n, h, w) of noise level 1, by tiles of images and of reference blocks."""
    basic, wiener = (config.block_basic, config.group_basic), (config.block_wiener, config.group_wiener)
    side, most = basic if pilot is None else wiener
    rows, columns, (block, group, reach) = _grid(images, side, most, config)
    tiles = list(itertools.product(_tiles(rows, reach), _tiles(columns, reach)))
    # groups of about 16 MB stay in a CPU's cache; a GPU wants much more at once
    values = max(len(y) * len(x) for (_, y), (_, x) in tiles) * group * block**2
    at_once = max(1, 2 ** (27 if images.is_cuda else 22) // values)

    summed, weights = torch.zeros_like(images), torch.zeros_like(images)
    for i, ((y, ref_y), (x, ref_x)) in itertools.product(range(0, len(images), at_once), tiles):
        part = slice(i, i + at_once), slice(int(y[0]), int(y[-1]) + block), slice(int(x[0]), int(x[-1]) + block)
        piece = None if pilot is None else pilot[part]
        s, k = _filter_tile(images[part], piece, [y - y[0], x - x[0]], [ref_y, ref_x], [block, group, reach], config)
        summed[part] += s
        weights[part] += k
    return summed / weights


def _scaled(images: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """Images with background 0 and noise level 1, and the background that was taken off, (n, 1, 1)."""
    corners = corner_mask(images.shape[1], images.shape[2], images.device)
    background = images[:, corners if corners.any() else ~corners].mean(1)[:, None, None]
    return (images - background) / sigma, background


def basic_estimate(images: Tensor, sigma: float, config: Config = Config()) -> Tensor:
    """Step 1 alone: groups matched in the noisy images (n, h, w), hard threshold. Same units and shape."""
    scaled, background = _scaled(images, sigma)
    return _estimate(scaled, None, config) * sigma + background


def similar_blocks(image: Tensor, row: int, column: int, config: Config = Config()) -> Tensor:
    """Group of step 1 around a pixel of an image (h, w): first (row, column) of its blocks, (group, 2), for figures."""
    rows, columns, (block, group, reach) = _grid(image[None], config.block_basic, config.group_basic, config)
    y, x = (int((p + block // 2 - at).abs().argmin()) for p, at in ((rows, row), (columns, column)))
    spectra = block_spectra(image[None], rows, columns, block)
    points = match_blocks(spectra, range(y, y + 1), range(x, x + 1), group, reach)[0, 0]
    return torch.stack([rows[points // len(columns)], columns[points % len(columns)]], -1)


def bm3d(images: Tensor, sigma: float, config: Config = Config()) -> Tensor:
    """Denoise float32 images (n, h, w) with white noise of standard deviation ``sigma`` in their units.

    The estimate of step 1 matches the blocks and gives the Wiener gains of step 2. Images scaled with sigma,
    or shifted by a constant, give a result scaled or shifted alike. sigma 0 gives the images back.
    Raises CryobenchError for a negative sigma.
    """
    if sigma < 0:
        raise CryobenchError(f"bm3d: sigma must not be negative: {sigma}")
    if sigma == 0:
        return images.clone()
    scaled, background = _scaled(images, sigma)
    estimate = _estimate(scaled, None, config)
    for _ in range(config.wiener_passes):
        estimate = _estimate(scaled, estimate, config)
    return estimate * sigma + background


class Method(Denoiser):
    """Block matching and 3D filtering, hard threshold then Wiener."""

    name = "bm3d"
    paper = "dabov2007bm3d"
    supervision = "sigma"
    Config = Config

    def denoise(self, images: Tensor, sigma: float | None = None) -> Tensor:
        """Denoise images (n, h, w); see :func:`bm3d`."""
        return bm3d(images, sigma or 0.0, self.config)
