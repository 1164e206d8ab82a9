"""How em3d grows and where it breaks down: the measurements behind its chapter's last figures.

    python tools/em3d_study.py [--only WORD] [--device cuda] [--file FILE] [--structure NAME=FILE ...]

Each row is a fit to simulated particles (white noise, no CTF; SNR per pixel over the whole box) scored on 256 others:
gain over the noisy images, beside that of the Bayes limit and of em3d's own posterior with the true volume. Rows of the
part "start" are first volumes alone, from one half of the images, against the truth; they take more structures by name
and file. What is not yet in FILE (results/shipped/em3d.json), or was made by other code, is measured.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import study
import torch
from torch import Tensor

from cryobench.bench import records
from cryobench.bench.experiment import Cell, Experiment
from cryobench.bench.keys import digest
from cryobench.imaging.particles import Simulation
from cryobench.imaging.slices import resized
from cryobench.methods.base import Budget, Denoiser
from cryobench.methods.em3d import Method
from cryobench.methods.em_align import align
from cryobench.methods.em_fit import SAME, Fit
from cryobench.methods.registry import get_method
from cryobench.metrics.bootstrap import summarise
from cryobench.paths import project_root
from cryobench.reconstruction.fsc import fsc

FILE = project_root() / "results" / "shipped" / "em3d.json"
TEST = 256
SEEDS = range(3)
#: images that a first volume is made from (in all: each half makes one)
START = 3000


def row(
    part: str, n: int, specimen: str = "channel", size: int = 64, snr: float = 0.1, symmetry: str = "C1", seed: int = 0
) -> dict[str, Any]:
    return {
        "part": part, "specimen": specimen, "n": n, "size": size, "snr": snr, "symmetry": symmetry, "seed": seed,
    }  # fmt: skip


def rows(structures: list[str]) -> Iterator[dict[str, Any]]:
    for seed in SEEDS:
        for n in (300, 1000, 3000, 20000):
            yield row("images", n, seed=seed)
        yield row("images", 3000, symmetry="C4", seed=seed)
        yield row("size", 20000, size=128, symmetry="C4", seed=seed)
    yield row("size", 20000, size=128)
    yield row("images", 20000, specimen="transporter")
    for n in (10000, 20000):
        yield row("size", n, size=128, specimen="transporter", symmetry="C2")
    for snr in (0.05, 0.02, 0.01):
        for n in (3000, 20000):
            yield row("snr", n, snr=snr)
    for size in (32, 48, 96, 128):
        yield row("size", 3000, size=size)
    for specimen in ("channel", "transporter", *structures):
        for seed in range(10):
            yield row("start", START, seed=seed, specimen=specimen)


def experiment(row: dict[str, Any], method: str, device: str, file: str) -> Experiment:
    options = {"symmetry": row["symmetry"]} if method == "em3d" else {}
    run = Experiment(Cell("zhang2024", file, method, "quick", row["seed"]), device, options)
    run.counts = {"size": row["size"], "n_train": row["n"], "n_test": TEST}
    run.simulation = Simulation(row["size"], run.structure.pixel_size(row["size"]), snr=row["snr"])
    return run


def timed(run: Experiment, work: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    result = work()
    if run.device.startswith("cuda"):
        torch.cuda.synchronize()
    return result, round(time.perf_counter() - started, 2)


def gain(run: Experiment, denoised: Tensor) -> dict[str, Any]:
    """Decibels over the noisy images: of the mean squared error, with its 95 % interval over images."""
    errors = (denoised - run.test.clean).square().mean((1, 2)) / run.test.sigma**2
    summary = summarise(errors)
    low, high = summary["ci95"]
    interval = [-10 * math.log10(max(error, 1e-9)) for error in (high, low)]
    return {"mean": -10 * math.log10(summary["mean"]), "ci95": interval, "per_image": records.pack(errors.numpy())}


def limit(run: Experiment) -> dict[str, Any]:
    """The Bayes-optimal denoiser on the same images."""
    found = get_method("bayes")(get_method("bayes").config_for("quick"), run.device)
    reference = Experiment(Cell("zhang2024", run.cell.specimen, "bayes", "quick", run.cell.seed), run.device)
    reference.counts, reference.simulation = run.counts, run.simulation
    found.fit(reference.train, Budget(progress=False))
    return gain(run, run.denoise(found)[0])


def of_fit(run: Experiment) -> dict[str, Any]:
    """A whole fit, scored."""
    run.train  # noqa: B018  made before the clock starts
    if run.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    method: Denoiser = Method(run.config, run.device, run.cell.seed)
    _, seconds = timed(run, lambda: method.fit(run.train, Budget(progress=True)))
    peak = torch.cuda.max_memory_allocated() if run.device.startswith("cuda") else 1024 * memory()
    (denoised, _), applied = timed(run, lambda: run.denoise(method))
    true = run.volume.to(method.device) * run.test.scale
    move = align(true, method.state["volume"], min(20, len(true) // 3))
    curve = fsc(true.cpu(), move.apply(method.state["volume"]).cpu())
    with_truth = Method(run.config, run.device, run.cell.seed)
    with_truth.state, with_truth.info = {**method.state, "volume": true}, {**method.info, "heat": 1.0}
    below = (curve[1:] < 0.5).nonzero()
    return {
        "gain": gain(run, denoised), "known_volume": gain(run, run.denoise(with_truth)[0]), "limit": limit(run),
        "fit_seconds": seconds, "apply_seconds": applied, "peak_bytes": int(peak),
        "ring_of_half_correlation": int(below[0]) if len(below) else len(curve) - 1,
        "info": {k: v for k, v in method.info.items() if k not in ("offset", "level")},
    }  # fmt: skip


def of_start(run: Experiment) -> dict[str, Any]:
    """A half's first volume against the truth; where it is wrong, what the whole fit makes of it."""
    method = Method(run.config, run.device, run.cell.seed)
    views = method.views_of(run.train)
    fit = Fit(views, run.config, run.cell.seed, Budget(progress=False))
    (volume, evidence), seconds = timed(run, lambda: fit.first_volume(0))
    true = run.volume.to(method.device) * run.test.scale

    def correlation(found: Tensor) -> float:
        return align(resized(true, len(found)), found, run.config.start_band).correlation

    result = {"correlation": correlation(volume), "evidence": evidence, "fit_seconds": seconds}
    if result["correlation"] < SAME:
        fit.run()
        assert fit.result is not None
        result |= {"after_fit": correlation(fit.result.whole), "starts": len(fit.at["starts"])}
    return result


