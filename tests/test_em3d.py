"""Expectation-maximisation from noisy images alone, piece by piece and whole, against what is known otherwise."""

import math
from pathlib import Path

import pytest
import torch
from test_bayes import blobs, simulated
from test_bayes import denoised as best_denoised
from test_em_poses import Known, best_modes, generator, nearest_error, turn_vector
from torch import Tensor

from cryobench.errors import CryobenchError
from cryobench.imaging.ctf import ContrastTransfer, Optics
from cryobench.imaging.particles import Particles, Simulator
from cryobench.imaging.projection import Projector
from cryobench.imaging.rotations import random_rotations, symmetry_matrices
from cryobench.imaging.slices import SliceTable, resized
from cryobench.imaging.training_data import TrainingData
from cryobench.methods.base import Budget
from cryobench.methods.em3d import Method, ring_power
from cryobench.methods.em_align import Move, align, to_axes
from cryobench.methods.em_classes import classify, worth
from cryobench.methods.em_filter import GHOSTS, local_wiener
from cryobench.methods.em_fit import volume_of_poses
from cryobench.methods.em_mean import mean_slices
from cryobench.methods.em_poses import Frame, Views
from cryobench.methods.em_refine import Collector, combine
from cryobench.methods.em_start import Annealing, GridEM
from cryobench.methods.registry import get_method
from cryobench.methods.training import BudgetSpent


def decibels(out: Tensor, particles: Particles) -> float:
    """Gain of ``out`` over the noisy images."""
    clean = particles.clean
    return 10 * math.log10(float((particles.noisy - clean).square().mean() / (out - clean).square().mean()))


@pytest.mark.parametrize("size", [32, 33])
def test_local_wiener_keeps_what_the_halves_share(size: int) -> None:
    truth = blobs(size)
    # as strong as the signal where it is, white
    noise = 0.5 * torch.randn(2, size, size, size, generator=generator(2))
    first, second = truth + noise
    whole, *halves = local_wiener(first, second)

    def error(volume: Tensor) -> float:
        return float((volume - truth).square().sum())

    assert error(whole) < 0.01 * error((first + second) / 2)
    for half, raw in zip(halves, (first, second), strict=True):
        assert 1.1 * error(whole) < error(half) < 0.006 * error(raw)
    # of noise nothing is left, neither in the whole nor in the halves, which would find each other in it
    for blank, bound in zip(local_wiener(*noise), (2e-4, 1e-4, 1e-4), strict=True):
        assert float(blank.square().mean()) < bound * float(noise.square().mean())
    # a part as large as a half counts as one, a smaller one less
    same, less = (local_wiener(first, second, [first], share)[3] for share in (1.0, 0.25))
    assert torch.equal(same, halves[0])
    assert float(less.norm()) < 0.98 * float(same.norm())
    for volume in local_wiener(truth, truth.clone()):
        inside = torch.fft.fftfreq(size)
        kept = (inside[:, None, None] ** 2 + inside[:, None] ** 2 + inside**2) <= 0.25
        expected = torch.fft.ifftn(torch.fft.fftn(truth) * kept).real
        assert float((volume - expected).norm()) < GHOSTS**0.5 * float(truth.norm())


def placed(size: int, centres: Tensor, sigma: float = 2.0) -> Tensor:
    """Gaussian blobs at centres (n, 3), x, y, z; each is a little weaker than the one before."""
    axis = torch.arange(size, dtype=torch.float64) - size // 2
    x, y, z = (torch.exp(-((axis - c[:, None]) ** 2) / (2 * sigma**2)) for c in centres.double().T)
    return torch.einsum("b,bz,by,bx->zyx", 0.93 ** torch.arange(len(centres)).double(), z, y, x).float()


def scattered(size: int, n: int = 7) -> Tensor:
    return (torch.rand(n, 3, generator=generator(5), dtype=torch.float64) - 0.5) * 0.5 * size


