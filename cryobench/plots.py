"""Figures of the chapters. Each function returns a matplotlib figure and changes no global setting."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.figure import Figure as MatplotlibFigure
from torch import Tensor

if TYPE_CHECKING:
    from cryobench.bench.session import Run


class Figure(MatplotlibFigure):
    """A figure that notebooks show without pyplot and its global state."""

    def _repr_png_(self) -> bytes:
        out = io.BytesIO()
        self.savefig(out, format="png")
        return out.getvalue()


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    return figure, np.atleast_2d(figure.subplots(rows, columns, squeeze=False))


def images(stacks: Mapping[str, Tensor], n: int = 5, limits: tuple[float, float] | None = None) -> Figure:
    """The first n images (h, w) of each stack (n, h, w), one row a stack.

    Grey values run over ``limits``; without them each row has its own, 0.5 % to 99.5 % of its values.
    """
    n = min([n, *(len(s) for s in stacks.values())])
    if not n or not stacks:
        return _figure(1, 1)[0]
    figure, axes = _figure(1.6 * n + 0.6, 1.65 * len(stacks), len(stacks), n)
    for row, (name, stack) in zip(axes, stacks.items(), strict=True):
        shown = stack[:n].cpu()
        low, high = limits or (float(v) for v in np.quantile(shown.numpy(), [0.005, 0.995]))
        for axis, image in zip(row, shown, strict=True):
            axis.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-12), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, fontsize=9)
    return figure


def curves(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    xlabel: str,
    ylabel: str,
    *,
    log: str = "",
    levels: Sequence[float] = (),
    title: str = "",
) -> Figure:
    """Named curves (x, y) in one plot; ``log`` holds "x" and/or "y"; levels are dotted horizontal lines."""
    figure, axes = _figure(6.4, 3.6)
    axis = axes[0, 0]
    for name, (x, y) in lines.items():
        axis.plot(np.asarray(x), np.asarray(y), label=name, linewidth=1.6)
    for level in levels:
        axis.axhline(level, color="0.5", linestyle=":", linewidth=1)
    if "x" in log:
        axis.set_xscale("log")
        places = sorted({float(v) for x, _ in lines.values() for v in np.asarray(x)})
        if len(places) <= 12:  # few enough to be named
            axis.set_xticks(places, labels=[f"{v:g}" for v in places])
            axis.minorticks_off()
    if "y" in log:
        axis.set_yscale("log")
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axis.grid(alpha=0.25)
    if len(lines) > 1:
        axis.legend(fontsize=8, frameon=False)
    return figure


def bars(
    values: Mapping[str, float], ylabel: str, intervals: Mapping[str, tuple[float, float]] | None = None
) -> Figure:
    """One bar a name, with its interval where one is known."""
    figure, axes = _figure(max(4.0, 0.9 * len(values) + 1.5), 3.2)
    axis = axes[0, 0]
    names = list(values)
    heights = [values[n] for n in names]
    error = None
    if intervals:
        error = np.array([[values[n] - intervals[n][0], intervals[n][1] - values[n]] for n in names]).T
    axis.bar(names, heights, yerr=error, capsize=3, color="#4878a8")
    axis.set_ylabel(ylabel)
    axis.set_xticks(range(len(names)), labels=names, rotation=30, ha="right", rotation_mode="anchor")
    axis.grid(axis="y", alpha=0.25)
    return figure


def result(run: Run, n: int = 5) -> Figure:
    """Clean, noisy and denoised test images and the denoised image's error, all each row on its own grey scale."""
    denoised = run.denoise()
    stacks = {"clean": run.clean, "noisy": run.noisy, f"denoised ({run.cell.method})": denoised}
    return images({**stacks, "error": denoised - run.clean}, n)


def ring_correlation(run: Run) -> Figure:
    """Fourier ring correlation with the clean images, before and after denoising."""
    from cryobench.metrics.spectral import frc, ring_frequencies

    frequency = (ring_frequencies(tuple(run.clean.shape[-2:])) / run.pixel_size).tolist()
    lines: dict[str, Any] = {
        "noisy": (frequency, frc(run.noisy, run.clean).tolist()),
        run.cell.method: (frequency, frc(run.denoise(), run.clean).tolist()),
    }
    return curves(lines, "spatial frequency (1/Å)", "FRC with the clean images", levels=(0.5,))


def training_curve(info: Mapping[str, Any], names: Sequence[str] = ("training loss",), ylabel: str = "loss") -> Figure:
    """Losses of a fit (``method.info``) against the step, one name for each loss."""
    steps, *losses = zip(*info["loss"], strict=True)
    lines = {name: (steps, values) for name, values in zip(names, losses, strict=True)}
    return curves(lines, "step", ylabel, log="y" if min(min(v) for v in losses) > 0 else "")


def failures(run: Run, n: int = 5) -> Figure:
    """The n test images with the largest squared error, as :func:`result` shows the first ones."""
    error = (run.denoise() - run.clean).square().mean(dim=(1, 2))
    worst = error.argsort(descending=True)[:n]
    stacks = {"clean": run.clean, "noisy": run.noisy, f"denoised ({run.cell.method})": run.denoise()}
    return images({**{k: v[worst] for k, v in stacks.items()}, "error": (run.denoise() - run.clean)[worst]}, n)


def radial_power(stacks: Mapping[str, Tensor], pixel_size: float) -> Figure:
    """Rotationally averaged power spectra of stacks (n, h, w), logarithmic."""
    from cryobench.metrics.spectral import ring_frequencies, ring_power

    lines = {}
    for name, stack in stacks.items():
        frequency = ring_frequencies(tuple(stack.shape[-2:])) / pixel_size
        lines[name] = (frequency[1:].tolist(), ring_power(torch.as_tensor(stack))[1:].tolist())
    return curves(lines, "spatial frequency (1/Å)", "power per ring", log="y")