def memory() -> int:
    """Kilobytes that this process held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="rows whose description contains this, as in 'n=300 '")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--file", type=Path, default=FILE)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no row after so many")
    parser.add_argument("--structure", action="append", default=[], metavar="NAME=FILE")
    args = parser.parse_args()
    files = dict(pair.split("=", 1) for pair in args.structure)
    for asked in rows(list(files)):
        name = " ".join([asked["part"], *(f"{k}={v}" for k, v in asked.items() if k != "part"), ""])
        if args.only not in name or time.perf_counter() - STARTED > args.seconds:
            continue
        run = experiment(asked, "em3d", args.device, files.get(asked["specimen"], asked["specimen"]))
        keyed = json.loads(json.dumps({**asked, "device": args.device, "key": digest([asked, run.inputs()])}))
        if study.known(args.file, keyed):
            continue
        found = of_start(run) if asked["part"] == "start" else of_fit(run)
        made = {"code": digest(run.inputs()["code"]), "machine": records.machine(run.device)}
        study.add(args.file, keyed, found | made)
        shown = f"correlation {found['correlation']:.4f}" if asked["part"] == "start" else (
            f"gain {found['gain']['mean']:.2f} dB, volume known {found['known_volume']['mean']:.2f}, "
            f"limit {found['limit']['mean']:.2f}"
        )  # fmt: skip
        print(f"{name}{shown}, {found['fit_seconds']:.0f} s", flush=True)


STARTED = time.perf_counter()
if __name__ == "__main__":
    main()
