"""Nearest projections, their null, and Einstein from noise, against plain loops and closed forms."""

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.fft import dctn
from scipy.ndimage import gaussian_filter
from torch import Tensor

from cryobench.bench import experiment
from cryobench.bench.session import Run
from cryobench.cards import invention_card, invention_text
from cryobench.errors import CryobenchError
from cryobench.metrics import invention
from cryobench.metrics.spectral import ring_power
from cryobench.paths import project_root


def white(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blobs(h: int, w: int, n: int = 200) -> Tensor:
    """Images of three blobs near the middle, at random places."""
    place = torch.rand(n, 3, 2, 1, generator=torch.Generator().manual_seed(3)) * 0.4 + 0.3
    y = torch.exp(-((torch.arange(h) - h * place[:, :, 0]) ** 2) / 8)
    x = torch.exp(-((torch.arange(w) - w * place[:, :, 1]) ** 2) / 8)
    return torch.einsum("nky,nkx->nyx", y, x)


def test_nearest_is_the_best_of_pearson_correlations() -> None:
    images, projections = 5 + 3 * white(4, 21, 30), white(300, 21, 30, seed=1)
    values, index = invention.nearest(images, projections)
    for k, image in enumerate(images):
        pearson = [np.corrcoef(image.flatten(), p.flatten())[0, 1] for p in projections]
        assert int(index[k]) == int(np.argmax(pearson))
        assert float(values[k]) == pytest.approx(max(pearson), abs=1e-5)


def test_nearest_finds_a_projection_in_its_own_set_and_nothing_in_a_constant() -> None:
    projections = blobs(20, 33)
    values, index = invention.nearest(7 * projections[[3, 150]] - 2, projections)
    assert index.tolist() == [3, 150]
    assert torch.allclose(values, torch.ones(2), atol=1e-5)
    assert invention.nearest(torch.full((1, 20, 33), 0.7), projections)[0].item() == 0
    with pytest.raises(CryobenchError, match="compared"):
        invention.nearest(projections, projections[:, :-1])


@pytest.mark.parametrize("shape", [(16, 16), (17, 24), (15, 21)])
def test_scrambled_images_keep_spectrum_and_mean_but_not_the_picture(shape: tuple[int, int]) -> None:
    images = blobs(*shape, 10) + 0.3
    other = invention.scramble(images, torch.Generator().manual_seed(0))
    assert np.allclose(abs(dctn(other, axes=(1, 2))), abs(dctn(images, axes=(1, 2))), atol=1e-3)
    assert torch.allclose(other.mean((1, 2)), images.mean((1, 2)), atol=1e-5)
    assert float(torch.corrcoef(torch.stack([other.flatten(), images.flatten()]))[0, 1]) < 0.3


@pytest.mark.parametrize("width", [0.0, 1.0, 2.5])
def test_noise_and_filtered_noise_are_within_their_null(width: float) -> None:
    """z is calibrated: about standard normal over seeds for images that know nothing of the structure."""
    z = []
    for seed in range(20):
        images = torch.from_numpy(gaussian_filter(white(24, 24, 31, seed=seed).numpy(), (0, width, width)))
        correlation, _, null = invention.against_null(images, blobs(24, 31), seed)
        z.append(invention.excess(correlation, null))
    assert abs(float(np.mean(z))) < 3 / math.sqrt(20)
    assert 0.5 < float(np.std(z)) < 1.7


def test_a_denoiser_that_draws_the_structure_is_caught() -> None:
    projections = blobs(24, 31)

    def inventor(noise: Tensor) -> Tensor:
        return noise + 0.25 * projections[100 : 100 + len(noise)]  # far too faint to be seen in one image

    noise = white(32, 24, 31)
    honest = invention.pure_noise(lambda x: 0.5 * x, noise, projections)
    found = invention.pure_noise(inventor, noise, projections)
    assert (honest.energy, honest.passed) == pytest.approx((0.25, 0.25), rel=1e-5)
    assert abs(honest.z) < 3 < found.z
    assert honest.einstein == pytest.approx(honest.einstein_raw, abs=1e-6)
    drawn = invention.pure_noise(lambda x: projections[: len(x)], noise, projections)
    assert torch.allclose(drawn.correlation, torch.ones(32), atol=1e-5)
    assert torch.equal(drawn.nearest, projections[:32])
    flat = invention.pure_noise(torch.zeros_like, noise, projections)
    assert (flat.energy, flat.passed, flat.z, flat.einstein) == (0, 0, 0, 0)


def test_a_fixed_image_has_energy_and_passes_no_noise() -> None:
    """Half the noise and a picture: 1/4 passes, all of what is above that is the picture."""
    noise, picture = white(64, 21, 30), 2 * blobs(21, 30)[0]
    both = invention.pure_noise(lambda x: 0.5 * x + picture, noise, blobs(21, 30))
    outputs = 0.5 * noise + picture
    about_mean = ((outputs - outputs.mean(0)) ** 2).sum() / (63 * 630)
    assert both.passed == pytest.approx(float(about_mean / noise.var(0).mean()), rel=1e-5)
    assert both.passed == pytest.approx(0.25, rel=1e-5)
    assert both.energy == pytest.approx(0.25 + float(picture.var()), rel=0.03)
    alone = invention.pure_noise(lambda x: picture.expand(len(x), -1, -1), noise, blobs(21, 30))
    assert alone.passed < 1e-12 < alone.energy


def test_one_image_has_no_spread() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = invention.pure_noise(lambda x: x, white(1, 12, 9), blobs(12, 9))
        assert math.isnan(one.passed)
        assert one.z == 0


def test_rotation_by_right_angles_is_exact_and_by_others_that_of_a_turned_blob() -> None:
    images = white(2, 19, 19)
    turned = invention.rotate(images, math.pi / 2)  # x goes to y: odd sizes turn about their middle pixel
    assert torch.allclose(turned, torch.rot90(images, -1, (1, 2)), atol=1e-4)

    def blob(x0: float, y0: float) -> Tensor:
        y, x = torch.meshgrid(torch.arange(40.0) - 20, torch.arange(33.0) - 16, indexing="ij")
        return torch.exp(-((x - x0) ** 2 + (y - y0) ** 2) / 18)[None]

    angle = 0.4
    expected = blob(7 * math.cos(angle), 7 * math.sin(angle))
    assert float((invention.rotate(blob(7, 0), angle) - expected).abs().max()) < 0.02


def test_alignment_undoes_a_turn_and_a_shift() -> None:
    reference = blobs(41, 41, 1)[0]
    reference = reference - reference.mean()
    moved = invention.rotate(reference[None], 2 * math.pi * 5 / 24)
    moved = torch.roll(moved, (4, -6), dims=(1, 2)) + 0.05 * white(1, 41, 41)
    back = invention.align(moved, reference, 24)
    likeness = [float(torch.corrcoef(torch.stack([x.flatten(), reference.flatten()]))[0, 1]) for x in (moved, back)]
    assert likeness[0] < 0.7
    assert likeness[1] > 0.95


def test_best_shift_is_that_of_a_plain_loop() -> None:
    noise, reference = white(3, 9, 12), white(9, 12, seed=1)
    for image, value in zip(noise, (invention.einstein(x[None], reference, 1)[0] for x in noise), strict=True):
        shifted = [torch.roll(image, (a, b), (0, 1)) for a in range(9) for b in range(12)]
        plain = max(np.corrcoef(s.flatten(), reference.flatten())[0, 1] for s in shifted)
        assert value == pytest.approx(plain, abs=1e-5)


def test_einstein_from_white_noise_is_as_expected() -> None:
    """A reference that is unlike its own shifts: the curve of the closed form, from one image to hundreds."""
    noise, reference = white(500, 32, 24), white(32, 24, seed=5)
    counts = invention.einstein_counts(500)
    assert counts == [1, 2, 4, 8, 16, 32, 64, 128, 256, 500]
    measured = invention.einstein(noise, reference, angles=1)
    expected = invention.einstein_expected(counts, 768, 768)
    assert measured[4:] == pytest.approx(expected[4:], abs=0.05)
    assert measured[-1] > 0.8
    # without a choice among shifts nothing appears
    assert abs(float(torch.corrcoef(torch.stack([noise.mean(0).flatten(), reference.flatten()]))[0, 1])) < 0.12


def test_expected_maximum_of_normal_numbers() -> None:
    """The mean of the larger of two is 1 / sqrt(pi), of the largest of three 1.5 / sqrt(pi)."""
    for hypotheses, best in ((2, 1 / math.sqrt(math.pi)), (3, 1.5 / math.sqrt(math.pi))):
        assert invention.einstein_expected([1], 2, hypotheses)[0] == pytest.approx(
            best / math.sqrt(best**2 + 1), rel=1e-3
        )


@pytest.mark.parametrize(("method", "table"), [("noisy", "tang2022"), ("blank", "zhang2024")])
def test_a_run_says_what_its_method_invents(method: str, table: str) -> None:
    run = Run(table, "channel", method, "smoke", device="cpu")
    record = run.record()
    numbers, spectra = record["invention"], record["spectral"]
    assert {len(v) for v in spectra.values()} == {17}
    assert numbers["snbr"] == pytest.approx({"noisy": numbers["snr"], "blank": 1}[method], rel=1e-4)
    assert numbers["noise_passed"] == pytest.approx({"noisy": 1, "blank": 0}[method], abs=1e-4)
    drawn = numbers["noise_energy"] - numbers["noise_passed"]
    assert (drawn > 0.01) == (method == "blank"), "energy of a fixed image"
    assert (numbers["noise_correlation_z"] > 5) == (method == "blank")
    noise = run.invention().noise.noise
    assert float(noise.std()) == pytest.approx(run.sigma, rel=0.05)
    assert float(noise.mean()) == pytest.approx(run.experiment.test.offset, abs=0.1 * run.sigma)
    coloured = ring_power(noise - noise.mean())[1:]
    assert (float(coloured[0] / coloured[-1]) > 2) == (table == "tang2022"), "noise of the data's own kind"
    assert f"SNBR {numbers['snbr']:.3g}" in invention_text(run)
    assert f"image in it {numbers['noise_passed']:.3g}" in invention_text(run)
    assert invention_card(run)._repr_png_().startswith(b"\x89PNG")


def test_ctf_goes_with_the_images_and_costly_methods_get_fewer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import yaml

    from cryobench.methods.noisy import Method

    spec = yaml.safe_load((project_root() / "tables" / "zhang2024.yml").read_text())
    spec["simulation"] = {"snr": 0.1, "ctf": True}
    (tmp_path / "ctf.yml").write_text(yaml.safe_dump(spec))
    seen = []

    def denoise(self: Method, images: Tensor, sigma: float | None = None, ctf: object = None) -> Tensor:
        seen.append((len(images), len(ctf)))  # type: ignore[arg-type]
        return images

    monkeypatch.setattr(Method, "denoise", denoise)
    monkeypatch.setattr(Method, "costly", True)
    monkeypatch.setattr(experiment, "NOISE_IMAGES", 10)
    monkeypatch.setattr(experiment, "PAIRS", 12)
    run = Run(str(tmp_path / "ctf.yml"), "channel", "noisy", "smoke", device="cpu")
    run.record()
    assert all(images == ctf for images, ctf in seen)
    assert len(run.invention().noise.noise) == 5
    assert {5, 6} <= {images for images, _ in seen}
