"""BM3D: each stage against a plain version of itself, the whole against the authors' package `bm3d`."""

import math
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from scipy.fft import dctn

from cryobench.errors import CryobenchError
from cryobench.methods import bm3d as module
from cryobench.methods.bm3d import Config, Method, basic_estimate, bm3d, similar_blocks


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def particles(n, h, w, snr, seed=1):
    """Clean and noisy (n, h, w) and sigma: a C4 bundle of rods of Gaussian atoms in random directions of view."""
    rng = np.random.default_rng(4)
    start, axis = rng.normal(size=(2, 20, 3))
    axis = axis / np.linalg.norm(axis, axis=1, keepdims=True) + [0, 0, 1]
    rods = start * [9, 9, 18] + [16, 0, 0] + axis * np.linspace(-14, 14, 26)[:, None, None]
    rods = (rods + rng.normal(scale=2.0, size=rods.shape)).reshape(-1, 3)
    turn = np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]])
    atoms = np.concatenate([rods @ np.linalg.matrix_power(turn, k).T for k in range(4)]) * min(h, w) / 128
    poses, _ = torch.linalg.qr(normal(n, 3, 3, seed=seed))
    x, y = (torch.tensor(atoms, dtype=torch.float32) @ poses)[..., :2].unbind(-1)
    rows = torch.exp(-0.5 * (torch.arange(h)[:, None] - h // 2 - y[:, None]) ** 2)
    columns = torch.exp(-0.5 * (torch.arange(w)[:, None] - w // 2 - x[:, None]) ** 2)
    clean = rows @ columns.transpose(1, 2)
    clean = clean / clean.std()
    sigma = float((clean.var() / snr).sqrt())
    return clean, clean + sigma * normal(n, h, w, seed=seed + 1), sigma


def psnr(images, clean):
    span = clean.amax((1, 2)) - clean.amin((1, 2))
    return float((10 * torch.log10(span**2 / (images - clean).square().mean((1, 2)))).mean())


def test_transforms_are_orthonormal_and_haar_is_haar():
    for matrix in (module.dct_matrix(12), module.dct_matrix(1), module.haar_matrix(16), module.haar_matrix(1)):
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(matrix)), atol=1e-6, rtol=0)
    root = math.sqrt(0.5)
    expected = [[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, -0.5, -0.5], [root, -root, 0, 0], [0, 0, root, -root]]
    torch.testing.assert_close(module.haar_matrix(4), torch.tensor(expected))


def test_block_spectra_are_the_dct_of_each_block():
    images = normal(2, 21, 30)
    rows, columns = module.grid_positions(21, 6, 4), module.grid_positions(30, 6, 4)
    assert rows[0] == columns[0] == 0
    assert (rows[-1], columns[-1]) == (15, 24), "the last block ends at the edge"
    assert max(rows.diff().max(), columns.diff().max()) <= 4
    spectra = module.block_spectra(images, rows, columns, 6)
    for i, y in enumerate(rows):
        for j, x in enumerate(columns):
            block = images[:, y : y + 6, x : x + 6].numpy()
            expected = dctn(block, axes=(1, 2), norm="ortho").reshape(2, -1)
            np.testing.assert_allclose(spectra[:, i, j], expected, atol=1e-5)


def test_matching_is_an_exhaustive_search():
    spectra, reach, group = normal(2, 9, 11, 5), 2, 8
    found = module.match_blocks(spectra, range(1, 9), range(11), group, reach)
    assert found.shape == (2, 8 * 11, group)
    for image in range(2):
        for k, (y, x) in enumerate((y, x) for y in range(1, 9) for x in range(11)):
            top, left = min(max(y - reach, 0), 9 - 5), min(max(x - reach, 0), 11 - 5)
            window = [(v, u) for v in range(top, top + 5) for u in range(left, left + 5)]
            window.sort(key=lambda p: float((spectra[image][p] - spectra[image, y, x]).square().sum()))
            assert found[image, k].tolist() == [v * 11 + u for v, u in window[:group]]


def test_itself_comes_first_even_when_all_blocks_are_equal():
    found = module.match_blocks(torch.ones(1, 5, 5, 4), range(5), range(5), 8, 2)
    assert found[0, :, 0].tolist() == list(range(25))
    assert all(len(set(group)) == 8 for group in found[0].tolist())


@pytest.mark.parametrize("gaps", [[4, 4], [4, 3], [8, 8]])
def test_variance_of_overlapping_blocks_is_the_norm_of_what_is_summed(gaps):
    """A coefficient of a group is a linear form of the image: its noise variance is the squared norm of that form."""
    block, grid_w, group = 8, 6, 8
    points = torch.stack([torch.randperm(36, generator=torch.Generator().manual_seed(k))[:group] for k in range(5)], 1)
    haar, dct = module.haar_matrix(group), module.dct_matrix(block)
    variance = module.coarse_variance(points, grid_w, block, gaps, haar)
    for m in range(5):
        for c in range(len(variance)):
            form = torch.zeros(block * block, 6 * 8 + 8, 6 * 8 + 8)
            for weight, point in zip(haar[c], points[:, m].tolist(), strict=True):
                y, x = point // grid_w * gaps[0], point % grid_w * gaps[1]
                basis = (dct[:, None, :, None] * dct[None, :, None, :]).reshape(-1, block, block)
                form[:, y : y + block, x : x + block] += weight * basis
            expected = form.square().sum((1, 2)).clamp(min=0.02)
            torch.testing.assert_close(variance[c, m], expected, atol=1e-4, rtol=1e-4)
    assert bool((variance == 1).all()) == (gaps == [8, 8])


def test_tiles_do_not_show(monkeypatch):
    _, noisy, sigma = particles(2, 90, 131, 0.3)
    whole = bm3d(noisy, sigma)
    tiles = module._tiles
    monkeypatch.setattr(module, "_tiles", lambda grid, reach: tiles(grid, reach, 7))
    assert len(list(module._tiles(torch.arange(30), 3))) == 5
    # float sums in another order now and then turn a near tie in the matching
    assert (bm3d(noisy, sigma) - whole).square().mean().sqrt() < 0.02 * whole.std()


def test_an_image_alone_is_the_image_in_a_stack():
    _, noisy, sigma = particles(5, 40, 33, 0.3)
    stack = bm3d(noisy, sigma)
    alone = torch.cat([bm3d(image[None], sigma) for image in noisy])
    assert (alone - stack).square().mean().sqrt() < 0.02 * stack.std()


@pytest.mark.parametrize("shape", [(1, 16, 16), (2, 65, 65), (1, 17, 70), (1, 5, 7), (1, 1, 1), (3, 12, 10)], ids=str)
def test_any_size(shape):
    out = bm3d(normal(*shape) + 3, 1.0)
    assert out.shape == shape
    assert torch.isfinite(out).all()
    flat = torch.full(shape, 3.0)
    torch.testing.assert_close(bm3d(flat, 1.0), flat)


def test_sigma_decides():
    _, noisy, _ = particles(2, 48, 48, 1.0)
    assert torch.equal(bm3d(noisy, 0.0), noisy)
    assert 0 < float((bm3d(noisy, 1e-3) - noisy).abs().max()) < 0.02
    with pytest.raises(CryobenchError, match="negative"):
        bm3d(noisy, -1.0)
    with pytest.raises(CryobenchError, match="negative"):
        Method().denoise(noisy, -1.0)


def test_pure_noise_leaves_almost_nothing():
    noise = normal(4, 96, 96)
    assert float(bm3d(noise, 1.0).std()) < 0.06
    assert float(bm3d(noise, 0.2).std()) > 0.8, "with sigma far too small the noise stays"


def test_units_do_not_matter():
    _, noisy, sigma = particles(2, 64, 50, 0.1)
    out = bm3d(noisy, sigma)
    other = (bm3d(noisy * 250 + 900, sigma * 250) - 900) / 250
    assert (other - out).square().mean().sqrt() < 0.01 * out.std()


def test_each_step_pays():
    clean, noisy, sigma = particles(6, 96, 96, 0.1)
    kernel = torch.exp(-0.5 * (torch.arange(-12, 13) / 2.7) ** 2)
    kernel = (kernel[:, None] * kernel / kernel.sum() ** 2)[None, None]
    smooth = torch.nn.functional.conv2d(noisy[:, None], kernel, padding=12)[:, 0]
    basic, final = basic_estimate(noisy, sigma), bm3d(noisy, sigma)
    assert psnr(basic, clean) > psnr(noisy, clean) + 10
    assert psnr(final, clean) > psnr(basic, clean) + 1
    assert psnr(final, clean) > psnr(smooth, clean) + 1


def test_similar_blocks_finds_the_copies():
    image = 0.1 * normal(64, 64)
    patch = normal(12, 12, seed=3)
    copies = [(8, 8), (8, 32), (28, 20), (40, 40)]
    for y, x in copies:
        image[y : y + 12, x : x + 12] += patch
    found = similar_blocks(image, 28 + 6, 20 + 6, Config(group_basic=4))
    assert found.shape == (4, 2)
    assert found[0].tolist() == [28, 20]
    assert {tuple(p) for p in found.tolist()} == set(copies)


def test_a_config_changes_the_result():
    _, noisy, sigma = particles(1, 40, 40, 0.5)
    default = bm3d(noisy, sigma)
    changes = {
        "block_basic": 8, "block_wiener": 8, "group_basic": 8, "group_wiener": 8, "step": 3, "window": 17,
        "threshold": 3.0, "wiener_noise": 1.0, "kaiser": 1.0, "wiener_passes": 1,
    }  # fmt: skip
    assert changes.keys() == Config.__dataclass_fields__.keys()
    for field, value in changes.items():
        assert not torch.equal(Method(Config(**{field: value})).denoise(noisy, sigma), default), field


@pytest.mark.slow
def test_a_micrograph_takes_little_memory():
    code = (
        "import resource, torch\nfrom cryobench.methods.bm3d import bm3d\ntorch.set_num_threads(2)\n"
        "assert torch.isfinite(bm3d(torch.randn(1, 1000, 1000), 1.0)).all()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2e6, "kilobytes"


def by_peer(images, sigma):
    peer = pytest.importorskip("bm3d", reason="the peer package bm3d is not installed")
    return torch.tensor(np.stack([peer.bm3d(image.numpy(), sigma) for image in images])).float()


@pytest.mark.peers
def test_no_worse_than_the_peer():
    clean, noisy, sigma = particles(4, 64, 64, 0.1)
    assert psnr(bm3d(noisy, sigma), clean) > psnr(by_peer(noisy, sigma), clean) - 0.2


@pytest.mark.slow
@pytest.mark.peers
@pytest.mark.parametrize("snr", [0.05, 0.1, 0.4, 1.0])
@pytest.mark.parametrize(("n", "h", "w"), [(12, 64, 64), (12, 65, 65), (6, 128, 128), (6, 96, 128)])
def test_no_worse_than_the_peer_over_a_grid(n, h, w, snr):
    clean, noisy, sigma = particles(n, h, w, snr)
    assert psnr(bm3d(noisy, sigma), clean) > psnr(by_peer(noisy, sigma), clean) - 0.2


@pytest.mark.slow
@pytest.mark.peers
def test_five_times_faster_than_the_peer():
    """Wall time per image of 128 x 128, both on all cores, in turns; the best of three turns each."""
    torch.set_num_threads(os.cpu_count() or 1)
    _, noisy, sigma = particles(8, 128, 128, 0.1)
    by_peer(noisy[:1], sigma), bm3d(noisy[:1], sigma)
    ours, theirs = [], []
    for _ in range(3):
        for times, call in ((theirs, by_peer), (ours, bm3d)):
            begin = time.perf_counter()
            call(noisy, sigma)
            times.append(time.perf_counter() - begin)
    torch.set_num_threads(1)
    assert min(theirs) > 5 * min(ours)
