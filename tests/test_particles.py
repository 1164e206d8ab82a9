"""Simulated data sets, the noise level estimate, and the gate before training data."""

import dataclasses

import pytest
import torch
from blobs import BlobData

from cryobench.errors import CryobenchError, SupervisionError
from cryobench.imaging.particles import Simulation, Simulator, stream_seed
from cryobench.imaging.training_data import SUPERVISION, TrainingData
from cryobench.imaging.turns import TURNS, turn
from cryobench.methods.noise_level import corner_mask, estimate_sigma
from cryobench.specimens.catalog import resolve

SIMULATION = Simulation(31, 8.0, snr=0.2)


@pytest.fixture(scope="module")
def simulator():
    volume, _ = resolve("transporter").density(31, 8.0)
    return Simulator(volume, SIMULATION)


def test_snr_range_and_seed(simulator):
    data = simulator.simulate(60, seed=3)
    assert data.clean.min() == 0
    assert data.clean.max() == 1
    assert float(data.clean.double().var(correction=0)) / data.sigma**2 == pytest.approx(0.2, rel=1e-6)
    assert float((data.noisy - data.clean).std()) == pytest.approx(data.sigma, rel=0.02)
    again = simulator.simulate(60, seed=3)
    assert torch.equal(data.noisy, again.noisy)
    assert not torch.equal(data.noisy, simulator.simulate(60, seed=4).noisy)


def test_scale_and_poses_reproduce_the_clean_images(simulator):
    data = simulator.simulate(10, seed=0)
    projections = simulator.projector.project(data.rotations)
    assert torch.allclose(projections * data.scale + data.offset, data.clean, atol=1e-5)


def test_split_keeps_order_and_noise_level(simulator):
    data = simulator.simulate(10, seed=0)
    train, test = data.split(7)
    assert (len(train), len(test)) == (7, 3)
    assert torch.equal(test.noisy, data.noisy[7:])
    assert train.sigma == test.sigma == data.sigma


@pytest.mark.parametrize("option", [{"ctf": True}, {"shift": 3.0}, {"contrast": 0.3}, {"bfactor": 500.0}])
def test_each_option_changes_the_images_and_nothing_of_the_contract(simulator, option):
    volume, _ = resolve("transporter").density(31, 8.0)
    plain = simulator.simulate(20, seed=1)
    data = Simulator(volume, dataclasses.replace(SIMULATION, **option)).simulate(20, seed=1)
    assert torch.equal(data.rotations, plain.rotations)
    assert float((data.clean - plain.clean).abs().max()) > 0.02
    assert float(data.clean.var() / (data.noisy - data.clean).var()) == pytest.approx(0.2, rel=0.05)
    assert (data.defocus is not None) == bool(option.get("ctf"))


def test_streams_of_randomness_do_not_meet():
    seeds = {stream_seed(s, step, name) for s in range(3) for step in range(50) for name in ("poses", "noise")}
    assert len(seeds) == 300
    assert all(0 <= s < 2**63 for s in seeds)


@pytest.mark.parametrize("shape", [(20, 64, 64), (40, 33, 47), (3, 15, 16)])
def test_noise_level_from_the_corners(shape):
    n, h, w = shape
    generator = torch.Generator().manual_seed(0)
    particle = torch.where(corner_mask(h, w), 0.0, 5 * torch.rand(h, w, generator=generator))
    background = torch.randn(n, 1, 1, generator=generator)
    images = particle + background + 0.7 * torch.randn(shape, generator=generator)
    pixels = n * int(corner_mask(h, w).sum())
    assert estimate_sigma(images) == pytest.approx(0.7, rel=4 / pixels**0.5)
    assert estimate_sigma(3 * images + 10) == pytest.approx(3 * estimate_sigma(images), rel=1e-5)


def test_a_tiny_image_still_has_a_noise_level():
    assert estimate_sigma(torch.arange(6.0).view(1, 2, 3)) > 0


@pytest.mark.parametrize("level", SUPERVISION)
def test_the_gate_opens_as_far_as_the_supervision(level, simulator):
    train = TrainingData.simulated(level, simulator.simulate(8, seed=0), simulator)
    asks = {
        "sigma": lambda: train.sigma,
        "noisy": lambda: train.noisy,
        "noisy-pairs": train.pairs,
        "clean-pairs": lambda: train.clean,
    }
    for needed, ask in asks.items():
        if SUPERVISION.index(level) >= SUPERVISION.index(needed):
            ask()
        else:
            with pytest.raises(SupervisionError, match=needed):
                ask()


def test_batches_depend_on_seed_and_step_only(simulator):
    data = simulator.simulate(8, seed=0)
    for level in ("noisy-pairs", "clean-pairs"):
        a, b = (TrainingData.simulated(level, data, simulator) for _ in range(2))
        b.batch(1, 4, seed=0)
        for x, y in zip(a.batch(5, 4, seed=0), b.batch(5, 4, seed=0), strict=True):
            assert torch.equal(x, y)
        assert not torch.equal(a.batch(5, 4, seed=0)[0], a.batch(6, 4, seed=0)[0])
        assert not torch.equal(a.batch(5, 4, seed=0)[0], a.batch(5, 4, seed=1)[0])


def test_pairs_have_independent_noise_of_the_same_level(simulator):
    data = simulator.simulate(30, seed=0)
    a, b = TrainingData.simulated("noisy-pairs", data, simulator).pairs()
    noise_a, noise_b = (a - data.clean).flatten(), (b - data.clean).flatten()
    assert float(noise_b.std()) == pytest.approx(data.sigma, rel=0.02)
    assert abs(float((noise_a * noise_b).mean())) / data.sigma**2 < 4 / noise_a.numel() ** 0.5


def test_stacks_alone_give_turned_and_mirrored_pairs():
    clean = BlobData(17).clean
    train = TrainingData("clean-pairs", clean + 1, clean, 1.0, 2.0)
    noisy, target = train.batch(0, 16, seed=0)
    assert torch.allclose(noisy, target + 1)
    seen = torch.stack([turn(target[0], *t) for t in TURNS])
    assert min(float((seen[:, None] - clean).abs().amax((2, 3)).min()), 1) < 1e-6


def test_without_clean_images_the_message_says_what_to_give():
    train = TrainingData("clean-pairs", torch.zeros(2, 8, 8), None, 1.0, 1.0)
    with pytest.raises(CryobenchError, match="_clean"):
        _ = train.clean


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", ["noisy", "clean", "second"])
def test_training_images_that_are_not_finite_are_refused(which, value):
    stacks = {name: torch.ones(3, 7, 9) for name in ("noisy", "clean", "second")}
    TrainingData("clean-pairs", sigma=1.0, pixel_size=1.0, **stacks)
    stacks[which][1, 2, 3] = value
    with pytest.raises(CryobenchError, match="training images hold NaN or infinite"):
        TrainingData("clean-pairs", sigma=1.0, pixel_size=1.0, **stacks)
