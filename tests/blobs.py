"""A stand-in for TrainingData that needs no simulator: blob images, white noise, any supervision."""

import torch
from torch import Tensor


class BlobData:
    """Two or three Gaussian blobs at random places; batches are pure functions of (seed, step)."""

    pixel_size = 4.0
    supervision = "clean-pairs"

    def __init__(self, size: int = 32, sigma: float = 0.3) -> None:
        self.size, self.sigma = size, sigma
        self.clean, self.noisy = self._images(16, 10**6)

    def _images(self, n: int, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        place = (torch.rand(n, 3, 2, generator=generator) * 0.5 + 0.25) * self.size
        grid = torch.arange(self.size, dtype=torch.float32)
        profile = torch.exp(-((grid - place[..., None]) ** 2) / (2 * (self.size / 12) ** 2))
        clean = torch.einsum("nky,nkx->nyx", profile[:, :, 0], profile[:, :, 1])
        return clean, clean + self.sigma * torch.randn(clean.shape, generator=generator)

    def require(self, level: str) -> None:
        """Everything is allowed."""

    def batch(self, step: int, batch_size: int, seed: int, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
        clean, noisy = self._images(batch_size, seed * 100_003 + step)
        return noisy.to(device), clean.to(device)
