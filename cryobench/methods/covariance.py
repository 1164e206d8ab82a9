"""Mean and covariance of particle images, in a steerable basis, from noisy images with different CTFs.

Bhamre, Zhang and Singer, J. Struct. Biol. 195:72 (2016). Images y = A_i x + noise come in groups i with one CTF A_i
each, a matrix per angular frequency; the noise has the covariance sigma^2 P. With V_i = P^-1 A_i, B_i = A_i^T V_i,
second moments S_i about A_i mean and w_i the share of the images in group i, the least-squares estimates solve

    sum w_i B_i mean = sum w_i V_i^T (mean of y in group i),
    sum w_i B_i C B_i = sum w_i V_i^T S_i V_i - sigma^2 T,    T = sum w_i B_i.

Instead of the plain difference, the eigenvalues of T^-1/2 (sum w_i V_i^T S_i V_i) T^-1/2 are shrunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from cryobench.imaging.steerable import SteerableBasis

#: what the CTFs pass of a direction, as a share of what they pass at most, below which nothing is known of it:
#: mean and covariance are 0 there instead of noise blown up. It takes a single defocus to come so low.
UNSEEN = 1e-4


class Moments:
    """Sums over images from which mean and covariance follow; images come in batches and are not kept.

    noise: power of the noise at the nodes of the basis, in units of sigma^2.
    """

    def __init__(self, basis: SteerableBasis, noise: Tensor) -> None:
        self.basis = basis
        self.images = 0
        self.precision = basis.radial_matrices(1 / noise)
        self.second, self.gram = torch.zeros_like(self.precision), torch.zeros_like(self.precision)
        self._noise = noise
        self._groups: list[tuple[int, Tensor, Tensor, Tensor]] = []

    def add(self, batches: Iterable[Tensor], profile: Tensor) -> None:
        """Images (n, size, size) with background 0, in batches, of one group; profile: CTF at the basis's nodes."""
        contrast = self.basis.radial_matrices(profile)
        weighted = self.precision @ contrast
        second, first, count = torch.zeros_like(contrast), torch.zeros_like(contrast[0, 0]), 0
        for batch in batches:
            coefficients = self.basis.expand(batch)
            first += coefficients[:, 0, 0].double().sum(0)
            each = by_frequency(coefficients)
            second += each.mT @ each
            count += len(batch)
        # cosine and sine are two samples of the same block
        second[1:] /= 2
        gram = contrast @ weighted
        self.second += weighted.mT @ second @ weighted
        self.gram += count * gram
        self.images += count
        self._groups.append((count, profile, weighted[0].T @ first, gram[0]))

    def solve(self, sigma2: float, samples: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean (Q,), covariance (K, Q, Q), and eigenvalues (K, Q) before and after shrinkage in units of sigma2.

        samples: see ``cwf.Config``. All float64.
        """
        n = self.images
        gram, second = self.gram / n, self.second / n
        first = torch.stack([v for *_, v, _ in self._groups]).sum(0) / n
        mean = torch.linalg.pinv(gram[0], rtol=UNSEEN, hermitian=True) @ first
        for count, _, along, block in self._groups:
            seen = block @ mean
            cross = torch.outer(along, seen)
            second[0] -= (cross + cross.T - count * torch.outer(seen, seen)) / n
        root, inverse = _roots(gram)
        values, vectors = torch.linalg.eigh(_symmetric(inverse @ second @ inverse))
        counts = self.basis.counts.to(values.device)
        seen = torch.full_like(values[:, 0], n * samples)  # samples of each block
        seen[0] = n
        shrunk = shrink(values, sigma2, (counts / seen)[:, None])
        vectors = root @ vectors
        right = (vectors * shrunk[:, None]) @ vectors.mT
        return mean, self._deconvolve(right), values.flip(-1), shrunk.flip(-1)

    def _deconvolve(self, right: Tensor) -> Tensor:
        """C (K, Q, Q), positive semidefinite, with sum w_i B_i C B_i = right."""
        weights = torch.tensor([count for count, *_ in self._groups], dtype=torch.float64, device=right.device)
        profiles = torch.stack([profile for _, profile, *_ in self._groups])
        covariance = torch.zeros_like(right)
        for k, count in enumerate(self.basis.counts.tolist()):
            block = right[k, :count, :count]
            if not block.any():
                continue
            contrast = self.basis.radial_matrix(k, profiles)
            grams = contrast @ self.precision[k, :count, :count] @ contrast
            grams *= (weights / weights.sum()).sqrt()[:, None, None]
            inverse = torch.linalg.pinv(grams.sum(0), rtol=UNSEEN, hermitian=True)
            tall = grams.flatten(0, 1)  # the B_i below each other

            def apply(x: Tensor, tall: Tensor = tall) -> Tensor:
                products = (tall @ x).view(-1, len(x), len(x))
                return products.transpose(0, 1).flatten(1) @ tall

            solved = conjugate_gradients(apply, block, inverse)
            values, vectors = torch.linalg.eigh(_symmetric(solved))
            covariance[k, :count, :count] = (vectors * values.clamp(min=0)) @ vectors.T
        return covariance


def by_frequency(coefficients: Tensor) -> Tensor:
    """(n, K, 2, Q) as (K, 2 n, Q): cosine and sine are mixed alike by all that is done here."""
    return coefficients.permute(1, 0, 2, 3).flatten(1, 2)


def shrink(values: Tensor, sigma2: float, gamma: Tensor) -> Tensor:
    """Signal eigenvalues from those of a sample covariance, with the least Frobenius error of the covariance.

    gamma: dimension / samples. Eigenvalues below the Marchenko-Pastur edge sigma2 (1 + sqrt(gamma))^2 are noise:
    0. Above, the eigenvalue l of the signal that pushes one to ``values`` is found, and multiplied by the squared
    cosine between true and sample eigenvectors (Donoho, Gavish and Johnstone, Ann. Stat. 46:1742, 2018).
    """
    kept = values > sigma2 * (1 + gamma.sqrt()) ** 2
    middle = values + sigma2 * (1 - gamma)
    signal = (middle + (middle**2 - 4 * sigma2 * values).clamp(min=0).sqrt()) / 2 - sigma2
    signal = signal.clamp(min=1e-300)
    return torch.where(kept, signal * (1 - gamma * (sigma2 / signal) ** 2) / (1 + gamma * sigma2 / signal), 0.0)


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor],
    right: Tensor,
    inverse: Tensor,
    most: int = 250,
    tolerance: float = 1e-8,
) -> Tensor:
    """Matrix x with apply(x) = right for a symmetric positive operator; x -> inverse x inverse is nearly its inverse.

    Stops at a residual of ``tolerance`` times that of x = 0, both in the norm of inverse, or after ``most`` steps.
    Where inverse is 0, so is x.
    """
    x, residual = torch.zeros_like(right), right.clone()
    step = inverse @ residual @ inverse
    direction, slope = step, (step * residual).sum()
    enough = tolerance**2 * slope
    for _ in range(most):
        if slope <= enough:
            break
        image = apply(direction)
        length = slope / (direction * image).sum()
        x += length * direction
        residual -= length * image
        step = inverse @ residual @ inverse
        before, slope = slope, (step * residual).sum()
        direction = step + slope / before * direction
    return x


def _symmetric(matrices: Tensor) -> Tensor:
    return (matrices + matrices.mT) / 2


def _roots(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Square roots of positive semidefinite matrices (K, Q, Q) and their pseudo-inverses."""
    values, vectors = torch.linalg.eigh(_symmetric(matrices))
    roots = values.clamp(min=0).sqrt()
    inverse = torch.where(roots > 1e-6 * roots.amax(-1, keepdim=True), 1 / roots.clamp(min=1e-300), 0.0)
    return (vectors * roots[:, None]) @ vectors.mT, (vectors * inverse[:, None]) @ vectors.mT
