"""The unpaired GAN: what keeps the pairs apart, what ties the output to the input; and what both Tang GANs share."""

import pytest
import torch
from blobs import BlobData
from torch import Tensor

from cryobench.imaging.noise import coloured_noise, ice_spectrum
from cryobench.imaging.rings import ring_sums
from cryobench.methods.base import Budget
from cryobench.methods.gan import Method, noise_filter, split_noise, unpaired
from cryobench.methods.nets.tang_gan import Discriminator, Generator
from cryobench.methods.tang_gan import Adversaries, Parts

QUIET = Budget(progress=False)
CPU = torch.device("cpu")


def test_generator_counted_by_hand() -> None:
    """7 x 7 into w channels, two strided 3 x 3, b residual blocks of two 3 x 3, two 4 x 4 up, 7 x 7 out; BN: 2 a
    channel; a bias in the last one only."""
    w, b, p = 6, 3, 2
    convolutions = 49 * p**2 * w + 9 * w * 2 * w + 9 * 2 * w * 4 * w
    residuals = b * 2 * (9 * (4 * w) ** 2 + 2 * 4 * w)
    up = 16 * 4 * w * 2 * w + 16 * 2 * w * w
    norms = 2 * (w + 2 * w + 4 * w) + 2 * (2 * w + w)
    net = Generator(w, b, p)
    assert sum(x.numel() for x in net.parameters()) == convolutions + residuals + up + norms + 49 * w * p**2 + p**2
    assert net(torch.randn(2, 1, 5 * net.multiple, 3 * net.multiple)).shape == (2, 1, 40, 24)


def test_discriminator_has_five_convolutions() -> None:
    net = Discriminator(2, 4)
    convolutions = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [m.in_channels for m in convolutions] == [2, 4, 8, 16, 32]
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in net.modules()) == 3
    assert net(torch.randn(3, 2, 64, 32)).shape == (3, 1, 8, 4)


def test_discriminator_sees_the_clean_range_as_one() -> None:
    model = Adversaries(Generator(2, 1, 1), Discriminator(1, 2), low=-0.5, high=3.5)
    assert model.scaled(torch.tensor([-0.5, 1.5, 3.5])).tolist() == [-1, 0, 1]


def test_parts_of_a_loss() -> None:
    """Five steps in at most two rows; the first step was computed by another process."""
    parts = Parts(5, ("a", "b"))
    batch = parts.watch(lambda step, n, seed, device: (torch.zeros(n), torch.zeros(n)))
    for step in range(1, 5):
        batch(step, 2, 0, CPU)
        parts.note(torch.tensor(float(step)), torch.tensor(10.0 * step))
    assert parts.curve(most=2) == [[3, 1.5, 15.0], [5, 3.5, 35.0]]
    assert len(parts.curve()) == 4


def test_no_clean_image_meets_its_noisy_one() -> None:
    def batch(step: int, n: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
        return torch.full((n,), step), torch.full((n,), step)

    seen = [unpaired(batch)(step, 2, 0, CPU) for step in range(20)]
    inputs = {int(v) for source, _ in seen for v in source}
    targets = {int(v) for _, target in seen for v in target}
    assert not inputs & targets
    assert len(inputs) == len(targets) == 20


class Poisoned(BlobData):
    """The clean images of the inputs are wrong; nothing may depend on them."""

    def batch(self, step: int, batch_size: int, seed: int, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
        noisy, clean = super().batch(step, batch_size, seed, device)
        return noisy, clean * float("nan") if step % 2 == 0 else clean


def test_the_answers_are_never_looked_at() -> None:
    states = []
    for data in (BlobData(), Poisoned()):
        method = Method(Method.config_for("smoke", steps=3))
        method.fit(data, QUIET)
        states.append(method.state)
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


@pytest.mark.parametrize("kind", ["white", "coloured"])
def test_noise_is_estimated_from_the_corners(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    spectrum = ice_spectrum(48, 48) if kind == "coloured" else torch.ones(48, 25, dtype=torch.float64)
    noise = 0.3 * coloured_noise((200, 48, 48), spectrum, generator)
    noise[:, 14:34, 14:34] += 5.0  # a particle in the middle changes nothing
    found = noise_filter(noise, (48, 48)).square().double()
    assert float((found / spectrum - 1).abs().mean()) < 0.1


def test_noise_is_split_into_independent_halves() -> None:
    """On noise alone: y1 + alpha^2 y2 = (1 + alpha^2) y; variances 1 + alpha^2 and 1 + 1 / alpha^2; no ring of one is
    correlated with that of the other."""
    torch.manual_seed(0)
    alpha, root = 0.7, ice_spectrum(32, 32).sqrt().float()
    noise = coloured_noise((3000, 32, 32), root.double() ** 2)[:, None]
    first, second = split_noise(noise, root, alpha)
    assert torch.allclose(first + alpha**2 * second, (1 + alpha**2) * noise, atol=1e-5)
    assert float(first.var()) == pytest.approx(1 + alpha**2, rel=0.02)
    assert float(second.var()) == pytest.approx(1 + alpha**-2, rel=0.02)
    a, b = torch.fft.rfft2(first[:, 0]), torch.fft.rfft2(second[:, 0])
    rings = [ring_sums(v.sum(0), (32, 32)) for v in ((a * b.conj()).real, a.abs() ** 2, b.abs() ** 2)]
    correlation = rings[0] / (rings[1] * rings[2]).sqrt()
    assert float(correlation.abs().max()) < 0.07  # 3000 images; ring 0 has one coefficient each
    assert float(correlation[3:].abs().max()) < 0.02


def test_split_noise_teaches_what_the_clean_image_would() -> None:
    """The best linear guess of y2 from y1, and of the clean x from y1, have one slope: s / (s + 1 + alpha^2)."""
    torch.manual_seed(1)
    alpha, power = 0.7, 0.8
    clean = power**0.5 * torch.randn(400, 1, 32, 32)
    first, second = split_noise(clean + torch.randn_like(clean), torch.ones(32, 17), alpha)
    for target in (second, clean):
        slope = float((first * target).sum() / first.square().sum())
        assert slope == pytest.approx(power / (power + 1 + alpha**2), abs=0.01)


def test_beats_the_noise_and_a_scaled_copy() -> None:
    data = BlobData()
    method = Method(Method.config_for("smoke"))
    method.fit(data, QUIET)
    clean, noisy = data._images(64, seed=77)
    error = (method.denoise(noisy, data.sigma) - clean).square().mean()
    shrink = float(((clean - clean.mean()) * (noisy - noisy.mean())).sum() / (noisy - noisy.mean()).square().sum())
    best_scaled = (noisy.mean() + shrink * (noisy - noisy.mean()) - clean).square().mean()
    assert error < 0.6 * best_scaled
    info = method.info
    assert info["part_names"] == ["split noise", "adversarial"]
    assert len(info["parts"][0]) == 3
    assert info["parts"][-1][1] > 1 + 1 / method.config.split**2  # no less than the noise of the target
