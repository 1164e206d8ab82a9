"""The invention card of a chapter: what a method makes of nothing, and what its output is made of, in one figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cryobench.metrics.spectral import ring_frequencies
from cryobench.plots import Figure

if TYPE_CHECKING:
    from cryobench.bench.session import Run


def invention_text(run: Run) -> str:
    """The card's numbers, each beside what it must be read against. SNR here is that of the *differences* between
    particles, about their mean image; see :mod:`cryobench.metrics.bias`."""
    invention = run.invention()
    v = {k: float("nan") if x is None else x for k, x in invention.numbers().items()}
    n = len(invention.noise.noise)
    pairs = v["snbr_scale_free_pairs"]  # of few images; below 0 it says nothing
    return "\n".join(
        (
            f"pure noise in ({n} images): what comes out has {v['noise_energy']:.3g} of its energy; without the fixed "
            f"image in it {v['noise_passed']:.3g}",
            f"  correlation with the nearest projection {v['noise_correlation']:.3f}; scrambled "
            f"{v['noise_correlation_null']:.3f}; z {v['noise_correlation_z']:.1f}",
            f"  average of all, aligned to one projection: {v['einstein']:.2f} like it; scrambled "
            f"{v['einstein_null']:.2f}; the noise itself {v['einstein_raw']:.2f}",
            f"what tells particles apart: SNR {v['snr']:.3g} in, SNBR' {v['snbr_scale_free']:.3g} out (pairs alone "
            f"{pairs if pairs > 0 else float('nan'):.3g}; best filter {v['snbr_scale_free_filter']:.3g})",
            f"  SNBR {v['snbr']:.3g} (any fixed image 1, best multiple of the input {1 + v['snr']:.3g})",
        )
    )


def invention_card(run: Run, n: int = 4) -> Figure:
    """Left: noise in, what comes out, the projection nearest to it, each row on one grey scale. Right: signal, noise
    and bias per ring, from the truth; dashed what goes in, solid what comes out."""
    invention = run.invention()
    trial, rings = invention.noise, invention.rings
    n = min(n, len(trial.noise))
    figure = Figure(figsize=(1.25 * n + 5.2, 4.0), dpi=100, layout="constrained")
    halves: Any = figure.subfigures(1, 2, width_ratios=(1.25 * n + 0.4, 4.8))
    left, right = halves
    axes = np.atleast_2d(left.subplots(3, n, squeeze=False))
    stacks = {"noise in": trial.noise, "comes out": trial.output, "nearest": trial.nearest}
    for row, (name, stack) in zip(axes, stacks.items(), strict=True):
        shown = stack[:n].numpy()
        low, high = np.quantile(shown, [0.005, 0.995])
        for axis, image in zip(row, shown, strict=True):
            axis.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-12), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, fontsize=9)
    for axis, value in zip(axes[2], trial.correlation, strict=False):
        axis.set_xlabel(f"{float(value):.2f}", fontsize=8)
    axis = right.subplots()
    frequency = ring_frequencies(tuple(trial.noise.shape[1:]))[1:] / run.pixel_size
    for name, power, style in (
        ("noise in N", rings.noise, "C0--"),
        ("noise out N_d", rings.noise_out, "C0-"),
        ("bias B", rings.bias, "C3-"),
        ("signal S", rings.signal, "k--"),
    ):
        # nothing has no logarithm: what is below a billionth of the input is left out
        values = np.where(power[1:] > 1e-9 * float(invention.total.noise), power[1:], np.nan)
        axis.plot(frequency, values, style, label=name, linewidth=1.6)
    axis.set_yscale("log")
    axis.set(xlabel="spatial frequency (1/Å)", ylabel="power per ring")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, frameon=False)
    return figure
