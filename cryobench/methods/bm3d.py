"""BM3D: blocks that look alike are stacked, and the stack is shrunk in a transform where the image is sparse.

K. Dabov, A. Foi, V. Katkovnik, K. Egiazarian, IEEE Trans. Image Process. 16:2080 (2007), with its parameters
for heavy noise (table I, sigma > 40). What differs, each time because it is better or much faster on
particle images at SNR 0.05 to 1:

* Reference blocks *and* candidates lie on one grid of ``step`` pixels. Neighbours one pixel apart share
  nearly all their noise, which makes them look alike whatever the image; a coarse grid hardly has such pairs.
* Blocks of a group that overlap share noise. The variance of each coefficient of a group follows from the
  overlaps (Makinen, Azzari, Foi, IEEE Trans. Image Process. 29:8339, 2020, section III) instead of sigma^2.
* Every group is full: no limit on the distance, hence nothing that depends on the grey scale.
* Distances in step 1 are plain: coefficients are not thresholded first (``lambda_2D``).

All blocks are transformed by two matrix products, and put back by two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cryobench.errors import CryobenchError
from cryobench.methods.base import Denoiser
from cryobench.methods.noise_level import corner_mask


@dataclass(frozen=True)
class Config:
    """Names of the paper in brackets; lengths in pixels, levels in units of sigma.

    block_basic, block_wiener: sides of the square blocks of steps 1 and 2 (N1; the paper has 12 and 11).
    group_basic, group_wiener: blocks in a group, powers of two (N2).
    step_basic, step_wiener: spacing of the blocks (N_step; the paper has 4 and 6, and candidates at every pixel).
    window: side of the search window (N_S).
    threshold: below it a coefficient of step 1 is noise (lambda_3D).
    wiener_noise: noise variance assumed in step 2, in units of the true one (the paper has 1).
    kaiser: shape of the window in which blocks are put back (beta).
    """

    block_basic: int = 12
    block_wiener: int = 10
    group_basic: int = 16
    group_wiener: int = 32
    step_basic: int = 4
    step_wiener: int = 4
    window: int = 39
    threshold: float = 2.8
    wiener_noise: float = 0.7
    kaiser: float = 2.0


#: Haar coefficients of a group, from the coarsest, whose noise is computed from the overlaps
COARSE = 4


def dct_matrix(n: int) -> Tensor:
    """Orthonormal DCT-II, shape (n, n): row k is the k-th cosine."""
    k = torch.arange(n, dtype=torch.float64)
    rows = torch.cos(math.pi / n * k[:, None] * (k + 0.5)) * math.sqrt(2 / n)
    rows[0] /= math.sqrt(2)
    return rows.float()


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
    k, block = basis.shape
    matrix = torch.zeros(len(positions), length, k, device=positions.device)
    pixels = positions[:, None] + torch.arange(block, device=positions.device)
    matrix[torch.arange(len(positions), device=positions.device)[:, None], pixels] = basis.T.to(positions.device)
    return matrix.transpose(1, 2).reshape(-1, length)


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
    """The blocks nearest to each reference block in squared distance, the block itself first (eq. 7).

    spectra: (n, grid rows, grid columns, k), any orthonormal coefficients of the blocks.
    rows, columns: grid points of the reference blocks. reach: how many grid points the search goes each way.
    Returns indices into the flat grid, shape (n, len(rows) * len(columns), group), nearest first.
    """
    n, grid_h, grid_w, _ = spectra.shape
    energy = spectra.square().sum(-1)
    top, height = search_start(grid_h, reach)
    start, width = search_start(grid_w, reach)
    here = torch.arange(len(columns), device=spectra.device)
    reference = torch.arange(columns.start, columns.stop, device=spectra.device)
    left = start.to(spectra.device)[reference]
    found = []
    for y in rows:
        y0 = int(top[y])
        band = slice(y0, y0 + height)
        # |a - b|^2 without |a|^2, which is the same for all candidates b of a
        distance = torch.baddbmm(
            energy[:, band].reshape(n, 1, -1),
            spectra[:, y, columns.start : columns.stop],
            spectra[:, band].flatten(1, 2).transpose(1, 2),
            alpha=-2,
        ).view(n, len(columns), height, grid_w)
        distance = distance.unfold(3, width, 1)[:, here, :, left].flatten(2)  # (columns, n, height * width)
        distance[here, :, (y - y0) * width + reference - left] = -torch.inf
        nearest = distance.topk(group, largest=False).indices
        found.append((nearest // width + y0) * grid_w + nearest % width + left[:, None, None])
    return torch.stack(found).flatten(0, 1).transpose(0, 1)


def coarse_variance(points: Tensor, grid_w: int, block: int, gaps: tuple[int, ...], haar: Tensor) -> Tensor:
    """Noise variance of the coarsest Haar coefficients of groups whose blocks overlap, for white noise of variance 1.

    points: (group, m) flat grid indices. gaps: pixels between grid points along y and x.
    Returns (coarse, m, block^2): sum over pairs of blocks of the Haar weights times the autocorrelation
    of the DCT function at their displacement; 1 where no two blocks overlap.
    """
    dct = dct_matrix(block).to(points.device)
    group, m = points.shape
    coarse = min(COARSE, group)
    y, x = points // grid_w, points % grid_w
    y, x = y - y.amin(0), x - x.amin(0)
    overlap_y, overlap_x = ((block - 1) // gap for gap in gaps)
    width = int(max(y.max(), x.max())) + 1 + max(overlap_y, overlap_x)
    # Haar weights drawn on a small map of the window: pairs at one displacement are a product with the shifted map
    weights = haar[:coarse, None].expand(coarse, m, group)
    drawn = torch.zeros(coarse, m, width * width, device=points.device)
    drawn.scatter_(2, (y * width + x).T.expand(coarse, m, group), weights)
    pairs, shared = [], []
    for dy in range(overlap_y + 1):
        for dx in range(-overlap_x, overlap_x + 1):
            shift = dy * width + dx
            if shift > 0:
                pairs.append(2 * (drawn[..., shift:] * drawn[..., :-shift]).sum(-1))
                along_y = (dct[:, dy * gaps[0] :] * dct[:, : block - dy * gaps[0]]).sum(1)
                along_x = (dct[:, abs(dx) * gaps[1] :] * dct[:, : block - abs(dx) * gaps[1]]).sum(1)
                shared.append((along_y[:, None] * along_x).flatten())
    if not pairs:
        return torch.ones(coarse, m, block * block, device=points.device)
    return (1 + torch.stack(pairs, -1) @ torch.stack(shared)).clamp(min=0.02)


def _sizes(h: int, w: int, grid_h: int, grid_w: int, wiener: bool, config: Config) -> tuple[int, int, int]:
    """Side of a block, blocks in a group, grid points searched each way: smaller where the image is small."""
    block, group, step = (
        (config.block_wiener, config.group_wiener, config.step_wiener)
        if wiener
        else (config.block_basic, config.group_basic, config.step_basic)
    )
    reach = max(1, round(config.window / 2 / step))
    candidates = search_start(grid_h, reach)[1] * search_start(grid_w, reach)[1]
    return min(block, h, w), min(group, 2 ** int(math.log2(candidates))), reach


def _shrink(group: Tensor, pilot: Tensor | None, variance: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Shrink Haar spectra (group, m, k) of groups; returns them and the weight of each group (m,).

    Hard threshold (eq. 8, 10) without a pilot, empirical Wiener filter (eq. 11 to 13) with the pilot's spectra.
    """
    coarse = len(variance)
    if pilot is None:
        gain = (group.abs() > config.threshold).float()
        gain[:coarse] = (group[:coarse].square() > config.threshold**2 * variance).float()
    else:
        power = pilot.square_()
        gain = power / (power + config.wiener_noise)
        gain[:coarse] = power[:coarse] / (power[:coarse] + config.wiener_noise * variance)
    kept = gain.square().sum((0, 2)) + (gain[:coarse].square() * (variance - 1)).sum((0, 2))
    return group.mul_(gain), 1 / kept.clamp(min=0.1)


