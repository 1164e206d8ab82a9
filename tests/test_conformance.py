"""What every method keeps, whoever wrote it. A new file in cryobench/methods is tested here by being there."""

import inspect
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cryobench.errors import CryobenchError, SupervisionError
from cryobench.imaging.particles import Particles, Simulation, Simulator
from cryobench.imaging.training_data import SUPERVISION, TrainingData
from cryobench.methods.base import Budget, Denoiser
from cryobench.methods.learned import Learned
from cryobench.methods.registry import all_methods

METHODS = all_methods()
QUIET = Budget(progress=False)
SIZE = 32
every_method = pytest.mark.parametrize("name", METHODS)
trained = pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.trained])


@cache
def simulator() -> Simulator:
    """Five blobs of different widths, without symmetry."""
    generator = torch.Generator().manual_seed(0)
    grid = torch.arange(SIZE) - SIZE // 2
    z, y, x = torch.meshgrid(grid, grid, grid, indexing="ij")
    volume = torch.zeros(SIZE, SIZE, SIZE)
    for k, place in enumerate(torch.rand(5, 3, generator=generator) * 12 - 6):
        squared = (z - place[0]) ** 2 + (y - place[1]) ** 2 + (x - place[2]) ** 2
        volume += torch.exp(-squared / (2 * (1.0 + 0.4 * k) ** 2))
    return Simulator(volume, Simulation(SIZE, pixel_size=4.0, snr=0.3))


@cache
def particles() -> Particles:
    return simulator().simulate(64, seed=0)


def data(supervision: str) -> TrainingData:
    return TrainingData.simulated(supervision, particles(), simulator())


def tiny(supervision: str) -> TrainingData:
    """Eight images and nothing beyond what the supervision allows: clean ones, the structure, only where it does."""
    part, _ = particles().split(8)
    level = SUPERVISION.index(supervision)
    second, _ = simulator().noisy(part.clean, 5, part.sigma)
    clean = part.clean if level >= SUPERVISION.index("clean-pairs") else None
    pairs = second if level >= SUPERVISION.index("noisy-pairs") else None
    reference = data("reference").reference if supervision == "reference" else None
    return TrainingData(supervision, part.noisy, clean, part.sigma, 4.0, second=pairs, reference=reference)


def new(name: str, **options: object) -> Denoiser:
    return METHODS[name](METHODS[name].config_for("smoke", **options), seed=1)


@cache
def fitted(name: str) -> Denoiser:
    method = new(name)
    method.fit(data(method.supervision), QUIET)
    return method


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_there_are_methods() -> None:
    assert {"noisy", "gaussian", "dncnn"} <= METHODS.keys()


@every_method
def test_says_what_it_is(name: str) -> None:
    method = METHODS[name]
    assert method.name == name
    assert method.supervision in SUPERVISION
    assert method.__doc__
    assert inspect.getmodule(method).__doc__
    assert list(inspect.signature(method.denoise).parameters) == ["self", "images", "sigma", *["ctf"] * method.uses_ctf]
    for profile in ("smoke", "quick", "full"):
        method.config_for(profile)


@every_method
@pytest.mark.parametrize("shape", [(3, SIZE, SIZE), (1, SIZE, SIZE), (2, 33, 33), (2, 40, 27), (1, 19, 64)], ids=str)
def test_keeps_shape_and_input(name: str, shape: tuple[int, ...]) -> None:
    images = noise(*shape) + 0.5
    before = images.clone()
    out = fitted(name).denoise(images, 1.0)
    assert out.shape == shape
    assert out.dtype == torch.float32
    assert torch.isfinite(out).all()
    assert torch.equal(images, before), "the caller's images were changed"
    assert torch.isfinite(fitted(name).denoise(images)).all(), "without sigma it is to be estimated"


@every_method
@pytest.mark.parametrize(("scale", "shift"), [(40.0, 0.0), (1.0, 7.0), (0.03, -0.2)])
def test_equivariance(name: str, scale: float, shift: float) -> None:
    method = fitted(name)
    part = particles()
    images = part.noisy[:4]
    out = method.denoise(images, part.sigma) * scale + shift
    other = method.denoise(images * scale + shift, part.sigma * scale)
    same = bool((other - out).square().mean().sqrt() < 1e-2 * out.std())
    if METHODS[name].equivariant:
        assert same
    elif same:
        # a method may be declared not equivariant for one of the two reasons only: scale, or shift
        both = method.denoise(images * 5 + 3, part.sigma * 5) - (method.denoise(images, part.sigma) * 5 + 3)
        assert both.square().mean().sqrt() > 1e-2 * 5 * images.std(), "declare it equivariant: it is"


@every_method
def test_without_noise_it_stays_finite(name: str) -> None:
    clean = particles().clean[:2]
    for sigma in (0.0, 1e-9):
        assert torch.isfinite(fitted(name).denoise(clean, sigma)).all()
        assert torch.isfinite(fitted(name).denoise(torch.full((2, SIZE, SIZE), 0.25), sigma)).all()
    assert torch.isfinite(fitted(name).denoise(torch.zeros(1, SIZE, SIZE))).all()


