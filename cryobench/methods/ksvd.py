"""K-SVD: sparse coding of patches over a dictionary learnt from the noisy images themselves.

Dictionary: Aharon, Elad, Bruckstein, IEEE Trans. Signal Process. 54:4311 (2006). Denoising: Elad, Aharon, IEEE
Trans. Image Process. 15:3736 (2006). Batch OMP and the approximate atom update: Rubinstein, Zibulevsky, Elad,
Technion CS-2008-08.

Each patch loses its mean and is written with few atoms by orthogonal matching pursuit; the mean and the sparse
sum, averaged over all patches that cover a pixel, are the denoised image. Learning alternates this coding with
an update of every atom to the leading singular vector of the residual of the patches that use it.

The paper stops the pursuit when the residual is below (C sigma)^2 per pixel, with C = 1.15 for patches of 8
pixels. In images of SNR 0.1 noise alone meets that: hardly a patch takes an atom, and what remains is the mean
filter of 8x8 windows, applied twice. What serves such images, measured on a phantom of 64 pixels: patches large
enough to hold a feature (12), few atoms (64, each then averages many patches), one dictionary for the whole
stack, and an atom taken only if its coefficient is significant (|<residual, atom>| >= threshold * sigma).
Those are the defaults; ``PAPER`` holds the paper's own values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from cryobench.errors import CryobenchError
from cryobench.methods.base import Budget, Denoiser

if TYPE_CHECKING:
    from cryobench.imaging.training_data import TrainingData


@dataclass(frozen=True)
class Config:
    """patch: side in pixels (paper: 8). atoms: size of the dictionary (256). gain: C, the residual allowed in units
    of sigma, 0 for no such stop (1.15). threshold: least coefficient of an atom in units of sigma, 0 for no such
    stop (0); 3.3 is about sqrt(2 log(256)), what the largest of 256 atoms finds in noise. max_atoms per patch.
    iterations of learning (10); 0 keeps the overcomplete DCT. training_patches: at most so many, drawn at random
    (65,000). stride between patches (1). blend: weight of the noisy pixel, lambda in the paper's equation 4 (0.5,
    see :func:`noisy_weight`).
    """

    patch: int = 12
    atoms: int = 64
    gain: float = 0.0
    threshold: float = 3.3
    max_atoms: int = 16
    iterations: int = 10
    training_patches: int = 65_000
    stride: int = 1
    blend: float = 0.0


#: the paper's values (its toolbox' for the number of patches)
PAPER = Config(patch=8, atoms=256, gain=1.15, threshold=0.0, max_atoms=32, blend=0.5)

CHUNK = 2**14  # patches coded at once: about 100 MB


class Method(Denoiser):
    """K-SVD with one dictionary for the whole stack."""

    name = "ksvd"
    paper = "elad2006ksvd"
    supervision = "noisy"
    trained = True
    Config = Config
    profiles: ClassVar[dict[str, dict[str, Any]]] = {"smoke": {"training_patches": 5_000, "iterations": 3}}

    def fit(self, train: TrainingData, budget: Budget) -> None:
        """Learn the dictionary from the noisy training images."""
        self.state = {"dictionary": self._learn(train.noisy.to(self.device), train.sigma, budget.progress)}

    def denoise(self, images: Tensor, sigma: float | None = None) -> Tensor:
        """Denoise images (n, h, w); sigma in their units, 0 returns them unchanged.

        Without a fit the dictionary is learnt from the images themselves.
        """
        if not sigma:
            return images
        c = self.config
        if not 1 <= c.stride <= c.patch:
            raise CryobenchError(f"K-SVD: the stride must be from 1 to the patch's {c.patch} pixels, not {c.stride}")
        h, w = images.shape[1:]
        # as many pixels as whole strides need, and never fewer than a patch
        down, across = ((c.patch - size) % c.stride if size > c.patch else c.patch - size for size in (h, w))
        wide = F.pad(images, (0, across, 0, down), mode="replicate")
        dictionary = self.state.get("dictionary")
        if dictionary is None:
            dictionary = self._learn(wide, sigma, False)
        total, count = torch.zeros_like(wide), torch.zeros_like(wide)
        used = patches = 0
        for n, rows, block in _blocks(wide, c.patch, c.stride):
            size = block.shape[-2:]
            columns = F.unfold(block[:, None], c.patch, stride=c.stride)  # (images, patch^2, places)
            flat = columns.transpose(1, 2).reshape(-1, c.patch**2)
            mean = flat.mean(1, keepdim=True)
            codes = omp(flat - mean, dictionary, *self._stops(sigma))
            flat = codes @ dictionary + mean
            used, patches = used + int((codes != 0).sum()), patches + len(flat)
            columns = flat.reshape(len(block), -1, c.patch**2).transpose(1, 2)
            total[n, rows] += F.fold(columns, size, c.patch, stride=c.stride)[:, 0]
            count[n, rows] += F.fold(torch.ones_like(columns[:1]), size, c.patch, stride=c.stride)[:, 0]
        self.info["atoms_per_patch"] = used / patches
        weight = noisy_weight(images, sigma, c.blend)
        return ((total + weight * wide) / (count + weight))[:, :h, :w]

    def _stops(self, sigma: float) -> tuple[float, float, int]:
        """The pursuit's three stops: squared residual, least coefficient, number of atoms."""
        c = self.config
        return (c.gain * sigma * c.patch) ** 2, c.threshold * sigma, c.max_atoms

    def _learn(self, images: Tensor, sigma: float, progress: bool) -> Tensor:
        """The dictionary (atoms, patch^2) for images (n, h, w): unit, zero-mean rows."""
        c = self.config
        dictionary = dct_dictionary(c.patch, c.atoms).to(images.device)
        if c.iterations == 0:
            return dictionary
        patches = sample_patches(images, c.patch, c.training_patches, self.seed)
        return ksvd(patches, dictionary, self._stops(sigma), c.iterations, progress)