def _filter_tile(
    images: Tensor, pilot: Tensor | None, grid: tuple[Tensor, Tensor], refs: tuple[range, range], config: Config
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the shrunk blocks of a tile (eq. 14), and the sum of the weights, both (n, h, w).

    grid: first pixels of the blocks along y and x. refs: which of them are references.
    """
    n, h, w = images.shape
    rows, columns = grid
    block, group, reach = _sizes(h, w, len(rows), len(columns), pilot is not None, config)
    gaps = tuple(round(float(p[-1] - p[0]) / (len(p) - 1)) if len(p) > 1 else block for p in grid)
    spectra = block_spectra(images, rows, columns, block)
    pilot_spectra = None if pilot is None else block_spectra(pilot, rows, columns, block)
    points = match_blocks(spectra if pilot_spectra is None else pilot_spectra, *refs, group, reach)
    m = n * points.shape[1]
    first = torch.arange(n, device=images.device) * (len(rows) * len(columns))
    flat = (points + first[:, None, None]).reshape(m, group).T.flatten()  # the group is the slowest index

    haar = haar_matrix(group).to(images.device)
    variance = coarse_variance(points.reshape(m, group).T, len(columns), block, gaps, haar)

    def stack(values: Tensor) -> Tensor:
        return (haar @ values.view(-1, block * block)[flat].view(group, -1)).view(group, m, -1)

    shrunk, weight = _shrink(
        stack(spectra), None if pilot_spectra is None else stack(pilot_spectra), variance, config
    )
    shrunk = haar.T @ shrunk.mul_(weight[:, None]).view(group, -1)
    total = torch.zeros_like(spectra).view(-1, block * block)
    total.index_add_(0, flat, shrunk.view(-1, block * block))
    weights = torch.zeros(len(total), device=images.device).index_add_(0, flat, weight.repeat(group))

    # blocks go back through the same matrices, transposed, under the Kaiser window
    kaiser = torch.kaiser_window(block, periodic=False, beta=config.kaiser)
    dct = dct_matrix(block) * kaiser
    total = total.view(n, len(rows), len(columns), block, block).transpose(2, 3)
    total = total.reshape(n, len(rows) * block, len(columns) * block)
    summed = block_matrix(h, rows, dct).T @ total @ block_matrix(w, columns, dct)
    weights = weights.view(n, len(rows), len(columns))
    return summed, block_matrix(h, rows, kaiser[None]).T @ weights @ block_matrix(w, columns, kaiser[None])


def _estimate(images: Tensor, pilot: Tensor | None, config: Config) -> Tensor:
    """One step of BM3D on images (n, h, w) of noise level 1, by tiles of images and of reference blocks."""
    n, h, w = images.shape
    step = config.step_basic if pilot is None else config.step_wiener
    block = min(config.block_basic if pilot is None else config.block_wiener, h, w)
    grid_y, grid_x = (grid_positions(size, block, step).to(images.device) for size in (h, w))
    block, group, reach = _sizes(h, w, len(grid_y), len(grid_x), pilot is not None, config)
    (start_y, height), (start_x, width) = (search_start(len(p), reach) for p in (grid_y, grid_x))
    # groups of about 16 MB stay in a CPU's cache; a GPU wants much more at once
    tile = 32
    values = min(tile, len(grid_y)) * min(tile, len(grid_x)) * group * block**2
    at_once = max(1, 2 ** (27 if images.is_cuda else 22) // values)

    summed, weights = torch.zeros_like(images), torch.zeros_like(images)
    for i in range(0, n, at_once):
        for y in range(0, len(grid_y), tile):
            for x in range(0, len(grid_x), tile):
                y1, x1 = min(y + tile, len(grid_y)), min(x + tile, len(grid_x))
                top, left = int(start_y[y]), int(start_x[x])
                rows, columns = grid_y[top : start_y[y1 - 1] + height], grid_x[left : start_x[x1 - 1] + width]
                part = (
                    slice(i, i + at_once),
                    slice(int(rows[0]), int(rows[-1]) + block),
                    slice(int(columns[0]), int(columns[-1]) + block),
                )
                s, k = _filter_tile(
                    images[part],
                    None if pilot is None else pilot[part],
                    (rows - rows[0], columns - columns[0]),
                    (range(y - top, y1 - top), range(x - left, x1 - left)),
                    config,
                )
                summed[part] += s
                weights[part] += k
    return summed / weights


def _scaled(images: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """Images with background 0 and noise level 1, and the background that was taken off, (n, 1, 1)."""
    corners = corner_mask(images.shape[1], images.shape[2], images.device)
    corners = corners if bool(corners.any()) else torch.ones_like(corners)
    background = images[:, corners].mean(1)[:, None, None]
    return (images - background) / sigma, background


def basic_estimate(images: Tensor, sigma: float, config: Config = Config()) -> Tensor:
    """Step 1 alone: groups matched in the noisy images (n, h, w), hard threshold. Same units and shape."""
    scaled, background = _scaled(images, sigma)
    return _estimate(scaled, None, config) * sigma + background


def bm3d(images: Tensor, sigma: float, config: Config = Config()) -> Tensor:
    """Denoise float32 images (n, h, w) with white noise of standard deviation ``sigma`` in their units.

    Both steps: the estimate of step 1 matches the blocks and gives the Wiener gains of step 2. Scaling the
    images and sigma, or adding a constant, does the same to the result. sigma 0 gives the images back.
    Raises CryobenchError for a negative sigma.
    """
    if sigma < 0:
        raise CryobenchError(f"bm3d: sigma must not be negative: {sigma}")
    if sigma == 0:
        return images.clone()
    scaled, background = _scaled(images, sigma)
    return _estimate(scaled, _estimate(scaled, None, config), config) * sigma + background


class Method(Denoiser):
    """Block matching and 3D filtering, hard threshold then Wiener."""

    name = "bm3d"
    paper = "dabov2007bm3d"
    supervision = "sigma"
    Config = Config

    def denoise(self, images: Tensor, sigma: float | None = None) -> Tensor:
        """Denoise images (n, h, w); see :func:`bm3d`."""
        return bm3d(images, sigma or 0.0, self.config)