@pytest.mark.parametrize(
    ("size", "mirrored", "shift"), [(24, False, False), (25, True, False), (25, False, True), (24, True, True)]
)
def test_align_recovers_the_move(size: int, mirrored: bool, shift: bool) -> None:
    centres, turn = scattered(size), random_rotations(1, generator(6))[0].double()
    moved = centres @ turn.T + (torch.tensor([1.5, -2.0, 1.0]) if shift else 0)  # first at p, second at turn p + shift
    if mirrored:
        moved = moved * torch.tensor([-1.0, 1, 1])
    first, second = placed(size, centres), placed(size, moved)
    move = align(first, second, 8.0, 15.0, shift)
    assert move.mirrored == mirrored
    assert move.correlation > 0.995
    assert float(turn_vector((move.turn.double() @ turn.T)[None]).norm().rad2deg()) < 0.7
    back = move.apply(second)
    assert float((back - first).norm() / first.norm()) < 0.1


@pytest.mark.parametrize(("group", "size"), [("C4", 24), ("D2", 21)])
def test_to_axes_finds_the_symmetry(group: str, size: int) -> None:
    elements = symmetry_matrices(group)
    turn = random_rotations(1, generator(7))[0].double()
    few = scattered(size, 3)
    volume = sum(placed(size, few @ s.T @ turn.T) for s in elements) / len(elements)
    axes, likeness = to_axes(volume, elements.float(), 5.0, 18.0)
    assert likeness > 0.98
    # the axes, up to what turns the group's axes into themselves: views of the turned object are equal
    found = Move(axes, torch.zeros(3), False, 1.0).apply(volume)
    views = random_rotations(4, generator(8))
    seen = (
        Projector(found).project((elements.float()[:, None] @ views).flatten(0, 1)).view(len(elements), 4, size, size)
    )
    assert float((seen - seen[:1]).norm() / seen.norm()) < 0.06
    asymmetric = placed(size, scattered(size))
    assert to_axes(asymmetric, elements.float(), 5.0, 18.0)[1] < 0.93


def test_views_junk_and_empty_boxes_are_told_apart() -> None:
    size, n = 24, 20
    known = Known(size, 0.5, n)
    sigma, offset = known.particles.sigma, known.particles.offset
    power = ring_power(known.simulator.volume * known.particles.scale, known.frame)
    amplitude = power.sqrt()[known.frame.radius.round().long()] / size  # a field of white noise has size^2
    field = known.frame.images(known.frame.transform(torch.randn(n, size, size, generator=generator(9))) * amplitude)
    noise = sigma * torch.randn(2, n, size, size, generator=generator(10))
    stacks = [known.particles.noisy - offset, field + noise[0], noise[1]]
    for right, images in zip(("view", "junk", "empty"), stacks, strict=True):
        views = known.of(images)
        _, evidence = mean_slices(known.climber, views, known.climber.run(views))
        kinds = classify(views, evidence, power, volume_of_poses(1, 0.0))
        torch.testing.assert_close(kinds.view + kinds.junk + kinds.empty, torch.ones(n))
        assert float((getattr(kinds, right) > 0.9).float().mean()) >= 0.95
    # what junk shows is filtered as Wiener would
    kept = known.frame.images(classify(known.of(stacks[1]), evidence, power, 1.0).filtered)
    assert float((kept - field).square().mean()) < 0.4 * float(noise[0].square().mean())