def _blocks(images: Tensor, patch: int, stride: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Cut (n, h, w) into groups of images or bands of rows of about CHUNK patches: (images, rows, block)."""
    n, h, w = images.shape
    per_row = (w - patch) // stride + 1
    band = max(1, CHUNK // per_row) * stride
    group = max(1, CHUNK // (per_row * ((h - patch) // stride + 1)))
    for i in range(0, n, group):
        for top in range(0, h - patch + 1, band):
            rows = slice(top, min(h, top + band - stride + patch))
            yield slice(i, i + group), rows, images[i : i + group, rows]


def noisy_weight(images: Tensor, sigma: float, blend: float) -> float:
    """The paper's lambda against one per patch: blend * (standard deviation of the signal) / sigma.

    The paper has 30 / sigma for grey levels 0 to 255; natural images vary by about 60 of them, so blend = 0.5
    is the same there and follows the scale of any other image.
    """
    snr = max(0.0, float(images.var()) / sigma**2 - 1) if images.numel() > 1 else 0.0
    return blend * math.sqrt(snr)


def sample_patches(images: Tensor, patch: int, most: int, seed: int) -> Tensor:
    """Draw at most ``most`` different patches of images (n, h, w), less their means: (m, patch^2)."""
    n, h, w = images.shape
    if h < patch or w < patch:
        raise CryobenchError(f"K-SVD: training images of {h}x{w} are smaller than its patch of {patch} pixels")
    down, across = h - patch + 1, w - patch + 1
    generator = torch.Generator().manual_seed(seed)
    places = n * down * across
    pick = torch.randint(places, (most,), generator=generator).unique() if places > most else torch.arange(places)
    pick = pick.to(images.device)
    offset = torch.arange(patch, device=images.device)
    y = (pick // across % down)[:, None, None] + offset[:, None]
    x = (pick % across)[:, None, None] + offset
    flat = images[(pick // (down * across))[:, None, None], y, x].flatten(1)
    return flat - flat.mean(1, keepdim=True)


def dct_dictionary(patch: int, atoms: int) -> Tensor:
    """Overcomplete separable DCT without its constant atom: (atoms, patch^2), unit, zero-mean rows."""
    side = math.isqrt(atoms) + 1  # side^2 - 1 >= atoms
    i = torch.arange(patch, dtype=torch.float64)
    waves = torch.cos(math.pi * torch.arange(side)[:, None] * i / side)
    waves[1:] -= waves[1:].mean(1, keepdim=True)
    waves /= waves.norm(dim=1, keepdim=True)
    order = torch.arange(side)
    order = (order[:, None] ** 2 + order**2).flatten().argsort(stable=True)  # low frequencies first
    return torch.kron(waves, waves)[order][1 : atoms + 1].float()


def omp(signals: Tensor, dictionary: Tensor, tolerance: float, least: float, max_atoms: int) -> Tensor:
    """Orthogonal matching pursuit of all signals (m, d) at once over unit atoms (k, d): codes (m, k).

    A signal takes the atom that fits its residual best until the squared residual is at most ``tolerance``, or
    no atom's product with it reaches ``least``, or it has ``max_atoms``. The chosen atoms are made orthogonal
    one by one (Gram-Schmidt on their inner products with the dictionary), so that a step costs one row of the
    Gram matrix per signal.
    """
    gram = dictionary @ dictionary.T
    match = signals @ dictionary.T  # <residual, atom>
    energy = signals.square().sum(1)  # |residual|^2
    codes = torch.zeros_like(match)
    m = len(signals)
    alive = torch.arange(m, device=signals.device)
    basis = signals.new_zeros(m, 0, len(dictionary))  # <orthogonal direction j, atom>
    chosen = torch.zeros(m, 0, dtype=torch.long, device=signals.device)
    along = signals.new_zeros(m, 0)  # <signal, orthogonal direction j>
    for step in range(max_atoms + 1):
        best, atom = match.abs().max(1)
        done = (energy <= tolerance) | (best < least) | (best < 1e-6 * energy.clamp(min=0).sqrt()) | (step == max_atoms)
        if step > 0 and done.any():
            # row j of the triangle: chosen atom j in terms of the orthogonal directions
            triangle = basis[done].gather(2, chosen[done][:, None].expand(-1, step, -1)).triu()
            solved = torch.linalg.solve_triangular(triangle, along[done][..., None], upper=True)[..., 0]
            codes[alive[done]] = codes[alive[done]].scatter(1, chosen[done], solved)
        go = ~done
        if not go.any():
            break
        alive, atom, energy, match = alive[go], atom[go], energy[go], match[go]
        basis, chosen, along = basis[go], chosen[go], along[go]
        row = torch.arange(len(alive), device=signals.device)
        past = basis[row, :, atom]  # (alive, step)
        direction = gram[atom] - torch.einsum("mj,mjk->mk", past, basis)
        norm = direction[row, atom].clamp(min=1e-12).sqrt()
        direction /= norm[:, None]
        length = match[row, atom] / norm
        match = match - length[:, None] * direction
        match.scatter_(1, torch.cat([chosen, atom[:, None]], 1), 0.0)  # exactly zero: never chosen twice
        energy = energy - length.square()
        basis = torch.cat([basis, direction[:, None]], 1)
        chosen = torch.cat([chosen, atom[:, None]], 1)
        along = torch.cat([along, length[:, None]], 1)
    return codes


def ksvd(
    patches: Tensor, dictionary: Tensor, stops: tuple[float, float, int], iterations: int, progress: bool = False
) -> Tensor:
    """Learn from patches (m, d), starting at unit atoms (k, d), with the stops of :func:`omp`: the dictionary."""
    from tqdm import tqdm

    dictionary = dictionary.clone()
    for _ in tqdm(range(iterations), desc="K-SVD", disable=not progress):
        codes = torch.cat([omp(part, dictionary, *stops) for part in patches.split(CHUNK)])
        update_atoms(patches, codes, dictionary)
    return dictionary


def update_atoms(patches: Tensor, codes: Tensor, dictionary: Tensor) -> None:
    """One round of atom updates in place: codes (m, k) keep their zeros, |patches - codes dictionary| falls.

    An atom and its coefficients become the leading singular pair of the residual without that atom, found by
    a few steps of the power method. An atom that nobody uses is replaced by the worst-coded patch.
    """
    residual = patches - codes @ dictionary
    worst = residual.square().sum(1).argsort(descending=True).tolist()
    for k in range(len(dictionary)):
        users = codes[:, k].nonzero()[:, 0]
        if len(users) == 0:
            spare = patches[worst.pop(0)] if worst else dictionary[k]
            if spare.norm() > 0:
                dictionary[k] = spare / spare.norm()
            continue
        error = residual[users] + codes[users, k, None] * dictionary[k]
        atom, weight = dictionary[k], codes[users, k]
        for _ in range(3):
            atom = F.normalize(error.T @ weight, dim=0)
            weight = error @ atom
        residual[users] = error - weight[:, None] * atom
        dictionary[k], codes[users, k] = atom, weight
