"""Expectation-maximisation from noisy images alone, piece by piece and whole, against what is known otherwise."""

import math
from pathlib import Path

import pytest
import torch
from test_bayes import blobs, simulated
from test_bayes import denoised as best_denoised
from torch import Tensor

from cryobench.errors import CryobenchError
from cryobench.imaging.ctf import ContrastTransfer, Optics
from cryobench.imaging.particles import Particles, Simulation, Simulator
from cryobench.imaging.projection import Projector
from cryobench.imaging.rotations import random_rotations, symmetry_matrices
from cryobench.imaging.slices import SliceTable, resized
from cryobench.imaging.training_data import TrainingData
from cryobench.methods.base import Budget
from cryobench.methods.em3d import Method, ring_power
from cryobench.methods.em_align import Move, align, to_axes
from cryobench.methods.em_classes import classify
from cryobench.methods.em_filter import local_wiener
from cryobench.methods.em_fit import volume_of_poses
from cryobench.methods.em_poses import Climb, Frame, Modes, PoseClimber, Views, mean_slices, turn_by
from cryobench.methods.em_start import Annealing, GridEM
from cryobench.methods.registry import get_method
from cryobench.methods.training import BudgetSpent


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def decibels(out: Tensor, particles: Particles) -> float:
    """Gain of ``out`` over the noisy images."""
    clean = particles.clean
    return 10 * math.log10(float((particles.noisy - clean).square().mean() / (out - clean).square().mean()))


def turn_vector(rotations: Tensor) -> Tensor:
    """Vectors (n, 3) of rotations by less than half a turn: axis times angle."""
    skew = (rotations - rotations.mT).double() / 2
    axis = torch.stack([skew[:, 2, 1], skew[:, 0, 2], skew[:, 1, 0]], 1)
    sine = axis.norm(dim=1, keepdim=True)
    cosine = (rotations.diagonal(dim1=1, dim2=2).double().sum(1, keepdim=True) - 1) / 2
    return axis / sine.clamp(min=1e-12) * torch.atan2(sine, cosine)


def nearest_error(found: Tensor, truth: Tensor, group: Tensor) -> Tensor:
    """Vectors (n, 3), in the image frame, from the equivalent of ``truth`` nearest to ``found``."""
    every = torch.stack([found.mT @ (s @ truth) for s in group.float()])
    best = every.diagonal(dim1=2, dim2=3).sum(2).argmax(0)
    return turn_vector(every[best, torch.arange(len(found))])


def best_modes(modes: Modes, n: int) -> Modes:
    """The mode of the highest score of each image."""
    top = torch.full((n,), -math.inf).scatter_reduce(0, modes.owner, modes.score, "amax")
    chosen = (modes.score >= top[modes.owner]).nonzero()[:, 0]
    chosen = chosen[modes.owner[chosen].argsort()]
    assert modes.owner[chosen].tolist() == list(range(n))
    return modes[chosen]


def exact(simulator: Simulator) -> Simulator:
    """Its projections are 1e-3 exact, those that the methods make are 1e-2: nobody is to share the errors."""
    simulator.projector = Projector(simulator.volume, padding=5)
    return simulator


class Known:
    """Images of a known volume, as the search wants them."""

    def __init__(
        self,
        size: int,
        snr: float,
        n: int,
        group: str = "C1",
        ctf: bool = False,
        shift: float = 0.0,
        padding: float = 2.6,
    ) -> None:
        simulation = Simulation(size, 4.0, snr, ctf=ctf, shift=shift)
        self.simulator = exact(Simulator(blobs(size, group), simulation, symmetry=group))
        self.particles = self.simulator.simulate(n, seed=1)
        self.frame, self.group = Frame(size), symmetry_matrices(group)
        transfer = self.simulator.contrast_transfer(self.particles.defocus)
        self.ctf = None if transfer is None else transfer.images(size)
        self.table = SliceTable(self.simulator.volume * self.particles.scale, padding=padding)
        self.climber = PoseClimber(self.table, self.frame, self.group, Climb(shift=shift))
        self.views = self.of(self.particles.noisy - self.particles.offset)

    def of(self, images: Tensor) -> Views:
        return Views.of(self.frame, images, torch.tensor(self.particles.sigma), self.ctf)


