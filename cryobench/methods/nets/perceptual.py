"""Feature networks for a perceptual loss: VGG-19 where it is at hand, otherwise one trained here on projections.

Simonyan and Zisserman, "Very deep convolutional networks for large-scale image recognition", 2015, trained on
photographs; its weights (548 MB) are used where torchvision and the file are on this machine already, and are never
downloaded. The other network learns from clean projections alone, without their poses, to tell views apart: of a batch
of particles, each turned in the plane by a random angle and slightly noisy, it must find the same particle turned and
noisy in another way (Chen et al. 2020, "A simple framework for contrastive learning"). To do so it must see what
tells viewing directions apart, that is the structure. (To guess by how much an image was turned, a common task on
photographs, cannot be learned here: a turned projection is a projection like any other.)
"""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cryobench.errors import CryobenchError
from cryobench.methods.base import Budget
from cryobench.methods.training import Batch, TrainConfig, seeded
from cryobench.methods.training import train as run_training

#: layers of torchvision's VGG-19 up to the activation after conv3_4, where a feature sees 48 pixels
VGG_LAYERS = 18
#: mean and standard deviation of the photographs that VGG-19 was trained on
VGG_MEAN, VGG_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TEMPERATURE = 0.1


class Vgg(nn.Module):
    """Images (n, 1, h, w) in [0, 1] -> features of VGG-19 (n, 256, h / 4, w / 4), fixed."""

    mean: Tensor
    std: Tensor

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(VGG_MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(VGG_STD)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        colours = x.expand(-1, 3, -1, -1)
        return torch.as_tensor(self.layers((colours - self.mean) / self.std))


class Views(nn.Module):
    """Images (n, 1, h, w) in [0, 1], sides multiples of 4 -> features (n, 2 width, h / 4, w / 4); :meth:`embed` is
    what is trained."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(4, width, 3, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.LeakyReLU(0.2),
        )  # fmt: skip
        # All projections are a bright blob on a dark ground. The normalisation takes out what they share; without it
        # all embeddings start as one, and stay so.
        self.head = nn.Sequential(
            nn.Conv2d(2 * width, 4 * width, 4, stride=2, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(4 * width, 4 * width, 3, padding=1), nn.LeakyReLU(0.2),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4 * width, affine=False),
            nn.Linear(4 * width, 2 * width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.layers(x))

    def embed(self, x: Tensor) -> Tensor:
        """Unit vectors (n, 2 width): near to each other for one view, whatever its turn in the plane."""
        return F.normalize(torch.as_tensor(self.head(self(x))).float(), dim=1)


def turned(images: Tensor) -> Tensor:
    """Images (n, 1, h, w) in [0, 1], each turned by a random angle, with white noise of up to 0.1."""
    angle = torch.rand(len(images), device=images.device) * 2 * math.pi
    cosine, sine, none = angle.cos(), angle.sin(), torch.zeros_like(angle)
    matrix = torch.stack([cosine, -sine, none, sine, cosine, none], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    out = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return out + 0.1 * torch.rand(len(images), 1, 1, 1, device=images.device) * torch.randn_like(out)


def similarity(net: Views, images: Tensor) -> Tensor:
    """(n, n) cosines between the images turned one way (rows) and turned another way (columns)."""
    return net.embed(turned(images)) @ net.embed(turned(images)).T


def view_loss(net: Views, _: Tensor, images: Tensor) -> Tensor:
    """Cross entropy of choosing each image's partner among the batch, from either side."""
    logits = similarity(net, images).float() / TEMPERATURE
    partner = torch.arange(len(images), device=images.device)
    return 0.5 * (F.cross_entropy(logits, partner) + F.cross_entropy(logits.T, partner))


def train_views(
    batch: Batch, config: TrainConfig, budget: Budget, seed: int, device: torch.device, width: int = 16
) -> tuple[Views, dict[str, Any]]:
    """The network trained on the targets of ``batch`` (clean images in [0, 1]), fixed; and facts about it:
    ``accuracy``, how often a partner is found in a batch never seen, ``chance`` of finding it blindly, the loss
    curve, seconds. A killed fit trains it anew: it takes seconds, and a seed gives one result."""
    with seeded(seed, device):
        net = Views(width).to(device)
    facts = run_training(net, batch, view_loss, config, Budget(progress=budget.progress), seed, device, "features")
    net.eval().requires_grad_(False)
    _, images = batch(config.steps, config.batch_size, seed, device)
    with seeded(seed, device), torch.no_grad():
        found = similarity(net, images).argmax(1) == torch.arange(len(images), device=device)
    return net, {
        "name": "views", "accuracy": round(float(found.float().mean()), 4), "chance": round(1 / len(images), 4),
        "loss": facts["loss"], "seconds": facts["seconds"],
    }  # fmt: skip


def local_vgg19() -> Vgg | None:
    """VGG-19 with ImageNet weights, or None where torchvision or the file of weights is not on this machine.

    The file is looked for where torch.hub keeps its downloads (``TORCH_HOME``); nothing is downloaded.
    """
    try:
        models: Any = importlib.import_module("torchvision.models")
    except ImportError:
        return None
    weights = models.VGG19_Weights.IMAGENET1K_V1
    if not (Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name).exists():
        return None
    return Vgg(models.vgg19(weights=weights, progress=False).features[:VGG_LAYERS])


def feature_network(
    wanted: str, batch: Batch, config: TrainConfig, budget: Budget, seed: int, device: torch.device
) -> tuple[nn.Module, dict[str, Any]]:
    """The fixed feature network, "vgg19", "views" or "auto" (the first where it is at hand), and facts about it.

    Raises CryobenchError for another name, and for "vgg19" where it is not at hand.
    """
    if wanted not in ("auto", "vgg19", "views"):
        raise CryobenchError(f'features must be "auto", "vgg19" or "views", not {wanted!r}')
    vgg = None if wanted == "views" else local_vgg19()
    if vgg is not None:
        return vgg.to(device), {"name": "vgg19"}
    if wanted == "vgg19":
        raise CryobenchError(
            "VGG-19 is not on this machine: install torchvision and let torchvision.models.vgg19 fetch its weights "
            "once, or use features=views"
        )
    return train_views(batch, config, budget, seed, device)
