"""em3d beside RELION on the same stack, from noisy images to a map: FSC against the truth, what images gain, and time.

    python tools/relion_study.py [--n 3000] [--symmetry C1] [--seed 0] [--file FILE] [--work FOLDER]

RELION (3.1, from the PATH) makes an initial model by stochastic gradient descent and refines it with auto-refine. Both
are told what em3d is told, that particles are centred and without CTF. So that it ends on a CPU, the descent is
shortened (120 iterations for 300, up to 300 images for 500, 30 A for 15 A), and no grid is sampled twice
(--oversampling 0). Each map, on the scale of the truth, then denoises 256 other images with em3d's caution. RELION
leaves the noise beside the particle to a mask that its user makes; em3d's filter needs none. Time is taken by the clock
and as processor time, which other programs on the machine disturb less (of RELION's refinement a third of it is the
waiting of the process that leads the other two).
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import em3d_study
import numpy as np
import study
import torch
from torch import Tensor

from cryobench.bench import records
from cryobench.bench.experiment import Experiment
from cryobench.bench.keys import digest
from cryobench.errors import CryobenchError
from cryobench.methods.base import Budget
from cryobench.methods.em3d import Method
from cryobench.methods.em_align import align
from cryobench.paths import project_root
from cryobench.reconstruction.fsc import fsc
from cryobench.specimens.maps import read_map
from cryobench.specimens.mrc import write_mrc
from cryobench.specimens.particle_star import ParticleTable, write_particles

FILE = project_root() / "results" / "shipped" / "relion.json"


def write_stack(run: Experiment, folder: Path) -> None:
    """The noisy images as RELION wants them: background 0, noise 1, particles bright."""
    train = run.train
    images = (train.noisy - run.test.offset) / train.sigma
    write_mrc(folder / "p.mrcs", images.numpy(), train.pixel_size)
    n, size = len(images), images.shape[-1]
    table = ParticleTable(
        ["p.mrcs"] * n, np.arange(n), np.full(n, train.pixel_size), image_size=np.full(n, size),
        voltage=np.full(n, 300.0), cs=np.full(n, 2.7), amplitude_contrast=np.full(n, 0.1),
    )  # fmt: skip
    write_particles(folder / "p.star", table)


def clock() -> tuple[float, float]:
    """Seconds by the clock and of processor time, of this process and those it has called."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter(), time.process_time() + used.ru_utime + used.ru_stime


def since(start: tuple[float, float]) -> dict[str, float]:
    return {
        name: round(now - then, 1)
        for name, now, then in zip(("seconds", "processor_seconds"), clock(), start, strict=True)
    }


def relion(run: Experiment, folder: Path, symmetry: str, seed: int) -> dict[str, tuple[Tensor, dict[str, float]]]:
    """The map (d, d, d) after each of RELION's two steps, and the time until then; a step that is done is not done
    again."""
    box = run.train.noisy.shape[-1] * run.train.pixel_size
    common = ["--i", "p.star", "--zero_mask", "--flatten_solvent"]
    common += ["--oversampling", "0", "--offset_range", "0", "--offset_step", "1", "--offset", "0.1"]
    common += ["--random_seed", str(seed + 1), "--dont_combine_weights_via_disc", "--preread_images", "--pool", "30"]
    first = ["relion_refine", *common, "--o", "./ini", "--sgd", "--denovo_3dref", "--K", "1", "--sym", "C1"]
    first += ["--particle_diameter", f"{0.9 * box:.1f}", "--healpix_order", "1", "--pad", "1"]
    first += ["--sgd_fin_resol", "30", "--sgd_fin_subset", "300", "--sgd_inbetween_iter", "50", "--sgd_fin_iter", "20"]
    first += ["--sgd_write_iter", "120"]
    volume = "ini_it120_class001.mrc"
    times = [_call(first, folder, volume)]
    found = {"RELION, initial": (_map(folder / volume, run), times[0])}
    if symmetry != "C1":
        align = ["relion_align_symmetry", "--i", volume, "--o", "axes.mrc", "--sym", symmetry]
        times.append(_call(align, folder, volume := "axes.mrc"))
    second = ["mpirun", "--allow-run-as-root", "--mca", "mpi_yield_when_idle", "1", "--oversubscribe", "-n", "3"]
    second += ["relion_refine_mpi", *common, "--o", "./ref", "--auto_refine", "--split_random_halves", "--ref", volume]
    second += ["--sym", symmetry, "--particle_diameter", f"{0.7 * box:.1f}", "--firstiter_cc", "--ini_high", "50"]
    second += ["--low_resol_join_halves", "40", "--norm", "--scale", "--healpix_order", "2"]
    second += ["--auto_local_healpix_order", "4", "--pad", "2"]
    times.append(_call(second, folder, "ref_class001.mrc"))
    total = {name: round(sum(t[name] for t in times), 1) for name in times[0]}
    return found | {"RELION, refined": (_map(folder / "ref_class001.mrc", run), total)}


