"""DnCNN: the network of the paper, and what its method adds."""

import pytest
import torch
from blobs import BlobData

from cryobench.errors import CryobenchError
from cryobench.imaging.turns import turn
from cryobench.methods.base import Budget
from cryobench.methods.dncnn import Config, Method, Network
from cryobench.methods.nets.tiling import apply_tiled

QUIET = Budget(progress=False)


@pytest.fixture(scope="module")
def fitted() -> Method:
    method = Method(Method.config_for("smoke"))
    method.fit(BlobData(), QUIET)
    return method


def test_the_papers_network() -> None:
    """Depth 17 and 64 channels make 0.556 M weights: 1->64 and 64->1 with bias, 15 times 64->64 with BN."""
    net = Network(Config())
    convolutions = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
    norms = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert (len(convolutions), len(norms)) == (17, 15)
    weights = (9 * 64 + 64) + 15 * (9 * 64 * 64 + 2 * 64) + (9 * 64 + 1)
    assert sum(w.numel() for w in net.parameters()) == weights == 556_097
    assert {(n.eps, n.momentum) for n in norms} == {(1e-4, 0.95)}
    inner = convolutions[3].weight.detach().flatten(1)
    assert torch.allclose(inner @ inner.T, torch.eye(64), atol=1e-5)


def test_residual() -> None:
    """Without a last layer no noise is predicted and the image comes back; so does any shuffling of pixels."""
    for shuffle in (1, 2, 4):
        net = Network(Config(depth=4, width=8, shuffle=shuffle))
        torch.nn.init.zeros_(net.layers[-1].weight)
        x = torch.randn(2, 1, 12, 20)
        assert torch.equal(net(x), x)
        net.residual = False
        assert torch.equal(net(x), torch.zeros_like(x))


def test_beats_the_noise_and_a_scaled_copy(fitted: Method) -> None:
    data = BlobData()
    clean, noisy = data._images(64, seed=77)
    error = (fitted.denoise(noisy, data.sigma) - clean).square().mean()
    shrink = float(((clean - clean.mean()) * (noisy - noisy.mean())).sum() / (noisy - noisy.mean()).square().sum())
    best_scaled = (noisy.mean() + shrink * (noisy - noisy.mean()) - clean).square().mean()
    assert error < 0.5 * best_scaled < 0.5 * data.sigma**2


def test_tiles_leave_no_seam() -> None:
    torch.manual_seed(0)
    net = Network(Config(depth=5, width=8, shuffle=2)).eval()
    images = torch.randn(2, 70, 93)
    with torch.no_grad():
        whole = apply_tiled(net, images, margin=10, multiple=2, tile=96)
        tiled = apply_tiled(net, images, margin=10, multiple=2, tile=32)
        seam = apply_tiled(net, images, margin=0, multiple=2, tile=32)
    assert torch.allclose(whole, tiled, atol=1e-5)
    assert not torch.allclose(whole, seam, atol=1e-2)


def test_margin_is_how_far_it_sees() -> None:
    """From a block of pixels depth * shuffle to each side, by the gradient; one at a time in the paper's network."""
    for shuffle, depth in ((4, 3), (1, 5)):
        method = Method(Config(depth=depth, width=8, shuffle=shuffle))
        size = 8 * depth * shuffle
        x = torch.randn(1, 1, size, size, requires_grad=True)
        block = slice(size // 2, size // 2 + shuffle)
        method.network().eval()(x)[0, 0, block, block].sum().backward()
        assert x.grad is not None
        rows = x.grad[0, 0].abs().sum(1).nonzero().flatten()
        assert (size // 2 - int(rows.min()), int(rows.max()) - size // 2 - shuffle + 1) == (method.margin,) * 2


def test_what_is_turned_comes_out_turned(fitted: Method) -> None:
    """The mean over turns and mirrors commutes with them, also where images are not square."""
    images = torch.randn(2, 24, 36, generator=torch.Generator().manual_seed(0))
    out = fitted.denoise(images, 1.0)
    turned = fitted.denoise(turn(images, 1, mirror=True), 1.0)
    assert torch.allclose(turned, turn(out, 1, mirror=True), atol=1e-5)


def test_micrograph(fitted: Method) -> None:
    image = torch.randn(1, 1000, 701)
    assert fitted.denoise(image, 1.0).shape == image.shape


def test_needs_training() -> None:
    with pytest.raises(CryobenchError, match="not been trained"):
        Method(Method.config_for("smoke")).denoise(torch.randn(1, 16, 16), 1.0)