CASES = [
    (32, "C1", False, 2.0),
    (24, "C1", False, 0.0),
    (25, "C1", True, 0.0),
    (23, "C4", False, 0.0),
    (24, "C4", True, 2.0),
]


@pytest.mark.parametrize(("size", "group", "ctf", "shift"), CASES)
def test_finds_poses_without_noise(size: int, group: str, ctf: bool, shift: float) -> None:
    known = Known(size, 1e4, 40, group, ctf, shift)
    found = best_modes(known.climber.run(known.views), 40)
    error = nearest_error(found.rotations, known.particles.rotations, known.group)
    assert float(error.norm(dim=1).rad2deg().max()) < 1.0
    assert float((found.shifts - known.particles.shifts).abs().max()) < 0.1


@pytest.mark.parametrize(("size", "group", "ctf", "shift"), CASES[1:])
def test_poses_are_as_exact_as_their_width_says(size: int, group: str, ctf: bool, shift: float) -> None:
    known = Known(size, 10.0, 80, group, ctf, shift)
    found = best_modes(known.climber.run(known.views), 80)
    error = nearest_error(found.rotations, known.particles.rotations, known.group)
    if shift:
        error = torch.cat([error, (known.particles.shifts - found.shifts).double()], 1)
    normal = torch.linalg.solve(found.spread.double(), error[..., None])[..., 0]
    # chi-square with 3 or 5 degrees of freedom an image
    assert float(normal.square().mean()) == pytest.approx(1, abs=4.5 * math.sqrt(2 / normal.numel()))


@pytest.mark.parametrize(
    ("size", "snr", "group", "ctf"), [(24, 0.2, "C1", False), (25, 1.0, "C1", True), (24, 0.5, "C4", False)]
)
def test_mean_slices_are_the_posterior_mean(size: int, snr: float, group: str, ctf: bool) -> None:
    """Against a sum over ever finer grids of poses of the same volume."""
    known = Known(size, snr, 20, group, ctf)
    particles = known.particles
    expected, method = best_denoised(known.simulator, particles)
    mean, _ = mean_slices(known.climber, known.views, known.climber.run(known.views))
    if known.ctf is not None:
        mean = mean * known.ctf.flatten(1)[:, known.frame.pixels]
    found = known.frame.images(mean) + particles.offset
    error, least = (float((x - particles.clean).square().mean()) for x in (found, expected))
    assert error < 1.06 * least
    assert float((found - expected).square().mean()) < 0.1 * method.info["limit"]["posterior_variance"]


@pytest.mark.parametrize(("snr", "padding", "bound"), [(100.0, 6.0, 0.1), (10.0, 2.6, 0.45)])
def test_evidence_is_the_integral_over_the_mode(snr: float, padding: float, bound: float) -> None:
    """Against a sum over a fine grid around the mode, in the three angles. The Gaussian needs a narrow posterior and a
    fine table (with interpolation errors it is up to 0.4 off), the points on the ellipsoid do not."""
    known = Known(24, snr, 6, padding=padding)
    modes = best_modes(known.climber.run(known.views), 6)
    step = 0.75
    axis = torch.arange(-6, 7) * step
    u = torch.cartesian_prod(axis, axis, axis)
    _, of_points = mean_slices(known.climber, known.views, modes)
    for i in range(6):
        model = known.table.sample(modes.rotations[i] @ turn_by(u @ modes.spread[i].T), known.frame.points)
        data = known.views.data[i]
        scores = ((data.abs().square() - (data - model * known.views.gain).abs().square()).sum(1) / 2).double()
        integral = float(scores.logsumexp(0) + modes.spread[i].det().abs().log() + 3 * math.log(step))
        assert float(of_points[i]) == pytest.approx(integral, abs=0.1)
        assert float(modes.evidence()[i]) == pytest.approx(integral, abs=bound)


