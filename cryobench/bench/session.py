"""A run as a method's notebook sees it: open, look, fit, denoise, score, record."""

from __future__ import annotations

import dataclasses
import resource
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cryobench.bench import records
from cryobench.bench.experiment import Cell, Experiment, Invention, data_hash
from cryobench.bench.keys import digest, notebook_hash
from cryobench.bench.plan import notebook_of, path_of
from cryobench.methods.base import Budget, Denoiser
from cryobench.metrics.conventions import score


class Run:
    """One cell of a table, step by step.

    table, specimen, method, profile, seed, device: see ``cryobench run``. results: folder that
    :meth:`record` writes to; empty, it writes nothing. options: hyper-parameters that differ from the
    method's own, by name. Raises CryobenchError for anything unknown.
    """

    def __init__(
        self,
        table: str,
        specimen: str,
        method: str,
        profile: str = "quick",
        seed: int = 0,
        device: str = "auto",
        results: str = "",
        options: dict[str, Any] | None = None,
    ) -> None:
        self.cell = Cell(table, specimen, method, profile, seed)
        self.results = results
        self._options = options
        self.experiment = Experiment(self.cell, device, options)

    @property
    def config(self) -> Any:
        return self.experiment.config

    @property
    def sigma(self) -> float:
        """Noise standard deviation of the images."""
        return self.experiment.test.sigma

    @property
    def clean(self) -> Tensor:
        """Clean test images (n, size, size), for scoring and for figures; no method sees them."""
        return self.experiment.test.clean

    @property
    def noisy(self) -> Tensor:
        """Noisy test images (n, size, size)."""
        return self.experiment.test.noisy

    @property
    def pixel_size(self) -> float:
        return self.experiment.simulation.pixel_size

    def describe(self) -> str:
        """What these data are, in words: shown at the top of every chapter."""
        sim, counts, spec = self.experiment.simulation, self.experiment.counts, self.experiment.spec
        stands_in = spec.stands_in(self.cell.specimen)
        name = f"{self.cell.specimen} (stand-in for {stands_in})" if stands_in else self.cell.specimen
        return (
            f"{name}: {counts['n_test']} test and {counts['n_train']} training images of {sim.size} px at "
            f"{sim.pixel_size:g} A, SNR {sim.snr:g} = var(clean)/var(noise) over the whole stack, {sim.noise} noise, "
            f"{'CTF' if sim.ctf else 'no CTF'}, sigma {self.sigma:.4f}, seed {self.cell.seed}, profile "
            f"{self.cell.profile}"
        )

    def fit(self) -> Denoiser:
        """The method, fitted on what its supervision allows; shows progress to a reader, not to a record."""
        return self.method

    @cached_property
    def method(self) -> Denoiser:
        return self.experiment.fit(Budget(progress=not self.results))

    @cached_property
    def _denoised(self) -> tuple[Tensor, float]:
        return self.experiment.denoise(self.method)

    def denoise(self) -> Tensor:
        """Denoised test images (n, size, size)."""
        return self._denoised[0]

    @cached_property
    def _invention(self) -> Invention:
        return self.experiment.invention(self.method, self.denoise())

    def invention(self) -> Invention:
        """What the method makes of pure noise; signal, bias and noise of its output."""
        return self._invention

    @cached_property
    def per_image(self) -> dict[str, dict[str, Tensor]]:
        """Scores of every test image: convention -> metric -> (n,)."""
        return self.experiment.scores(self.method, self.denoise())

    def scores(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Mean, standard deviation, n and 95 % interval: convention -> metric."""
        return self.experiment.statistics(self.per_image)

    def summary(self) -> str:
        """Fair scores of the noisy and the denoised images in words, with 95 % intervals."""
        before = self.experiment.statistics({"fair": score("fair", self.noisy, self.clean)})["fair"]
        after = self.scores()["fair"]
        lines = [f"{'':<10} {'noisy':>10} {'denoised':>10}   95 % interval"]
        for metric in before:
            low, high = after[metric]["ci95"]
            interval = "" if low is None else f"{low:.4g} .. {high:.4g}"
            lines.append(f"{metric:<10} {before[metric]['mean']:>10.4g} {after[metric]['mean']:>10.4g}   {interval}")
        return "\n".join(lines)

    def record(self) -> dict[str, Any]:
        """The record of this run; written below ``results`` where one is named."""
        experiment, cell, method = self.experiment, self.cell, self.method
        inputs = {**experiment.inputs(), "notebook_hash": notebook_hash(notebook_of(cell.method))}
        record = {
            "schema": records.VERSION,
            **dataclasses.asdict(cell),
            "specimen": experiment.structure.name,
            "status": "done",
            "error": None,
            "config": inputs["config"],
            "supervision": method.supervision,
            "metrics": self.scores(),
            "per_image": {c: {m: records.pack(v.numpy()) for m, v in d.items()} for c, d in self.per_image.items()},
            "spectral": experiment.spectral(self.denoise(), self.invention()),
            "invention": self.invention().numbers(),
            "cost": {
                "fit_seconds": round(float(method.info.get("seconds", 0.0)), 3),
                "denoise_images_per_s": round(self._denoised[1], 2),
                "peak_memory_mb": _peak_memory_mb(experiment.device),
                "parameters": sum(t.numel() for t in method.state.values()),
            },
            "fit": method.info,
            "provenance": {
                "key": digest(inputs),
                "code_hash": digest(inputs["code"]),
                "code": inputs["code"],
                "data_hash": data_hash(experiment.test),
                "data": inputs["data"],
                "notebook_hash": inputs["notebook_hash"],
                "conventions": inputs["conventions"],
                **records.machine(experiment.device),
            },
        }
        if self.results:
            path = path_of(cell, Path(self.results))
            stacks = {"clean": self.clean, "noisy": self.noisy, "denoised": self.denoise()}
            records.write_samples(path, {k: v[: records.SAMPLES].numpy() for k, v in stacks.items()})
            records.write_record(path, record)
        return record


def _peak_memory_mb(device: str) -> float:
    if device.startswith("cuda"):
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, 1)
