"""``cryobench new-method``: the one file of a method, its notebook and its test, from a template that passes."""

from __future__ import annotations

import json
import keyword
import re
from pathlib import Path

from cryobench.errors import CryobenchError
from cryobench.methods.registry import all_methods
from cryobench.paths import project_root

METHOD = '''"""NAME: say in one sentence what it does, and cite its paper."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cryobench.methods.base import Denoiser


@dataclass(frozen=True)
class Config:
    """Every hyper-parameter, typed, with the paper's value as default.

    strength: 1 shrinks each image towards its mean by the factor that minimises the expected error.
    """

    strength: float = 1.0


class Method(Denoiser):
    """Start from this: shrink each image towards its own mean (replace it by the method)."""

    name = "NAME"
    paper = ""
    supervision = "sigma"  # what it may see: none, sigma, noisy, noisy-pairs, clean-pairs or reference
    Config = Config

    def denoise(self, images: Tensor, sigma: float | None = None) -> Tensor:
        """Denoise images (n, h, w); sigma is the noise standard deviation in their units."""
        mean = images.mean(dim=(1, 2), keepdim=True)
        variance = images.var(dim=(1, 2), keepdim=True).clamp(min=1e-30)
        gain = (1 - self.config.strength * (sigma or 0.0) ** 2 / variance).clamp(min=0)
        return mean + gain * (images - mean)
'''

TEST = '''"""NAME against a closed form."""

import torch

from cryobench.methods.MODULE import Config, Method


def test_error_is_that_of_the_best_shrinkage():
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(20, 65, 48, generator=generator)
    noisy = clean + 2 * torch.randn(20, 65, 48, generator=generator)
    error = (Method(Config()).denoise(noisy, 2.0) - clean).square().mean()
    # variances 1 (signal) and 4 (noise): the best factor is 1/5, and leaves 4/5 of the signal's variance
    assert abs(float(error) - 0.8) < 0.02
'''

CELLS = (
    ("markdown", "# NAME\n\nWhat it does, step by step, with the equations of the paper."),
    (
        "parameters",
        'table = "zhang2024"\nspecimen = "channel"\nprofile = "quick"\nseed = 0\ndevice = "auto"\nresults = ""',
    ),
    (
        "code",
        "from cryobench import plots\nfrom cryobench.bench.session import Run\n\n"
        'run = Run(table, specimen, "NAME", profile, seed, device, results)\nprint(run.describe())',
    ),
    ("markdown", "## The result"),
    ("code", "method = run.fit()\nplots.result(run)"),
    ("code", "plots.ring_correlation(run)"),
    (
        "markdown",
        "## What it invents\n\nPure noise of the same kind goes in. What comes out, and which projection of the "
        "structure comes nearest to it? Beside\nit, ring by ring, the power of signal, noise and bias.",
    ),
    (
        "code",
        "from cryobench.cards import invention_card, invention_text\n\nprint(invention_text(run))\ninvention_card(run)",
    ),
    ("markdown", "## The record"),
    ("code", "record = run.record()\nprint(run.summary())"),
    ("markdown", "Every chapter ends in assertions about its own result."),
    (
        "code",
        "from cryobench.metrics.images import mse\n\n"
        'assert record["metrics"]["fair"]["mse"]["mean"] < float(mse(run.noisy, run.clean).mean())',
    ),
)


def write_method(name: str) -> list[Path]:
    """Write the three files of a method called ``name`` (lower case, digits, hyphens).

    Raises CryobenchError for a name that is taken or not allowed, or where a file is in the way.
    """
    module = name.replace("-", "_")
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or keyword.iskeyword(module):
        raise CryobenchError(f"{name!r} is no name for a method: use lower-case letters, digits and hyphens")
    if name in all_methods():
        raise CryobenchError(f"there is a method {name!r} already")
    root = project_root()
    files = {
        root / "cryobench" / "methods" / f"{module}.py": METHOD.replace("NAME", name),
        root / "notebooks" / "methods" / f"{name}.ipynb": _notebook(name),
        root / "tests" / f"test_{module}.py": TEST.replace("NAME", name).replace("MODULE", module),
    }
    if not (root / "tests").is_dir():
        raise CryobenchError("new methods are written into a clone of the repository, and this is an installed package")
    for path in files:
        if path.exists():
            raise CryobenchError(f"{path} is in the way")
    for path, text in files.items():
        path.write_text(text)
    return list(files)


def _notebook(name: str) -> str:
    cells = []
    for number, (kind, source) in enumerate(CELLS):
        code = kind != "markdown"
        cell = {
            "cell_type": "code" if code else "markdown",
            "id": f"cell-{number:02d}",
            "metadata": {"tags": ["parameters"]} if kind == "parameters" else {},
            "source": source.replace("NAME", name).splitlines(keepends=True),
        }
        cells.append({**cell, "execution_count": None, "outputs": []} if code else cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    book = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(book, indent=1, ensure_ascii=False) + "\n"
