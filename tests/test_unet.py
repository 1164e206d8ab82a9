"""The U-Net, starting from CWF, and what pairs of exposures teach."""

from pathlib import Path

import pytest
import torch
from blobs import BlobData

from cryobench.errors import CryobenchError
from cryobench.imaging.training_data import TrainingData
from cryobench.layers import layer_table
from cryobench.methods import noise2noise, unet
from cryobench.methods.base import Budget
from cryobench.methods.learned import Learned
from cryobench.methods.nets.tiling import apply_tiled
from cryobench.methods.nets.unet import UNet
from cryobench.methods.registry import get_method

QUIET = Budget(progress=False)


def test_number_of_weights() -> None:
    """Two levels of 4 and 8 channels on patches of 2 px, counted by hand."""

    def conv(inputs: int, outputs: int, side: int) -> int:
        return outputs * (inputs * side**2 + 1)

    enter, leave = conv(4, 4, 3), conv(4, 4, 3)
    fine, coarse = 2 * conv(4, 4, 3), 2 * conv(8, 8, 3)
    between = conv(4, 8, 2) + conv(8, 16, 1)
    up = conv(8, 4, 3) + conv(4, 4, 3) + conv(8, 4, 1)
    net = UNet(widths=(4, 8), patch=2)
    assert sum(w.numel() for w in net.parameters()) == enter + leave + fine + coarse + between + up


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_sides(patch: int) -> None:
    net = UNet(inputs=2, outputs=3, widths=(4, 8, 8), patch=patch, norm=True)
    assert net.multiple == 4 * patch
    assert net(torch.randn(2, 2, 8 * patch, 12 * patch)).shape == (2, 3, 8 * patch, 12 * patch)


def test_noise_level_changes_the_result() -> None:
    torch.manual_seed(0)
    net = UNet(widths=(4, 8), levels=True)
    for weights in net.parameters():  # blocks start as the identity
        torch.nn.init.normal_(weights, std=0.2)
    x = torch.randn(2, 1, 8, 12)
    same, other = net(x, torch.tensor([0.3, 0.3])), net(x, torch.tensor([0.3, 0.8]))
    assert torch.equal(same[0], other[0])
    assert not torch.allclose(same[1], other[1])


def test_tiles_of_two_channels() -> None:
    def add(x: torch.Tensor) -> torch.Tensor:
        return x[:, :1] - x[:, 1:]

    stack = torch.randn(3, 2, 33, 40)
    assert torch.equal(apply_tiled(add, stack, margin=4, multiple=4, tile=16), stack[:, 0] - stack[:, 1])


def test_from_cwf_it_starts_with_cwf(tmp_path: Path) -> None:
    """Untrained, the network adds nothing and the result is CWF's; trained and loaded, it is what was saved."""
    data = BlobData()
    train = TrainingData("clean-pairs", data.noisy, data.clean, data.sigma, 4.0)
    options = {"start": "cwf", "learning_rate": 1e-12, "weight_decay": 0.0, "ema": 0.0}
    method = unet.Method(unet.Method.config_for("smoke", **options, steps=1))
    method.fit(train, QUIET)
    filtered = unet.cwf.Method()
    filtered.fit(train, QUIET)
    expected = filtered.denoise(data.noisy, data.sigma)
    net = method.trained_network()
    assert isinstance(net, unet.AddTo)
    torch.nn.init.zeros_(net.net.leave.weight)
    torch.nn.init.zeros_(net.net.leave.bias)
    method.state |= net.state_dict()
    assert torch.allclose(method.denoise(data.noisy, data.sigma), expected, atol=1e-4 * float(expected.std()))
    scaled = method.denoise(data.noisy * 50 + 3, data.sigma * 50)
    assert torch.allclose(scaled, expected * 50 + 3, atol=1e-2 * 50 * float(expected.std()))
    method.save(tmp_path / "w")
    again = unet.Method.load(tmp_path / "w")
    assert torch.equal(again.denoise(data.noisy, data.sigma), method.denoise(data.noisy, data.sigma))
    with pytest.raises(CryobenchError, match="start"):
        unet.Method(unet.Method.config_for("smoke", start="bm3d")).fit(train, QUIET)


def test_noise_that_both_exposures_share_is_kept() -> None:
    """E[y2 | y1] = rho y1 where there is nothing but noise of which a share rho is common."""
    generator = torch.Generator().manual_seed(0)
    common, rest, new = torch.randn(3, 48, 32, 32, generator=generator)
    for rho in (0.0, 0.6):
        second = rho * common + (1 - rho**2) ** 0.5 * rest
        train = TrainingData("noisy-pairs", common, None, 1.0, 4.0, second=second)
        method = noise2noise.Method(noise2noise.Method.config_for("smoke", steps=300, precision="float32"))
        method.fit(train, QUIET)
        slope = float((method.denoise(new, 1.0) * new).sum() / new.square().sum())
        assert slope == pytest.approx(rho, abs=0.08)


@pytest.mark.parametrize("name", ["unet", "noise2noise", "dncnn", "restore", "denoisegan", "robustgan", "score", "gan"])
def test_the_table_of_layers_leaves_nothing_out(name: str) -> None:
    method = get_method(name)(get_method(name).config_for("smoke"))
    assert isinstance(method, Learned)
    network = method.network()
    lines = layer_table(network, torch.zeros(1, 1, 32, 32)).splitlines()
    listed = sum(int(line.split()[-1].replace(",", "")) for line in lines[1:-1])
    assert listed == sum(w.numel() for w in network.parameters())