def test_what_counts_while_the_volume_takes_shape() -> None:
    n, noise = 101, torch.randn(101, generator=generator(13))
    faint = worth(noise - 2)  # views that junk explains about as well
    assert float(faint.min()) > 0.5
    crude = worth(50 * noise - 300)  # much signal, and a volume that fits none of the views
    assert float(crude.mean()) > 0.99
    mixed = worth(torch.cat([5 * noise + 100, -200 + 5 * noise[: n // 5]]))
    assert float(mixed[:n].min()) > 0.99
    assert float(mixed[n:].max()) < 0.01


def test_no_fold_is_in_its_own_reference() -> None:
    """Slices of one volume and noise, the poses known: what is special to a fold is missing in its reference."""
    size, n, folds = 16, 400, 4
    frame, rotations = Frame(size), random_rotations(n, generator(14))
    slices = SliceTable(blobs(size)).sample(rotations, frame.points)
    slices += torch.view_as_complex(torch.randn(*slices.shape, 2, generator=generator(15))) * float(
        slices[:, 1:].abs().std()
    )
    parts = []
    for k in range(2 * folds):
        parts.append(Collector(frame, "C1"))
        parts[-1].insert(
            slices[k :: 2 * folds], torch.ones_like(slices[k :: 2 * folds].real), rotations[k :: 2 * folds]
        )
    halves = combine(parts[:folds], parts[folds:])
    for half, own in ((0, parts[:folds]), (1, parts[folds:])):
        alone = torch.stack([part.volume() for part in own])
        references = torch.stack(halves.references[half])
        special, seen = alone - alone.mean(0), references - references.mean(0)
        match = torch.nn.functional.cosine_similarity(special.flatten(1), seen.flatten(1))
        assert float(match.max()) < -0.3, match


@pytest.mark.parametrize("snr", [0.5, 8.0])
def test_first_volumes_are_the_particle(snr: float) -> None:
    """From two seeds, in whatever orientation and hand."""
    simulator, particles = simulated(32, snr, 300)
    views = Views.of(Frame(32), particles.noisy - particles.offset, torch.tensor(particles.sigma))
    annealing = Annealing(band=6.0, spacing=24.0, rate=0.85)
    for seed in (0, 1):
        volume, evidence = GridEM(views, annealing, generator(seed)).run()
        truth = resized(simulator.volume * particles.scale, len(volume))
        assert align(truth, volume, 6.0, 15.0).correlation > 0.95
        assert evidence > 0


QUICK = {
    "starts": 1,
    "settling": 4,
    "iterations": 2,
    "spacing": 15.0,
    "start_spacing": 24.0,
    "start_band": 6.0,
    "cooling": 0.85,
    "modes": 4,
}


def data(simulator: Simulator, particles: Particles) -> TrainingData:
    return TrainingData.simulated("noisy", particles, simulator)


SMALL = {"start_spacing": 30.0, "start_band": 5.0}


def fitted(train: TrainingData, budget: Budget | None = None, **options: object) -> Method:
    method = Method(Method.config_for("full", **{**QUICK, **options}), seed=3)
    method.fit(train, budget or Budget(progress=False))
    return method


@pytest.fixture(scope="module")
def whole() -> tuple[Simulator, Particles, Method]:
    simulator, particles = simulated(32, 0.3, 400)
    return simulator, particles, fitted(data(simulator, particles))


def test_denoises_nearly_as_if_the_structure_were_known(whole: tuple[Simulator, Particles, Method]) -> None:
    simulator, particles, method = whole
    some, _ = particles.split(60)
    gain = decibels(method.denoise(some.noisy, some.sigma), some)
    filters = [get_method(name)().denoise(some.noisy, some.sigma) for name in ("gaussian", "lowpass")]
    best = decibels(best_denoised(simulator, some)[0], some)
    # measured: 21.9 dB; Gaussian 12.8, low-pass 12.6, bayes 25.0
    assert gain > max(decibels(out, some) for out in filters) + 7
    assert best - 3.9 < gain < best + 0.2
    # images that it never saw
    drawn, *_ = simulator.draw(60, seed=9)
    clean = drawn * particles.scale + particles.offset
    noisy = clean + particles.sigma * torch.randn(clean.shape, generator=generator(12))
    error = float((method.denoise(noisy, particles.sigma) - clean).square().mean())
    assert 10 * math.log10(particles.sigma**2 / error) > gain - 1
    assert method.info["reach"] >= 5
    assert method.info["classes"]["view"] > 0.99
    assert method.classes.shape == (60, 3)


def test_poses_are_those_of_the_particles(whole: tuple[Simulator, Particles, Method]) -> None:
    """Up to the orientation and hand of the volume, which images do not say."""
    simulator, particles, method = whole
    found = best_modes(method.poses, len(particles))
    move = align(simulator.volume * particles.scale, method.state["volume"], 6.0, 15.0)
    truth = move.turn @ particles.rotations
    if move.mirrored:  # mirrored along x it shows the same as the view from behind
        truth = torch.diag(torch.tensor([-1.0, 1, 1])) @ truth @ torch.diag(torch.tensor([1.0, 1, -1]))
    error = nearest_error(found.rotations, truth, symmetry_matrices("C1")).norm(dim=1).rad2deg()
    assert float(error.median()) < 10
    assert float((error < 30).float().mean()) > 0.85
    assert sorted(method.subset.unique().tolist()) == [1, 2]


def test_killed_again_and_again_it_gives_the_same(whole: tuple[Simulator, Particles, Method], tmp_path: Path) -> None:
    """And so does the same seed."""
    simulator, particles, method = whole
    train, kills = data(simulator, particles), 0
    while True:
        try:
            again = fitted(train, Budget(seconds=0, checkpoint=tmp_path / "fit", progress=False))
            break
        except BudgetSpent:
            kills += 1
            assert kills < 20
    assert kills >= 3
    for key, value in method.state.items():
        torch.testing.assert_close(again.state[key], value, rtol=1e-4, atol=1e-4 * float(value.abs().max()))
    assert again.info["fsc"] == pytest.approx(method.info["fsc"], abs=1e-3)


def test_saved_and_loaded_it_denoises_alike(whole: tuple[Simulator, Particles, Method], tmp_path: Path) -> None:
    _, particles, method = whole
    method.save(tmp_path / "em3d")
    few = particles.noisy[:4]
    loaded = Method.load(tmp_path / "em3d")
    torch.testing.assert_close(loaded.denoise(few, particles.sigma), method.denoise(few, particles.sigma))
    assert isinstance(loaded, Method)
    # a notebook whose fit is in the cache needs them
    assert torch.equal(loaded.poses.rotations, method.poses.rotations)
    assert loaded.subset.bincount().tolist() == [0, len(particles) // 2, len(particles) // 2]
    # of another shape: filled up with background, or only a part seen
    wide = torch.nn.functional.pad(few, (3, 2, 0, 0), value=particles.offset)
    assert method.denoise(wide, particles.sigma).shape == (4, 32, 37)


@pytest.mark.parametrize("symmetry", ["C1", "C4", "D7"])
def test_of_noise_nothing_is_left(symmetry: str) -> None:
    noise = torch.randn(200, 24, 24, generator=generator(11))
    method = fitted(TrainingData("noisy", noise, None, 1.0, 4.0), **SMALL, symmetry=symmetry)
    out = method.denoise(noise, 1.0)
    assert float((out - out.mean()).square().mean()) < 0.003  # measured in C1 with four seeds: 0.0000 to 0.0002
    # each half fits its own noise; turned onto one another they agree on a few rings (measured: 1 to 4), not on more
    assert method.info["reach"] <= 5


def test_refuses_what_it_cannot_do() -> None:
    few, wide, small = torch.randn(3, 16, 16), torch.randn(20, 16, 18), torch.randn(20, 6, 6)
    for images in (few, wide, small):
        with pytest.raises(CryobenchError, match="em3d"):
            fitted(TrainingData("noisy", images, None, 1.0, 4.0))
    with pytest.raises(CryobenchError, match="noise level"):
        fitted(TrainingData("noisy", torch.zeros(20, 16, 16), None, 0.0, 4.0))
    with pytest.raises(CryobenchError, match="boxes of 16"):
        fitted(TrainingData("noisy", torch.randn(20, 16, 16), None, 1.0, 4.0), shift=5.0)
    for wrong in ({"settling": 0}, {"iterations": 0}, {"folds": 1}, {"shift": -1.0}):
        with pytest.raises(CryobenchError, match="em3d"):
            Method.config_for("quick", **wrong)
    tiny = torch.randn(5, 16, 16)  # fewer than folds
    out = fitted(TrainingData("noisy", tiny, None, 1.0, 4.0), **SMALL).denoise(tiny, 1.0)
    assert out.shape == tiny.shape
    assert torch.isfinite(out).all()
    with pytest.raises(CryobenchError, match="fit"):
        Method().denoise(few, 1.0)
    ctf = ContrastTransfer(Optics(pixel_size=4.0), torch.tensor([[15000.0, 14000.0, 20.0]]).expand(20, 3))
    train = TrainingData("noisy", torch.randn(20, 16, 16), None, 1.0, 4.0, ctf=ctf)
    method = fitted(train, iterations=1, **SMALL)
    with pytest.raises(CryobenchError, match="CTF"):
        method.denoise(few, 1.0)
    assert method.denoise(few, 1.0, ctf[:3]).shape == few.shape
