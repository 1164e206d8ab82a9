"""Taught one structure, shown another: what must come out for methods whose knowledge is plain."""

import math

import pytest
from torch import Tensor

from cryobench.bench.transfer import Sample, transfer
from cryobench.methods.base import Denoiser
from cryobench.methods.noisy import Method as Noisy


class Portrait(Denoiser):
    """Adds a view of the structure that it was taught to whatever it is shown."""

    name = "portrait"

    def __init__(self, views: Tensor) -> None:
        super().__init__(config=())
        self.views = views

    def denoise(self, images: Tensor, sigma: float | None = None) -> Tensor:
        return images + self.views[: len(images)]


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return [Sample.simulated(name, 32, 0.5, 8, 20, 3) for name in ("channel", "transporter")]


def test_what_learns_nothing_loses_nothing(samples: list[Sample]) -> None:
    for row in transfer({s.name: Noisy() for s in samples}, samples, 20):
        assert row["loss"] == 0
        assert row["z"] == 0
        # its error is white noise: nothing in it but chance
        assert abs(row["error"] - row["error_null"]) < 0.1
        shown = next(s for s in samples if s.name == row["shown"])
        assert row["psnr"] == pytest.approx(-20 * math.log10(shown.test.sigma), abs=0.1)


def test_what_draws_its_own_structure_is_found_out(samples: list[Sample]) -> None:
    scale = {s.name: s.test.scale for s in samples}
    fitted = {s.name: Portrait(scale[s.name] * s.projections) for s in samples}
    rows = {(r["taught"], r["shown"]): r for r in transfer(fitted, samples, 20)}
    assert list(rows) == [(t, s) for s in ("channel", "transporter") for t in ("channel", "transporter")]
    for (taught, shown), row in rows.items():
        if taught == shown:
            assert (row["loss"], row["z"]) == (0, 0)
        else:
            assert row["z"] > 3
            assert row["error"] > row["error_right"] > row["error_null"]


def test_a_sample_is_one_structure_with_one_noise(samples: list[Sample]) -> None:
    sample = samples[0]
    assert (len(sample.train), len(sample.test)) == (8, 20)
    noise = sample.noise(50)
    assert noise.shape == (50, 32, 32)
    assert float(noise.std()) == pytest.approx(sample.test.sigma, rel=0.02)
    assert float(noise.mean()) == pytest.approx(sample.test.offset, abs=0.02)
    assert float((noise - noise.mean(0)).std()) == pytest.approx(sample.test.sigma, rel=0.03)
    assert sample.fit("blank", "smoke").denoise(noise, sample.test.sigma).shape == noise.shape