def test_shifts_and_gains_of_views() -> None:
    """The likelihood is that of white noise in the pixels."""
    size = 15
    images, model = torch.randn(2, 3, size, size, generator=generator(1))
    frame = Frame(size)
    inside = frame.images(frame.transform(images))
    views = Views.of(frame, images, torch.tensor(0.7))
    shown = Views.of(frame, model, torch.tensor(0.7)).data
    expected = (inside - frame.images(frame.transform(model))).square().sum((1, 2)) / 0.7**2
    torch.testing.assert_close((views.data - shown).abs().square().sum(1), expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(frame.transform(inside), frame.transform(images), rtol=1e-4, atol=1e-3)
    assert torch.equal(views.scaled(torch.tensor([1.0, 2.0, 3.0])).gain[1], 2 * views.gain[0])


@pytest.mark.parametrize("size", [32, 33])
def test_local_wiener_keeps_what_the_halves_share(size: int) -> None:
    truth = blobs(size)
    # as strong as the signal where it is, white
    noise = 0.5 * torch.randn(2, size, size, size, generator=generator(2))
    first, second = truth + noise
    whole, *halves = local_wiener(first, second)

    def error(volume: Tensor) -> float:
        return float((volume - truth).square().sum())

    assert error(whole) < 0.03 * error((first + second) / 2)
    for half, raw in zip(halves, (first, second), strict=True):
        assert error(whole) < error(half) < 0.03 * error(raw)
    only_noise, *_ = local_wiener(*noise)
    assert float(only_noise.square().sum()) < 0.04 * float(noise.mean(0).square().sum())
    for volume in local_wiener(truth, truth.clone()):
        inside = torch.fft.fftfreq(size)
        kept = (inside[:, None, None] ** 2 + inside[:, None] ** 2 + inside**2) <= 0.25
        expected = torch.fft.ifftn(torch.fft.fftn(truth) * kept).real
        assert float((volume - expected).norm()) < 1e-3 * float(truth.norm())


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


def test_first_volumes_are_the_particle() -> None:
    """From two seeds, in whatever orientation and hand."""
    simulator, particles = simulated(32, 0.5, 300)
    views = Views.of(Frame(32), particles.noisy - particles.offset, torch.tensor(particles.sigma))
    annealing = Annealing(band=6.0, spacing=24.0, rate=0.85)
    for seed in (0, 1):
        volume, evidence = GridEM(views, annealing, generator(seed)).run()
        truth = resized(simulator.volume * particles.scale, len(volume))
        assert align(truth, volume, 6.0, 15.0).correlation > 0.95
        assert evidence > 0


QUICK = {
    "starts": 1,
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
    out = Method.load(tmp_path / "em3d").denoise(few, particles.sigma)
    torch.testing.assert_close(out, method.denoise(few, particles.sigma))
    # of another shape: filled up with background, or only a part seen
    wide = torch.nn.functional.pad(few, (3, 2, 0, 0), value=particles.offset)
    assert method.denoise(wide, particles.sigma).shape == (4, 32, 37)


def test_of_noise_nothing_is_left() -> None:
    noise = torch.randn(200, 24, 24, generator=generator(11))
    method = fitted(TrainingData("noisy", noise, None, 1.0, 4.0), **SMALL)
    out = method.denoise(noise, 1.0)
    assert float((out - out.mean()).square().mean()) < 0.01  # measured: 0.001 to 0.002
    # each half fits its own noise; turned onto one another they agree on a few rings (measured: 2 to 5), not on more
    assert method.info["reach"] <= 6


def test_refuses_what_it_cannot_do() -> None:
    few, wide = torch.randn(3, 16, 16), torch.randn(20, 16, 18)
    for images in (few, wide):
        with pytest.raises(CryobenchError, match="em3d"):
            fitted(TrainingData("noisy", images, None, 1.0, 4.0))
    with pytest.raises(CryobenchError, match="fit"):
        Method().denoise(few, 1.0)
    ctf = ContrastTransfer(Optics(pixel_size=4.0), torch.tensor([[15000.0, 14000.0, 20.0]]).expand(20, 3))
    train = TrainingData("noisy", torch.randn(20, 16, 16), None, 1.0, 4.0, ctf=ctf)
    method = fitted(train, iterations=1, **SMALL)
    with pytest.raises(CryobenchError, match="CTF"):
        method.denoise(few, 1.0)
    assert method.denoise(few, 1.0, ctf[:3]).shape == few.shape
