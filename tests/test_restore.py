"""restore: the authors' network counted by hand, what it sees, and learning from noise alone."""

from typing import Any

import pytest
import torch
from blobs import BlobData
from torch import Tensor

from cryobench.methods.base import Budget
from cryobench.methods.nets.tiling import apply_tiled
from cryobench.methods.restore import Config, Method, Network, WideBlock, conv

QUIET = Budget(progress=False)


class NoisyPairs(BlobData):
    """A fixed stack of two exposures, in place of clean images."""

    supervision = "noisy-pairs"

    def __init__(self, n: int = 512) -> None:
        super().__init__()
        clean, self.first = self._images(n, 5)
        self.second = clean + self.sigma * torch.randn(clean.shape, generator=torch.Generator().manual_seed(6))

    def batch(self, step: int, batch_size: int, seed: int, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
        index = torch.randint(len(self.first), (batch_size,), generator=torch.Generator().manual_seed(step))
        return self.first[index], self.second[index]


@pytest.fixture(scope="module")
def fitted() -> Method:
    method = Method(Method.config_for("smoke"))
    method.fit(NoisyPairs(), QUIET)
    return method


def test_the_authors_network() -> None:
    """2.38 M weights, counted layer by layer, as theirs; the lengths of weight normalisation come on top."""

    def block(width: int, kernel: int) -> int:
        narrow = int(0.8 * width)
        return (width + 1) * 4 * width + (4 * width + 1) * narrow + (kernel**2 * narrow + 1) * width

    up = (32 + 1) * 128 + block(128, 4)
    down = 4 * block(32, 3) + (9 * 32 + 1) * 32
    rise = 3 * block(32, 4) + 2 * up
    joins = (32 + 1) * 32 + 3 * (64 + 1) * 32  # the first has nothing to join, the last is that of the output
    by_hand = (9 + 1) * 32 + 3 * down + 3 * rise + joins + (32 + 1)
    weights = dict(Network(Config()).named_parameters())
    lengths = sum(w.numel() for name, w in weights.items() if name.endswith("original0"))
    assert sum(w.numel() for w in weights.values()) - lengths == by_hand == 2_383_826
    # one length for each output channel
    assert lengths == sum(w.numel() for name, w in weights.items() if name.endswith("bias")) == 9_362


def test_weights_are_a_length_times_a_direction() -> None:
    layer = conv(3, 5, 4)
    stored = dict(layer.named_parameters())
    length, direction = (stored[f"parametrizations.weight.original{k}"] for k in (0, 1))
    assert (length.shape, direction.shape) == ((5, 1, 1, 1), (5, 3, 4, 4))
    with torch.no_grad():
        length.fill_(2)
        direction.mul_(7)  # how long the direction is says nothing
    assert torch.allclose(layer.weight.flatten(1).norm(dim=1), torch.full((5,), 2.0))


def test_even_kernels_in_turns_stay_centred() -> None:
    """Two identities on 4 x 4 kernels of ones, so that the sum of both windows is seen."""
    x = torch.zeros(1, 5, 21, 21)
    x[..., 10, 10] = 1
    reached = []
    for order in ((False, True), (False, False)):
        h = x
        for early in order:
            block = WideBlock(5, 4, early)
            with torch.no_grad():
                for layer in (block.wide, block.narrow, block.conv):
                    layer.bias.zero_()
                    layer.weight = layer.weight.abs()
                h = block(h)
        rows = h[0].sum(0).sum(1).nonzero().flatten()
        reached.append((int(rows.min()) - 10, int(rows.max()) - 10))
    assert reached == [(-3, 3), (-4, 2)]


@pytest.mark.parametrize(
    "options",
    [{"levels": 2, "blocks": 2, "up_blocks": 3}, {"levels": 1, "blocks": 1, "up_blocks": 1, "patch": 2}],
)
def test_margin_is_how_far_it_sees(options: dict[str, Any]) -> None:
    """From the gradient of a block of output pixels, in a few random networks, since a ReLU may hide a pixel."""
    method = Method(Config(width=5, **options))
    block = method.multiple
    size, reached = 2 * block * (method.margin // block + 2), torch.zeros(2, dtype=torch.long)
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(1, 1, size, size, requires_grad=True)
        method.network()(x)[0, 0, size // 2 : size // 2 + block, size // 2 : size // 2 + block].sum().backward()
        assert x.grad is not None
        rows = x.grad[0, 0].abs().sum(1).nonzero().flatten()
        reached = torch.maximum(reached, torch.stack([size // 2 - rows.min(), rows.max() - (size // 2 + block - 1)]))
    assert reached[0] == method.margin
    assert 0 <= reached[0] - reached[1] <= block  # nearly as far to the other side: strides start at the upper left


def test_tiles_leave_no_seam() -> None:
    torch.manual_seed(0)
    method = Method(Method.config_for("smoke"))
    net = method.network().eval()
    images = torch.randn(1, 150, 203)
    with torch.no_grad():
        whole = apply_tiled(net, images, method.margin, method.multiple, tile=256)
        tiled = apply_tiled(net, images, method.margin, method.multiple, tile=64)
    assert torch.allclose(whole, tiled, atol=1e-5)


def test_learns_from_noise_alone(fitted: Method) -> None:
    """Far better than the best multiple of the input, though no clean image was seen; any size."""
    data = BlobData()
    clean, noisy = data._images(64, seed=77)
    error = (fitted.denoise(noisy, data.sigma) - clean).square().mean()
    gain = float(((clean - clean.mean()) * (noisy - noisy.mean())).sum() / (noisy - noisy.mean()).square().sum())
    best_scaled = (noisy.mean() + gain * (noisy - noisy.mean()) - clean).square().mean()
    assert error < 0.5 * best_scaled < 0.5 * data.sigma**2
    image = torch.randn(1, 540, 201)
    assert fitted.denoise(image, 1.0).shape == image.shape


def test_the_target_s_noise_is_the_floor_of_the_loss(fitted: Method) -> None:
    """E |f(y1) - y2|^2 = E |f(y1) - s|^2 + sigma^2: in units of the noise the loss ends little above 1."""
    last = [row[1] for row in fitted.info["loss"][-20:]]
    assert 0.9 < sum(last) / 20 < 1.3
