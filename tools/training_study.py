"""The measurements behind the chapter "training": quality against steps, and what each choice is worth.

    python tools/training_study.py [--only WORD]     # fits what is not yet in results/shipped/training.json

Every row is a fit of a table's method with some options, on the images of ``zhang2024`` (profile quick, specimen
channel, seed 0), scored on its test images. Rows of other code or data are fitted again.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import study
import torch
from torch import Tensor

from cryobench.bench import records
from cryobench.bench.experiment import Cell, Experiment
from cryobench.bench.keys import digest
from cryobench.imaging.particles import stream_seed
from cryobench.imaging.training_data import TrainingData, augmented
from cryobench.methods.base import Budget
from cryobench.metrics.bootstrap import summarise
from cryobench.metrics.conventions import score
from cryobench.paths import project_root

FILE = project_root() / "results" / "shipped" / "training.json"
SHARES = (1 / 8, 1 / 4, 1 / 2, 1, 2)
CWF = {"start": "cwf"}
#: what the curves are read against
LEVELS = ("bm3d", "cwf", "bayes")
#: name, method, options, multiples of the quick budget, data ("fresh", "fixed" or "fixed views")
CURVES: list[tuple[str, str, dict[str, Any], tuple[float, ...]]] = [
    ("unet", "unet", {}, (*SHARES, 4)),
    ("unet from CWF", "unet", CWF, SHARES),
    ("noise2noise", "noise2noise", {}, SHARES),
    ("noise2noise from CWF", "noise2noise", CWF, (1 / 8, 1 / 2, 1)),
    ("dncnn", "dncnn", {}, (1 / 4, 1, 2)),
    ("restore", "restore", {}, (1 / 4, 1)),
    ("score", "score", {}, (1 / 4, 1)),
]
ABLATIONS: list[tuple[str, dict[str, Any], str]] = [
    ("2,000 images, the same views and noise in every epoch", {}, "fixed"),
    ("2,000 views with fresh noise", {}, "fixed views"),
    ("patches of 8 px", {"patch": 8, "widths": (64, 128)}, "fresh"),
    ("half the channels", {"widths": (16, 32, 64)}, "fresh"),
    ("twice the channels", {"widths": (64, 128, 256)}, "fresh"),
    ("with group normalisation", {"norm": True}, "fresh"),
    ("constant learning rate", {"final_rate": 1.0}, "fresh"),
    ("without the average over weights", {"ema": 0.0}, "fresh"),
    ("without the mean over turns", {"self_ensemble": False}, "fresh"),
    ("batches of 16, half the steps", {"batch_size": 16, "steps": 1000}, "fresh"),
]


class FixedViews(TrainingData):
    """The stack's clean images with new noise in every batch."""

    def batch(self, step: int, batch_size: int, seed: int, device: Any = "cpu") -> tuple[Tensor, Tensor]:
        (clean,) = augmented((self.clean,), batch_size, stream_seed(seed, step, "choice"))
        generator = torch.Generator().manual_seed(stream_seed(seed, step, "noise"))
        return clean + self.sigma * torch.randn(clean.shape, generator=generator), clean


def experiment(method: str, options: dict[str, Any], share: float = 1.0) -> Experiment:
    cell = Cell("zhang2024", "channel", method, "quick", 0)
    steps = options.get("steps", getattr(Experiment(cell).config, "steps", None))
    return Experiment(cell, "cpu", {**options, "steps": max(1, round(share * steps))} if steps else options)


def training_data(run: Experiment, data: str) -> TrainingData:
    if data == "fresh":
        return run.train
    kind = FixedViews if data == "fixed views" else TrainingData
    particles = run._particles[0]
    return kind("clean-pairs", particles.noisy, particles.clean, particles.sigma, run.simulation.pixel_size)


def rows() -> list[dict[str, Any]]:
    curves = [
        {"part": "curve", "name": name, "method": method, "options": options, "share": share, "data": "fresh"}
        for name, method, options, shares in CURVES
        for share in shares
    ]
    ablations = [
        {"part": "ablation", "name": name, "method": "unet", "options": options, "share": 1, "data": data}
        for name, options, data in ABLATIONS
    ]
    levels = [
        {"part": "level", "name": name, "method": name, "options": {}, "share": 1, "data": "fresh"} for name in LEVELS
    ]
    return sorted([*levels, *curves, *ablations], key=lambda row: row["share"])


def measure(row: dict[str, Any], run: Experiment) -> dict[str, Any]:
    method = run.method_class(run.config, "cpu", stream_seed(0, row["method"]) % 2**31)
    started = time.process_time()
    method.fit(training_data(run, row["data"]), Budget(progress=True))
    seconds = time.process_time() - started
    denoised = method.denoise(run.test.noisy, run.test.sigma)
    values = score("fair", denoised, run.test.clean)
    return {
        "steps": method.info.get("steps", 0),
        "images": method.info.get("steps", 0) * method.info.get("batch_size", 0),
        "cpu_seconds": round(seconds, 1),
        "parameters": sum(w.numel() for w in method.state.values()),
        "flop_per_image": method.info.get("flop_per_image"),
        "psnr": summarise(values["psnr"]),
        "mse": summarise(values["mse"]),
        "psnr_per_image": records.pack(values["psnr"].numpy()),
        "machine": records.machine("cpu"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="rows whose part (curve, ablation, level) or name contains this")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for row in rows():
        if args.only not in f"{row['part']} {row['name']}":
            continue
        run = experiment(row["method"], row["options"], row["share"])
        row = json.loads(json.dumps({**row, "key": digest([row, run.inputs()])}))
        if study.known(FILE, row):
            continue
        found = measure(row, run)
        study.add(FILE, row, found)
        print(row["name"], row["share"], found["psnr"]["mean"], found["cpu_seconds"], flush=True)


if __name__ == "__main__":
    main()