def _call(command: list[str], folder: Path, result: str) -> dict[str, float]:
    """The time of a step; known where its result is there already."""
    note = folder / f"{result}.json"
    if not note.exists():
        start = clock()
        with (folder / "log").open("a") as log:
            done = subprocess.run(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
        if done.returncode:
            raise CryobenchError(f"{command[0]} failed:\n" + (folder / "log").read_text()[-2000:])
        note.write_text(json.dumps(since(start)))
    return json.loads(note.read_text())


def _map(path: Path, run: Experiment) -> Tensor:
    return torch.as_tensor(read_map(path)[0]) * run.train.sigma


def scored(run: Experiment, method: Method, volume: Tensor) -> dict[str, Any]:
    """A map against the truth, and as what em3d denoises with."""
    true = run.volume * run.test.scale
    move = align(true, volume, min(20, len(true) // 3), 30.0, shifts=True)
    moved = move.apply(volume)
    moved = moved * float((moved * true).sum() / moved.square().sum())  # each program has a scale of its own
    curve = fsc(true, moved)
    other = Method(run.config, run.device, run.cell.seed)
    other.state, other.info = {**method.state, "volume": moved}, method.info
    return {
        "gain": em3d_study.gain(run, run.denoise(other)[0]), "fsc": [round(float(x), 4) for x in curve],
        "correlation": move.correlation,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=3000)
    parser.add_argument("--symmetry", default="C1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--specimen", default="channel")
    parser.add_argument("--file", type=Path, default=FILE)
    parser.add_argument("--work", type=Path, help="RELION's folder, to be kept: a killed run goes on from there")
    args = parser.parse_args()
    if shutil.which("relion_refine_mpi") is None or shutil.which("mpirun") is None:
        sys.exit("relion_refine_mpi and mpirun are not on the PATH: install RELION (Debian: apt-get install relion)")
    row = em3d_study.row("relion", args.n, symmetry=args.symmetry, seed=args.seed, specimen=args.specimen)
    run = em3d_study.experiment(row, "em3d", "cpu", args.specimen)
    run.train  # noqa: B018  made before the clock starts
    row |= {"key": digest([row, run.inputs()])}
    method = Method(run.config, run.device, run.cell.seed)
    start = clock()
    method.fit(run.train, Budget(progress=True))

    def keep(name: str, volume: Tensor, spent: dict[str, float]) -> None:
        result = scored(run, method, volume)
        made = {"code": digest(run.inputs()["code"]), "machine": records.machine(run.device)}
        study.add(args.file, {**row, "program": name}, result | spent | made)
        print(f"{name}: {spent}, gain {result['gain']['mean']:.2f} dB, FSC", *result["fsc"][::4], flush=True)

    keep("em3d", method.state["volume"], since(start))
    with tempfile.TemporaryDirectory() as passing:
        folder = args.work or Path(passing)
        folder.mkdir(parents=True, exist_ok=True)
        write_stack(run, folder)
        for name, (volume, spent) in relion(run, folder, args.symmetry, args.seed).items():
            keep(name, volume, spent)


if __name__ == "__main__":
    main()
