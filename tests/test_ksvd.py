"""K-SVD: the pursuit against a plain one in numpy, a planted dictionary, and what learning brings at SNR 0.1."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from cryobench.errors import CryobenchError
from cryobench.imaging.training_data import TrainingData
from cryobench.methods import ksvd, mean
from cryobench.methods.base import Budget

BUDGET = Budget(progress=False)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(rows):
    return rows / rows.norm(dim=1, keepdim=True)


def projections(n, size, seed):
    """Clean images (n, size, size), variance 1: one particle of 24 rods in random directions of view."""
    g = torch.Generator().manual_seed(99)
    centre, axis = torch.randn(2, 24, 1, 3, generator=g)
    atoms = (centre * size / 8 + unit(axis[:, 0])[:, None] * torch.linspace(-4, 4, 9)[:, None]).reshape(-1, 3)
    turn, _ = torch.linalg.qr(normal(n, 3, 3, seed=seed))
    y, x = (atoms @ turn)[..., :2].unbind(-1)
    grid = torch.arange(size) - size // 2
    rows, columns = (torch.exp(-0.5 * (grid[:, None] - p[:, None]) ** 2) for p in (y, x))
    images = rows @ columns.transpose(1, 2)
    return images / images.std()


def plain_omp(signal, dictionary, tolerance, least, max_atoms):
    """The textbook: pick, solve least squares, repeat."""
    chosen, codes, residual = [], np.zeros(len(dictionary)), signal.copy()
    while len(chosen) < max_atoms and residual @ residual > tolerance:
        match = np.abs(dictionary @ residual)
        if match.max() < least:
            break
        chosen.append(int(match.argmax()))
        solved = np.linalg.lstsq(dictionary[chosen].T, signal, rcond=None)[0]
        residual = signal - solved @ dictionary[chosen]
        codes[:] = 0
        codes[chosen] = solved
    return codes


@pytest.mark.parametrize(
    ("tolerance", "least", "most"), [(10.0, 0.0, 12), (0.0, 1.5, 12), (0.0, 0.0, 3), (25.0, 2.0, 5)]
)
def test_pursuit_is_that_of_the_textbook(tolerance, least, most):
    dictionary, signals = unit(normal(40, 25)), normal(60, 25, seed=1) * torch.linspace(0, 2, 60)[:, None]
    codes = ksvd.omp(signals, dictionary, tolerance, least, most)
    expected = [plain_omp(s, dictionary.double().numpy(), tolerance, least, most) for s in signals.double().numpy()]
    np.testing.assert_allclose(codes.numpy(), np.stack(expected), atol=2e-4)
    assert len(set((codes != 0).sum(1).tolist())) >= (1 if least == 0 == tolerance else 3)


def test_updates_lower_the_error_and_keep_zeros_and_unit_atoms():
    patches, dictionary = normal(2000, 36), unit(normal(50, 36, seed=1))
    patches[:, :18] *= 3
    last = math.inf
    for _ in range(4):
        codes = ksvd.omp(patches, dictionary, 0.0, 0.0, 4)
        coded = float((patches - codes @ dictionary).square().sum())
        pattern = codes != 0
        ksvd.update_atoms(patches, codes, dictionary)
        updated = float((patches - codes @ dictionary).square().sum())
        assert updated < coded < last
        last = coded
        assert not codes[~pattern].any()
        assert torch.allclose(dictionary.norm(dim=1), torch.ones(50), atol=1e-5)


def test_an_update_is_the_leading_singular_pair():
    patches = normal(300, 16)
    codes, dictionary = torch.ones(300, 1), unit(normal(1, 16, seed=1))
    patches[:, 3] += 4  # one clear direction, so that few power steps find it
    ksvd.update_atoms(patches, codes, dictionary)
    expected = torch.linalg.svd(patches, full_matrices=False)[2][0]
    assert abs(float(dictionary[0] @ expected)) > 0.9999


def test_an_unused_atom_becomes_the_worst_coded_patch():
    patches, dictionary = normal(20, 9), unit(normal(4, 9, seed=1))
    codes = torch.zeros(20, 4)
    patches[7] *= 10
    ksvd.update_atoms(patches, codes, dictionary)
    assert torch.allclose(dictionary[0], patches[7] / patches[7].norm())
    assert not torch.allclose(dictionary[1], dictionary[0])


def test_a_planted_dictionary_is_found():
    """Aharon et al., section V-A, smaller: 50 atoms of length 20, 3 per signal."""
    truth = unit(normal(50, 20))
    g = torch.Generator().manual_seed(3)
    signals = torch.zeros(2000, 20)
    for i in range(2000):
        signals[i] = torch.randn(3, generator=g) @ truth[torch.randperm(50, generator=g)[:3]]
    signals += 0.01 * normal(2000, 20, seed=4)
    learnt = ksvd.ksvd(signals, unit(signals[:50]), (0.0, 0.0, 3), 25)
    found = (learnt @ truth.T).abs().amax(0) > 0.99
    assert found.float().mean() > 0.85
    assert ((unit(signals[:50]) @ truth.T).abs().amax(0) > 0.99).float().mean() < 0.2


@pytest.mark.parametrize(("patch", "atoms"), [(8, 255), (12, 64), (5, 30)])
def test_dct_dictionary(patch, atoms):
    dictionary = ksvd.dct_dictionary(patch, atoms)
    assert dictionary.shape == (atoms, patch**2)
    assert torch.allclose(dictionary.norm(dim=1), torch.ones(atoms), atol=1e-5)
    assert dictionary.sum(1).abs().max() < 1e-4
    assert torch.linalg.matrix_rank(dictionary) == min(atoms, patch**2 - 1)


def test_it_beats_the_mean_filter_and_a_fixed_dictionary_at_snr_0_1():
    clean, sigma = projections(330, 48, seed=1), 0.1**-0.5
    noisy = clean + sigma * normal(330, 48, 48, seed=2)
    train = TrainingData("noisy", noisy[30:], None, sigma, 1.0)

    def loss(method):
        method.fit(train, BUDGET)
        return float((method.denoise(noisy[:30], sigma) - clean[:30]).square().mean())

    base = {"training_patches": 15_000}
    learnt = loss(ksvd.Method(ksvd.Config(**base, iterations=6)))
    fixed = loss(ksvd.Method(ksvd.Config(iterations=0)))
    paper = ksvd.Method(dataclasses.replace(ksvd.PAPER, iterations=1, **base))
    assert learnt < 0.9 * fixed
    assert learnt < 0.75 * loss(mean.Method())
    assert learnt < 0.95 * loss(paper)
    assert paper.info["atoms_per_patch"] < 0.3  # the trap: little but the mean of each patch is left


def test_sizes_scale_shift_seed_and_strides():
    images = projections(2, 48, seed=3)[:, :37, :] + 1.5 * normal(2, 37, 48, seed=4)
    small = ksvd.Config(patch=7, atoms=30, training_patches=1500, iterations=2, stride=1)
    out = ksvd.Method(small).denoise(images, 1.5)
    assert torch.equal(out, ksvd.Method(small).denoise(images, 1.5))
    assert not torch.equal(out, ksvd.Method(small, seed=1).denoise(images, 1.5))
    moved = ksvd.Method(small).denoise(20 * images + 300, 30.0)
    assert ((moved - 300) / 20 - out).square().mean() < 1e-4 * out.square().mean()
    assert torch.equal(ksvd.Method(small).denoise(images, 0.0), images)
    for shape in ((1, 7, 7), (1, 3, 30), (1, 41, 16)):
        assert ksvd.Method(small).denoise(normal(*shape), 1.0).shape == shape
    coarse = ksvd.Config(patch=7, atoms=30, training_patches=1500, iterations=2, stride=3)
    assert (ksvd.Method(coarse).denoise(images, 1.5) - out).abs().max() < 1.5
    with pytest.raises(CryobenchError, match="stride"):
        ksvd.Method(ksvd.Config(stride=13)).denoise(images, 1.0)


def test_bands_and_groups_change_nothing(monkeypatch):
    images = projections(3, 24, seed=3) + normal(3, 24, 24, seed=4)
    for stride in (1, 2):
        method = ksvd.Method(ksvd.Config(iterations=0, stride=stride))
        whole = method.denoise(images, 1.0)
        with monkeypatch.context() as patched:
            patched.setattr(ksvd, "CHUNK", 100)
            assert torch.allclose(method.denoise(images, 1.0), whole, atol=1e-5)


def test_a_fit_is_saved_and_loaded(tmp_path):
    images = projections(4, 32, seed=3) + normal(4, 32, 32, seed=4)
    method = ksvd.Method(ksvd.Config(training_patches=500, iterations=1))
    method.fit(TrainingData("noisy", images, None, 1.0, 1.0), BUDGET)
    method.save(tmp_path / "weights")
    assert torch.equal(ksvd.Method.load(tmp_path / "weights").denoise(images, 1.0), method.denoise(images, 1.0))
