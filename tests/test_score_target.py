"""Score with a reference: the projection nearest to an image, and what each guidance makes of it, in closed form."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cryobench.errors import CryobenchError, SupervisionError
from cryobench.imaging.ctf import bfactor_2d
from cryobench.imaging.particles import Particles, Simulation, Simulator
from cryobench.imaging.training_data import Reference, TrainingData
from cryobench.methods.base import Budget
from cryobench.methods.reference_match import ReferenceMatch
from cryobench.methods.score_target import Method, with_reference

SIZE = 32
QUIET = Budget(progress=False)


def blobs(seed: int) -> Tensor:
    """Six blobs (32, 32, 32) at random places: no symmetry."""
    generator = torch.Generator().manual_seed(seed)
    axis = torch.arange(SIZE) - SIZE // 2
    volume = torch.zeros(SIZE, SIZE, SIZE)
    for x, y, z in torch.rand(6, 3, generator=generator) * 16 - 8:
        squared = (axis[:, None, None] - z) ** 2 + (axis[:, None] - y) ** 2 + (axis - x) ** 2
        volume += torch.exp(-squared / (2 * 1.5**2))
    return volume


def simulated(snr: float, n: int = 40, volume: int = 1, **settings: Any) -> tuple[Simulator, Particles]:
    simulator = Simulator(blobs(volume), Simulation(SIZE, 4.0, snr=snr, **settings))
    return simulator, simulator.simulate(n, seed=3)


def angles(found: Tensor, true: Tensor) -> Tensor:
    """Degrees (n,) between rotations."""
    cosine = (torch.einsum("nij,nij->n", found, true) - 1) / 2
    return torch.rad2deg(cosine.clamp(-1, 1).acos())


@pytest.mark.parametrize("ctf", [False, True])
def test_finds_known_poses(ctf: bool) -> None:
    simulator, particles = simulated(2.0, ctf=ctf)
    match = ReferenceMatch(simulator.volume * particles.scale)
    contrast = simulator.contrast_transfer(particles.defocus)
    filters = contrast.images(SIZE) if contrast is not None else None
    found = match.rotations(particles.noisy, filters)
    assert float(angles(found, particles.rotations).median()) < 3.0
    nearest = match.projections(particles.noisy, contrast) + particles.offset
    error = (nearest - particles.clean).square().mean()
    assert float(error) < 0.01 * float(particles.clean.var())


def test_noise_of_known_colour_and_an_envelope() -> None:
    simulator, particles = simulated(2.0, bfactor=100.0)
    envelope = bfactor_2d(100.0, 4.0, SIZE)[None]
    match = ReferenceMatch(simulator.volume * particles.scale, torch.ones(SIZE, SIZE // 2 + 1), envelope)
    nearest = match.projections(particles.noisy) + particles.offset
    assert float((nearest - particles.clean).square().mean()) < 0.02 * float(particles.clean.var())
    with_others = match.projections(particles.noisy[:7])
    torch.testing.assert_close(with_others, nearest[:7] - particles.offset, atol=1e-5, rtol=1e-4)


def test_boxes_of_other_sizes_are_matched_at_their_centre() -> None:
    simulator, particles = simulated(2.0)
    match = ReferenceMatch(simulator.volume * particles.scale)
    nearest = match.projections(particles.noisy - particles.offset)
    wide = torch.nn.functional.pad(particles.noisy - particles.offset, (4, 4, 9, 9))  # both centres are size // 2
    other = match.projections(wide)
    assert other.shape == wide.shape
    torch.testing.assert_close(other[:, 9:-9, 4:-4], nearest, atol=1e-5, rtol=1e-4)
    assert not other[:, :9].any()
    # a box that cuts off empty space alone
    narrow = match.projections((particles.noisy - particles.offset)[:, 1:-1, 2:-2])
    assert float((narrow - nearest[:, 1:-1, 2:-2]).square().mean()) < 0.05 * float(nearest.var())


class Steps(nn.Module):
    """D(z) is constant between edges."""

    def __init__(self, edges: Tensor) -> None:
        super().__init__()
        self.edges, self.values = edges, nn.Parameter(torch.zeros(len(edges) + 1))

    def forward(self, z: Tensor, tau: Tensor) -> Tensor:
        return self.values[torch.bucketize(z, self.edges)]


@pytest.mark.parametrize(
    ("guidance", "tau", "share"),
    [("convex", 0.0, 0.3), ("convex", 1.5, 0.3), ("loss", 0.0, 0.0), ("loss", 1.5, None)],
)
def test_the_bias_of_the_minimum_is_as_predicted(guidance: str, tau: float, share: float | None) -> None:
    """Images of one pixel, x normal of variance v; the wrong reference has two views, +p and -p, and the one nearest
    to the target half is P = p sign(y2). The minimum is (1 - share) E[x|z] + share E[P|z]."""
    v, p, w, n = 2.0, 3.0, 0.3, 400_000
    generator = torch.Generator().manual_seed(0)
    x = math.sqrt(v) * torch.randn(n, generator=generator)
    first, second = (x + torch.randn(n, generator=generator) for _ in range(2))
    target = torch.stack([second, p * second.sign(), torch.ones(n)], 1)[:, :, None, None]
    levels = {"at_zero": 1.0} if tau == 0 else {"at_zero": 0.0, "lowest": tau, "highest": tau}
    method = Method(Method.config_for("smoke", guidance=guidance, weight=w, **levels))
    t2 = 1 + tau**2
    spread = math.sqrt(v + t2)
    net = Steps(torch.linspace(-2, 2, 21) * spread)
    slopes = []
    for start in (0.0, 1.0):  # the loss is a parabola in each value: two slopes give its minimum
        net.values.data.fill_(start)
        torch.manual_seed(1)
        slopes.append(torch.autograd.grad(method.loss(net, first[:, None, None, None], target), net.values)[0])
    found = (slopes[0] / (slopes[0] - slopes[1]))[1:-1]
    z = (net.edges[:-1] + net.edges[1:]) / 2
    mean, variance = v / (v + t2) * z, v * t2 / (v + t2)
    view = p * torch.erf(mean / math.sqrt(2 * (variance + 1)))  # E[P|z]: y2 is normal around mean, given z
    pull = w * tau**2 / t2
    share = pull / (1 + pull) if share is None else share
    torch.testing.assert_close(found, (1 - share) * mean + share * view, atol=0.06, rtol=0.02)
    if share:  # and that is another answer than E[x|z]
        assert float((found - mean).abs().max()) > 0.1


@pytest.fixture(scope="module")
def gate() -> TrainingData:
    simulator, particles = simulated(1.0, 64)
    return TrainingData.simulated("reference", particles, simulator)


def fitted(gate: TrainingData, **options: object) -> Method:
    method = Method(Method.config_for("smoke", **options), seed=1)
    method.fit(gate, QUIET)
    return method


@pytest.fixture(scope="module")
def mixture(gate: TrainingData) -> Method:
    return fitted(gate, guidance="mixture", weight=0.4, spread=0.5, steps=40)


def test_mixture_is_the_mixture_of_two_scores(gate: TrainingData, mixture: Method) -> None:
    images, sigma = gate.noisy, gate.sigma
    match = ReferenceMatch(gate.reference.volume * gate.reference.scale)
    nearest = match.projections(images - images.mean())
    nearest = nearest - nearest.mean() + images.mean()
    gaussian = (nearest - images) / (sigma**2 + (0.5 * sigma) ** 2)
    wanted = 0.6 * mixture.score(images, sigma) + 0.4 * gaussian
    found = (mixture.denoise(images, sigma) - images) / sigma**2
    assert float((found - wanted).square().mean()) < 1e-4 * float(wanted.square().mean())


def test_mixture_takes_its_reference_along(mixture: Method, gate: TrainingData) -> None:
    assert mixture.state["volume"].shape == (SIZE, SIZE, SIZE)
    assert "volume" not in mixture.weights()
    # images in other units are matched as well, since the reference is kept in units of the noise
    images = gate.noisy[:4]
    once = mixture.denoise(images, gate.sigma)
    torch.testing.assert_close(mixture.denoise(5 * images + 2, 5 * gate.sigma), 5 * once + 2, atol=1e-3, rtol=1e-3)


def test_a_wrong_reference_is_drawn(gate: TrainingData) -> None:
    """Wholly led by a reference, the result is its projection, whatever the images show."""
    simulator, particles = simulated(1.0, 64, volume=2)
    other = TrainingData.simulated("reference", particles, simulator).reference
    wrong = with_reference(gate, other)
    assert torch.equal(wrong.pairs()[1], gate.pairs()[1])
    led = fitted(wrong, guidance="mixture", weight=1.0, spread=0.01, steps=2).denoise(gate.noisy, gate.sigma)
    views = ReferenceMatch(other.volume * other.scale).projections(led - led.mean())
    centred = [x - x.mean((1, 2), keepdim=True) for x in (led, views, gate.clean)]
    likeness = [torch.cosine_similarity(centred[0].flatten(1), x.flatten(1)).mean() for x in centred[1:]]
    assert float(likeness[0]) > 0.95 > float(likeness[1])


def test_no_clean_image_is_seen(gate: TrainingData) -> None:
    class Blind(TrainingData):
        @property
        def clean(self) -> Tensor:
            raise AssertionError("clean images were asked for")

        def batch(self, *_: object) -> tuple[Tensor, Tensor]:
            raise AssertionError("clean images were asked for")

    first, second = gate.pairs()
    blind = Blind("reference", first, None, gate.sigma, 4.0, second=second, reference=gate.reference)
    for guidance in ("loss", "mixture", "convex"):
        fitted(blind, guidance=guidance, steps=2)


def test_batches_turn_the_projection_with_its_particle(gate: TrainingData) -> None:
    method = Method(Method.config_for("smoke", guidance="convex"))
    batch = method.batches(gate)
    for step in range(4):
        source, target = batch(step, 32, 0, torch.device("cpu"))
        assert source.shape == (32, 1, SIZE, SIZE)
        noisy, nearest, mask = target.unbind(1)
        assert set(mask.unique().tolist()) == {0.0, 1.0}
        # nearer to both halves than the other half is, whose noise has variance 1
        for half in (source[:, 0], noisy):
            assert float((half - nearest).square().mean()) == pytest.approx(1, abs=0.15)
        assert float((source[:, 0] - noisy).square().mean()) == pytest.approx(2, abs=0.15)


def test_the_mask_stays_on_the_particle() -> None:
    """Boxes whose sides the network cannot halve are cut at random places, after they were turned."""
    simulator, particles = simulated(1.0, 64)
    wide = [
        torch.nn.functional.pad(stack - particles.offset, (3, 3, 3, 3)) for stack in (particles.noisy, particles.clean)
    ]
    reference = TrainingData.simulated("reference", particles, simulator).reference
    data = TrainingData("reference", wide[0], None, particles.sigma, 4.0, second=wide[1], reference=reference)
    batch = Method(Method.config_for("smoke")).batches(data)
    for step in range(8):
        _, nearest, mask = batch(step, 8, 0, torch.device("cpu"))[1].unbind(1)
        assert mask.shape[1:] == (36, 36)
        assert nearest[mask == 0].std() < 0.05 * nearest.std()


def test_what_it_refuses(gate: TrainingData) -> None:
    with pytest.raises(CryobenchError, match="guidance"):
        Method.config_for("smoke", guidance="prior")
    off_centre = with_reference(gate, Reference(gate.reference.volume, shift=2.0))
    with pytest.raises(CryobenchError, match="shifts"):
        Method(Method.config_for("smoke")).fit(off_centre, QUIET)
    simulator, particles = simulated(1.0, 8)
    with pytest.raises(SupervisionError):
        Method(Method.config_for("smoke")).fit(TrainingData.simulated("clean-pairs", particles, simulator), QUIET)
