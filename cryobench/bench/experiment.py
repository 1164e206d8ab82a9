"""One cell of a table as a computation: data, fit, denoise, score. Everything heavy is cached by content."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cryobench.bench.keys import code_hashes, digest
from cryobench.bench.tables import PROFILES, TableSpec, load_table
from cryobench.errors import CryobenchError
from cryobench.imaging.ctf import ContrastTransfer
from cryobench.imaging.particles import Particles, Simulation, Simulator, stream_seed
from cryobench.imaging.training_data import TrainingData
from cryobench.methods.base import Budget, Denoiser
from cryobench.methods.registry import get_method
from cryobench.metrics.bias import Powers, best_filter, powers
from cryobench.metrics.bootstrap import summarise
from cryobench.metrics.conventions import CONVENTIONS, score
from cryobench.metrics.invention import PureNoise, pure_noise
from cryobench.metrics.spectral import frc
from cryobench.paths import cache_dir
from cryobench.specimens.catalog import Structure, resolve

#: what a legacy convention feeds to a method costs another pass: this many test images carry it
LEGACY_IMAGES = 64
#: images of pure noise, test particles seen twice, projections compared with; the first two are halved for
#: methods that say they are ``costly``
NOISE_IMAGES, PAIRS, PROJECTIONS = 32, 64, 500
#: the code that makes a structure a volume
DENSITY_CODE = tuple(f"cryobench.specimens.{name}" for name in ("atoms", "density", "maps", "phantoms"))
#: supervision of the methods that a convention may feed its own version of the noisy images; a network
#: trained on clean images knows their scale, so that its output is scored on the convention's scale instead
CLASSICAL = ("none", "sigma", "noisy")


def pick_device(name: str = "auto") -> str:
    """ "auto" is the GPU where torch sees one. Raises CryobenchError for a device that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise CryobenchError(f"unknown device {name!r}: use auto, cpu, cuda or cuda:1")
    if name != "cpu" and not torch.cuda.is_available():
        raise CryobenchError("no CUDA device is visible to torch: use --device cpu, or see `cryobench doctor`")
    return name


@dataclass(frozen=True)
class Cell:
    """Coordinates of one number."""

    table: str
    specimen: str
    method: str
    profile: str = "quick"
    seed: int = 0


@dataclass(frozen=True)
class Invention:
    """What a method makes of pure noise, and signal, bias and noise of its output.

    total, rings: with signal and bias from the truth; pairs: the total from pairs of exposures alone, as on real data.
    """

    noise: PureNoise
    total: Powers
    rings: Powers
    pairs: Powers

    def numbers(self) -> dict[str, float | None]:
        """For the record; None for what is infinite, as the SNR of images without noise."""
        values = {
            "noise_energy": self.noise.energy,
            "noise_passed": self.noise.passed,
            "noise_correlation": float(self.noise.correlation.mean()),
            "noise_correlation_null": float(self.noise.null.mean()),
            "noise_correlation_z": self.noise.z,
            "einstein": self.noise.einstein,
            "einstein_null": self.noise.einstein_null,
            "einstein_raw": self.noise.einstein_raw,
            "snr": float(self.total.snr),
            "snbr": float(self.total.snbr),
            "snbr_scale_free": float(self.total.snbr_scale_free),
            "snbr_scale_free_pairs": float(self.pairs.snbr_scale_free),
            "snbr_scale_free_filter": best_filter(self.rings, tuple(self.noise.noise.shape[1:])),
            "gain": float(self.total.gain),
        }
        return {k: float(f"{v:.6g}") if math.isfinite(v) else None for k, v in values.items()}

    def spectra(self) -> dict[str, list[float]]:
        """Powers per ring for the record, squared units of the images."""
        rings = self.rings
        curves = {"signal": rings.signal, "noise_in": rings.noise, "noise_out": rings.noise_out, "bias": rings.bias}
        return {k: [float(f"{x:.5g}") for x in v.tolist()] for k, v in curves.items()}