@every_method
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refuses_values_that_are_not_numbers(name: str, value: float) -> None:
    images = noise(2, SIZE, SIZE)
    images[1, 3, 4] = value
    with pytest.raises(CryobenchError, match="NaN"):
        fitted(name).denoise(images, 1.0)


@every_method
def test_refuses_other_shapes(name: str) -> None:
    with pytest.raises(CryobenchError, match="shape"):
        fitted(name).denoise(torch.zeros(SIZE, SIZE), 1.0)


@every_method
def test_saved_and_loaded_it_gives_the_same(name: str, tmp_path: Path) -> None:
    images = particles().noisy[:4]
    fitted(name).save(tmp_path / "weights")
    loaded = METHODS[name].load(tmp_path / "weights.safetensors")
    assert loaded.config == fitted(name).config
    assert torch.equal(loaded.denoise(images, 0.3), fitted(name).denoise(images, 0.3))


@every_method
def test_needs_no_more_than_it_declares(name: str) -> None:
    new(name).fit(tiny(METHODS[name].supervision), QUIET)


@trained
def test_cannot_learn_from_less_than_it_declares(name: str) -> None:
    for level in SUPERVISION[: SUPERVISION.index(METHODS[name].supervision)]:
        with pytest.raises(SupervisionError):
            new(name).fit(data(level), QUIET)


@trained
def test_learns_from_images_of_any_size(name: str) -> None:
    """Odd and not square; ``cwf``, ``em3d`` and the search for a reference's views need squares."""
    supervision = METHODS[name].supervision
    square = name in ("cwf", "em3d") or supervision == "reference"
    clean = torch.nn.functional.pad(particles().clean[:8], (2, 1 if square else 7, 1, 2))
    first, second = (clean + 0.3 * noise(*clean.shape, seed=k) for k in range(2))
    reference = data("reference").reference if supervision == "reference" else None
    steps = {"steps": 3} if hasattr(METHODS[name].Config(), "steps") else {}
    method = new(name, **steps)
    method.fit(TrainingData(supervision, first, clean, 0.3, 4.0, second=second, reference=reference), QUIET)
    assert torch.isfinite(method.denoise(first, 0.3)).all()


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if issubclass(m, Learned) and n != "sr3"])
def test_sees_no_farther_than_its_margin(name: str) -> None:
    """What lies beyond, an empty field or another particle, changes nothing. (sr3 has the U-Net of the others.)"""
    method = new(name)
    assert isinstance(method, Learned)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = method.network().eval()
        for weight in net.parameters():
            torch.nn.init.normal_(weight, 0.0, 0.3)  # some start at zero, and would hide what they see
        block = method.multiple
        side = block * (2 * (method.margin // block) + 5)
        images = torch.randn(4, 1, side, side, requires_grad=True)
    first = block * (side // block // 2)
    part = slice(first, first + block)
    (gradient,) = torch.autograd.grad(net(images)[:, 0, part, part].sum(), images)
    seen = gradient.abs().sum((0, 1)).nonzero()
    farthest = max(first - int(seen.min()), int(seen.max()) - first - block + 1)
    assert farthest <= method.margin < 1.5 * farthest + block


@trained
def test_one_seed_one_result(name: str) -> None:
    again = new(name)
    torch.rand(7)  # the caller's own use of randomness changes nothing
    again.fit(data(again.supervision), QUIET)
    first = fitted(name)
    assert again.state.keys() == first.state.keys()
    assert again.state, "a trained method keeps what it learned in state"
    assert all(torch.equal(again.state[k], first.state[k]) for k in first.state)


@trained
def test_loss_goes_down_on_few_images(name: str) -> None:
    method = new(name)
    method.fit(tiny(method.supervision), QUIET)
    curve = method.info.get("loss", [])
    if not curve or len(curve[0]) != 2:
        pytest.skip("no single loss to go down")
    part = max(1, len(curve) // 5)
    first, last = (sum(row[1] for row in rows) / part for rows in (curve[:part], curve[-part:]))
    # a noisy target keeps its noise: the loss of the best answer is 1 in units of it, that of a bad one not much more
    assert last < (0.95 if METHODS[name].supervision in ("noisy-pairs", "reference") else 0.9) * first


@trained
def test_overfits_eight_images(name: str) -> None:
    """With the answers to be had, it learns eight images by heart: better on them than on eight others."""
    if METHODS[name].supervision != "clean-pairs" or not hasattr(METHODS[name].Config(), "steps"):
        pytest.skip("it has no answers to learn by heart")
    lengths = {k: 4 * v for k, v in vars(new(name).config).items() if k in ("steps", "post_steps")}
    method = new(name, **lengths)
    method.fit(tiny("clean-pairs"), QUIET)
    part = particles()

    def error(chosen: slice) -> float:
        return float((method.denoise(part.noisy[chosen], part.sigma) - part.clean[chosen]).square().mean())

    assert error(slice(0, 8)) < 0.85 * error(slice(8, 16))
    assert error(slice(0, 8)) < 0.2 * float(part.clean.var())
