"""GAN with perceptual loss: the weight of the features, VGG-19 where it is at hand, and what replaces it."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from blobs import BlobData
from torch import Tensor, nn

from cryobench.errors import CryobenchError
from cryobench.methods.base import Budget
from cryobench.methods.gan_perceptual import Method, feature_distance
from cryobench.methods.nets import perceptual
from cryobench.methods.training import BudgetSpent, TrainConfig

QUIET = Budget(progress=False)
CPU = torch.device("cpu")


def vgg19_layers() -> nn.Sequential:
    """Configuration E of Simonyan and Zisserman as torchvision lays it out: 16 convolutions, each with its ReLU."""
    layers: list[nn.Module] = []
    before = 3
    for width, count in ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)):
        for _ in range(count):
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(inplace=True)]
            before = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A stand-in for the package; ``made`` counts networks, ``file`` is where the weights would lie."""
    models: Any = types.ModuleType("torchvision.models")
    weights = types.SimpleNamespace(url="https://download.pytorch.org/models/vgg19-dcbb9e9d.pth")
    models.VGG19_Weights = types.SimpleNamespace(IMAGENET1K_V1=weights)
    models.made = 0

    def vgg19(*, weights: Any, progress: bool) -> Any:
        assert weights is models.VGG19_Weights.IMAGENET1K_V1
        models.made += 1
        torch.manual_seed(0)
        return types.SimpleNamespace(features=vgg19_layers())

    models.vgg19 = vgg19
    models.file = tmp_path / "checkpoints" / "vgg19-dcbb9e9d.pth"
    models.file.parent.mkdir()
    package: Any = types.ModuleType("torchvision")
    package.models = models
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    return models


def test_vgg19_of_torchvision(torchvision: Any) -> None:
    """Features after conv3_4 and its ReLU: 256 channels, a quarter of the side. Grey images are shown as photographs
    are: the same in three colours, less the photographs' mean, over their spread."""
    torchvision.file.touch()
    net = perceptual.local_vgg19()
    assert net is not None
    x = torch.rand(2, 1, 32, 24, requires_grad=True)
    out = net(x)
    assert out.shape == (2, 256, 8, 6)
    kinds = [type(m) for m in net.layers.children()]
    assert (kinds.count(nn.Conv2d), kinds[-1]) == (8, nn.ReLU)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    shown = torch.stack([(x[:, 0] - m) / s for m, s in zip(mean, std, strict=True)], dim=1)
    torch.manual_seed(0)
    assert torch.allclose(out, vgg19_layers()[:18](shown), atol=1e-6)
    assert not any(w.requires_grad for w in net.parameters())
    out.sum().backward()
    assert x.grad is not None
    assert float(x.grad.abs().sum()) > 0


def test_vgg19_is_never_downloaded(torchvision: Any) -> None:
    """Without the file of weights torchvision would fetch it: it is not even asked."""
    assert perceptual.local_vgg19() is None
    with pytest.raises(CryobenchError, match="VGG-19 is not on this machine"):
        Method(Method.config_for("smoke", features="vgg19")).fit(BlobData(), QUIET)
    assert torchvision.made == 0


def test_the_record_names_the_features(torchvision: Any) -> None:
    options = {"steps": 2, "feature_steps": 2}
    for wanted, at_hand, name in (("auto", True, "vgg19"), ("auto", False, "views"), ("views", True, "views")):
        torchvision.file.touch() if at_hand else torchvision.file.unlink(missing_ok=True)
        method = Method(Method.config_for("smoke", features=wanted, **options))
        method.fit(BlobData(), QUIET)
        assert method.info["features"] == name
        assert method.info["perceptual_weight"] > 0
    method = Method(Method.config_for("smoke", perceptual=0.0, **options))
    method.fit(BlobData(), QUIET)
    assert (method.info["features"], method.info["perceptual_weight"]) == ("none", 0)
    assert all(row[3] == 0 for row in method.info["parts"])
    with pytest.raises(CryobenchError, match="features must be"):
        Method(Method.config_for("smoke", features="alexnet")).fit(BlobData(), QUIET)