class Experiment:
    """The computation behind one cell. Raises CryobenchError for unknown names or options."""

    def __init__(self, cell: Cell, device: str = "cpu", options: dict[str, Any] | None = None) -> None:
        if cell.profile not in PROFILES:
            raise CryobenchError(f"no profile {cell.profile!r}; there are: {', '.join(PROFILES)}")
        self.cell = cell
        self.spec: TableSpec = load_table(cell.table)
        self.device = pick_device(device)
        self.method_class: type[Denoiser] = get_method(cell.method)
        self.config = self.method_class.config_for(cell.profile, **(options or {}))
        self.structure: Structure = resolve(cell.specimen)
        self.counts = self.spec.profiles[cell.profile]
        size = self.counts["size"]
        settings = {**self.spec.simulation, **self.spec.specimens.get(cell.specimen, {}).get("simulation", {})}
        self.simulation = Simulation(size, self.structure.pixel_size(size), **settings)

    def inputs(self) -> dict[str, Any]:
        """All that the result depends on, as plain data: the run's key is its digest."""
        return {
            "code": code_hashes(__name__, self.method_class.__module__),
            "config": dataclasses.asdict(self.config),
            "data": self.data_inputs(),
            "seed": self.cell.seed,
            "device_class": self.device.split(":")[0],
            "conventions": list(self.spec.conventions),
        }

    def data_inputs(self) -> dict[str, Any]:
        return {
            "structure": self.structure.fingerprint,
            "simulation": dataclasses.asdict(self.simulation),
            "n_train": self.counts["n_train"],
            "n_test": self.counts["n_test"],
        }

    @cached_property
    def volume(self) -> Tensor:
        """Density (size, size, size) of the structure, kept in the cache between runs."""
        size, pixel = self.simulation.size, self.simulation.pixel_size
        code = code_hashes(*DENSITY_CODE)
        path = cache_dir() / "volumes" / f"{digest([self.structure.fingerprint, size, pixel, code])[:24]}.pt"
        if path.exists():
            return torch.load(path, weights_only=True)
        volume, _ = self.structure.density(size, pixel)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.part")
        torch.save(volume, partial)
        partial.replace(path)
        return volume

    @cached_property
    def simulator(self) -> Simulator:
        return Simulator(self.volume, self.simulation, self.device, self.structure.symmetry)

    @cached_property
    def _particles(self) -> tuple[Particles, Particles]:
        n_train, n_test = self.counts["n_train"], self.counts["n_test"]
        return self.simulator.simulate(n_train + n_test, self.cell.seed).split(n_train)

    @cached_property
    def train(self) -> TrainingData:
        """What the method may see, behind the gate of its supervision."""
        supervision = self.method_class.supervision
        return TrainingData.simulated(supervision, self._particles[0], self.simulator, self.cell.seed)

    @property
    def test(self) -> Particles:
        return self._particles[1]

    @property
    def test_ctf(self) -> ContrastTransfer | None:
        """Contrast transfer of the test images; None without CTF."""
        return self.simulator.contrast_transfer(self.test.defocus)

    def _first_ctf(self, n: int) -> ContrastTransfer | None:
        ctf = self.test_ctf
        return None if ctf is None else ctf[:n]

    @property
    def fit_folder(self) -> Path:
        """Where the cache keeps this very fit: ``weights.*`` when it is complete, ``checkpoint.pt`` before."""
        code = code_hashes("cryobench.imaging.training_data", *DENSITY_CODE, self.method_class.__module__)
        key = digest({**self.inputs(), "code": code, "conventions": None})[:24]
        return cache_dir() / "fits" / f"{self.cell.method}-{key}"

    def fit(self, budget: Budget | None = None) -> Denoiser:
        """The fitted method, from the cache where this very fit was made before; resumes a killed one."""
        cell, folder = self.cell, self.fit_folder
        weights = folder / "weights"
        if (folder / "weights.json").exists():
            return self.method_class.load(weights, self.device)
        method = self.method_class(self.config, self.device, stream_seed(cell.seed, cell.method) % 2**31)
        if budget is None:
            budget = Budget()
        started = time.perf_counter()
        method.fit(self.train, dataclasses.replace(budget, checkpoint=folder / "checkpoint.pt"))
        # a resumed fit states its own time, which counts the pieces before it
        method.info.setdefault("seconds", time.perf_counter() - started)
        if method.state:
            method.save(weights)
            (folder / "checkpoint.pt").unlink(missing_ok=True)
        return method

    def denoise(self, method: Denoiser, images: Tensor | None = None) -> tuple[Tensor, float]:
        """Denoised test images, or others as seen with the first CTFs, and the images per second it took."""
        images = self.test.noisy if images is None else images
        ctf = self._first_ctf(len(images))
        started = time.perf_counter()
        denoised = method.denoise(images, self.test.sigma, ctf)
        return denoised, len(images) / max(time.perf_counter() - started, 1e-9)

    def scores(self, method: Denoiser, denoised: Tensor) -> dict[str, dict[str, Tensor]]:
        """Per-image values: convention -> metric -> (n,). Legacy conventions may feed classical methods their way."""
        test = self.test
        found = {}
        for name in self.spec.conventions:
            prepare = CONVENTIONS[name].prepare
            if prepare is not None and method.supervision in CLASSICAL and method.equivariant:
                clean = test.clean[:LEGACY_IMAGES]
                noisy, sigma = prepare(clean, test.noisy[:LEGACY_IMAGES], test.sigma)
                made = method.denoise(noisy, sigma, self._first_ctf(len(noisy)))
                found[name] = score(name, made, clean, noisy, prepared=True)
            else:
                found[name] = score(name, denoised, test.clean, test.noisy)
        return found

    def statistics(self, scores: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, dict[str, Any]]]:
        return {c: {m: summarise(v, seed=self.cell.seed) for m, v in values.items()} for c, values in scores.items()}

    def spectral(self, denoised: Tensor, invention: Invention) -> dict[str, list[float]]:
        """Fourier ring correlation with the clean images, and the powers per ring."""
        return {
            "frc_clean": [round(float(v), 5) for v in frc(denoised, self.test.clean)],
            **invention.spectra(),
        }

    def invention(self, method: Denoiser, denoised: Tensor) -> Invention:
        """The method on boxes without a particle, and on a second exposure of some of the test particles.

        An empty box holds noise of the data's kind around the value of empty space; it is a new exposure less its
        clean images, so that Poisson noise still varies with them. denoised: the test images, already denoised.
        """
        test, seed = self.test, self.cell.seed
        share = 2 if method.costly else 1
        n, pairs = min(NOISE_IMAGES // share, len(test)), min(PAIRS // share, len(test))
        clean = test.clean[:n]
        exposure, _ = self.simulator.noisy(clean, stream_seed(seed, "pure noise"), test.sigma)
        projections, *_ = self.simulator.draw(PROJECTIONS, stream_seed(seed, "projections to compare with"))
        noise = pure_noise(lambda x: self.denoise(method, x)[0], exposure - clean + test.offset, projections, seed)
        clean = test.clean[:pairs]
        second, _ = self.simulator.noisy(clean, stream_seed(seed, "second exposure of the test"), test.sigma)
        stacks = (test.noisy[:pairs], second, denoised[:pairs], self.denoise(method, second)[0])
        total, rings = powers(*stacks, clean)
        return Invention(noise, total, rings, powers(*stacks)[0])


def data_hash(particles: Particles) -> str:
    """sha256 of the very images that were scored."""
    import hashlib

    digester = hashlib.sha256()
    for stack in (particles.clean, particles.noisy):
        digester.update(stack.contiguous().numpy().tobytes())
    return digester.hexdigest()
