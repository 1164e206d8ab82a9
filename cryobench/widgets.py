"""Sliders for JupyterLab. Each function gives a static figure where no kernel will answer: in the book."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from cryobench import plots
from cryobench.imaging.noise import add_noise
from cryobench.imaging.projection import Projector
from cryobench.imaging.rotations import euler_to_matrix


def _live() -> bool:
    """Whether somebody sits in front of it: papermill and the book's builder set CRYOBENCH_STATIC."""
    return "CRYOBENCH_STATIC" not in os.environ


def _explore(draw: Callable[..., plots.Figure], sliders: dict[str, tuple[float, float, float]], **fixed: float) -> Any:
    """The figure at the fixed values; live, sliders (low, high, step) that start there."""
    if not _live():
        return draw(**fixed)
    import ipywidgets
    from IPython.display import display

    controls = {
        name: ipywidgets.FloatSlider(fixed[name], min=low, max=high, step=step, continuous_update=False)
        for name, (low, high, step) in sliders.items()
    }
    return ipywidgets.interactive(lambda **values: display(draw(**values)), **controls)


def explore_pose(projector: Projector, snr: float = 0.1, seed: int = 0) -> Any:
    """One particle turned by hand: the clean image, and the noisy one at an SNR."""

    def draw(rot: float, tilt: float, psi: float, log_snr: float) -> plots.Figure:
        clean = projector.project(euler_to_matrix(torch.tensor([[rot, tilt, psi]])))
        noisy, _ = add_noise(clean, 10**log_snr, "white", torch.Generator().manual_seed(seed))
        return plots.images({f"rot {rot:.0f}°, tilt {tilt:.0f}°": clean, f"SNR {10**log_snr:.2g}": noisy}, n=1)

    sliders = {
        "rot": (-180.0, 180.0, 5.0),
        "tilt": (0.0, 180.0, 5.0),
        "psi": (-180.0, 180.0, 5.0),
        "log_snr": (-2.5, 1.0, 0.1),
    }
    start = float(torch.tensor(snr).log10())
    return _explore(draw, sliders, rot=30.0, tilt=70.0, psi=0.0, log_snr=start)