def test_views_are_told_apart() -> None:
    """Places of three blobs, turned and noisy: the partner is found far more often than blindly; a second training is
    the same training."""
    data = BlobData()

    def batch(step: int, n: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
        noisy, clean = data.batch(step, n, seed)
        return noisy[:, None], clean[:, None].clamp(0, 1)

    config = TrainConfig(steps=40, batch_size=32, learning_rate=5e-3, warmup=5, precision="float32")
    net, facts = perceptual.train_views(batch, config, QUIET, 0, CPU)
    assert facts["chance"] == pytest.approx(1 / 32, abs=1e-4)
    assert facts["accuracy"] > 5 * facts["chance"]
    assert facts["loss"][-1][1] < facts["loss"][0][1]
    assert not any(w.requires_grad for w in net.parameters())
    assert not net.training
    assert net(torch.rand(3, 1, 32, 20)).shape == (3, 32, 8, 5)
    again, _ = perceptual.train_views(batch, config, QUIET, 0, CPU)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


def test_turned_images() -> None:
    """What is the same in all directions stays the same, but for the noise of at most 0.1."""
    torch.manual_seed(0)
    grid = torch.arange(33) - 16
    disc = torch.exp(-(grid[:, None] ** 2 + grid[None] ** 2) / 50.0).expand(64, 1, 33, 33)
    error = perceptual.turned(disc) - disc
    assert 0.03 < float(error.std()) < 0.1
    assert float(error.mean(dim=0).abs().max()) < 0.05
    half = torch.zeros(64, 1, 33, 33)
    half[..., :16] = 1
    assert float(perceptual.turned(half)[:, 0, 16, 2].std()) > 0.3


def test_perceptual_term_has_its_share_of_the_gradient() -> None:
    """Beside L1 at the first step; measured here by the change of either term along its own gradient."""
    data, method = BlobData(), Method(Method.config_for("smoke", perceptual=0.2, feature_steps=2))
    model, batch = method.adversaries(data), method.batches(data)
    features, _ = method.features(model, batch, QUIET)
    weight = method.perceptual_weight(model, features, batch)
    noisy, clean = batch(0, method.config.batch_size, method.seed, CPU)
    made = model.generator(noisy).detach()

    def slope(term: Any) -> float:
        """Of a term at made, uphill."""
        x = made.clone().requires_grad_()
        (uphill,) = torch.autograd.grad(term(x), x)
        step = 1e-2 * uphill / uphill.norm()
        return float(term(made + step) - term(made - step)) / 2e-2

    l1 = slope(lambda x: 100 * F.l1_loss(model.scaled(x), model.scaled(clean)))
    assert slope(lambda x: weight * feature_distance(features, model, x, clean)) == pytest.approx(0.2 * l1, rel=0.05)


def test_discriminator_sees_the_noisy_image_too() -> None:
    model = Method(Method.config_for("smoke")).adversaries(BlobData())
    noisy, image = torch.randn(2, 4, 1, 32, 32)
    assert not torch.allclose(model.judge(noisy, image), model.judge(noisy.roll(1, 0), image))


def test_a_fit_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """The features are learned anew, and are the same; so is the result. What was before is not in the terms."""
    config = Method.config_for("smoke", steps=6, feature_steps=3)
    whole, parted = Method(config), Method(config)
    whole.fit(BlobData(), QUIET)
    checkpoint = tmp_path / "checkpoint.pt"
    with pytest.raises(BudgetSpent):
        parted.fit(BlobData(), Budget(seconds=0.0, checkpoint=checkpoint, progress=False))
    parted.fit(BlobData(), Budget(checkpoint=checkpoint, progress=False))
    assert all(torch.equal(whole.state[k], parted.state[k]) for k in whole.state)
    assert whole.info["parts"][1:] == parted.info["parts"]
    assert whole.info["perceptual_weight"] == parted.info["perceptual_weight"]


def test_beats_the_noise_and_a_scaled_copy() -> None:
    data = BlobData()
    method = Method(Method.config_for("smoke"))
    method.fit(data, QUIET)
    clean, noisy = data._images(64, seed=77)
    error = (method.denoise(noisy, data.sigma) - clean).square().mean()
    shrink = float(((clean - clean.mean()) * (noisy - noisy.mean())).sum() / (noisy - noisy.mean()).square().sum())
    best_scaled = (noisy.mean() + shrink * (noisy - noisy.mean()) - clean).square().mean()
    assert error < 0.5 * best_scaled
    assert method.info["part_names"] == ["adversarial", "L1", "perceptual"]
    first, last = method.info["parts"][0], method.info["parts"][-1]
    assert last[2] < first[2]
    assert last[3] < first[3]
