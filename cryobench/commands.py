"""What each command of the command line does, in terms of the package. Imports wait until a command needs them."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryobench.errors import CryobenchError
from cryobench.outputs import output_path, refuse_clashes

if TYPE_CHECKING:
    from torch import Tensor

    from cryobench.bench.experiment import Cell
    from cryobench.specimens.catalog import Structure


def _say(text: str) -> None:
    """Progress and remarks go to stderr, so that stdout stays what was asked for."""
    print(text, file=sys.stderr, flush=True)


def _not_negative(args: Namespace, *names: str) -> None:
    for name in names:
        if not 0 <= (getattr(args, name) or 0) < math.inf:
            raise CryobenchError(f"--{name} must be zero or positive")


def _print_rows(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    widths = {k: max(len(k), *(len(str(r[k])) for r in rows)) for k in rows[0]} if rows else {}
    for row in [{k: k for k in widths}, *rows]:
        print("  ".join(f"{row[k]!s:<{w}}" for k, w in widths.items()).rstrip())


def list_things(args: Namespace) -> None:
    """Methods, tables, specimens or profiles."""
    rows: list[dict[str, Any]] = []
    if args.what == "methods":
        from cryobench.methods.registry import all_methods

        for name, m in all_methods().items():
            rows.append({"name": name, "supervision": m.supervision, "paper": m.paper, "trained": m.trained})
    elif args.what == "tables":
        from cryobench.bench.tables import load_table, table_names

        for spec in map(load_table, table_names()):
            source = spec.paper.get("doi") or f"arXiv {spec.paper.get('arxiv')}"
            rows.append({"name": spec.name, "source": source, "title": spec.paper["title"]})
    elif args.what == "profiles":
        from cryobench.bench.tables import PROFILES

        rows = [{"name": k, "for": v} for k, v in PROFILES.items()]
    else:
        from cryobench.specimens.catalog import ARCHIVE, BUILT_IN, available

        rows = [{"name": k, "source": "built-in", "here": True, "what": v[1]} for k, v in BUILT_IN.items()]
        for name, (entry, _, what) in ARCHIVE.items():
            rows.append({"name": name, "source": entry, "here": available(name), "what": what})
    _print_rows(rows, args.json)


def fetch(args: Namespace) -> int:
    """Download entries; one that fails does not stop the others."""
    from cryobench.paths import data_dir
    from cryobench.specimens.fetch import fetch as fetch_entry
    from cryobench.specimens.manifest import find_entry, load_manifest

    manifest = load_manifest()
    if not args.all and not args.entries:
        raise CryobenchError(f"name an entry or give --all; there are: {', '.join(manifest)}")
    chosen = [find_entry(name, manifest) for name in args.entries]
    if args.all:
        chosen += [e for e in manifest.values() if e.directory is None and e not in chosen]
    folder = Path(args.data_dir) if args.data_dir else data_dir()
    failed = 0
    for entry in chosen:
        try:
            for path in fetch_entry(entry, folder):
                print(path)
        except CryobenchError as error:
            _say(f"cryobench: {error}")
            failed += 1
    return 1 if failed else 0


def simulate(args: Namespace) -> None:
    """Noisy and clean stacks and a STAR file with poses, CTF and optics group."""
    from cryobench.bench.experiment import pick_device
    from cryobench.imaging.particles import Simulation, Simulator
    from cryobench.imaging.stacks import clean_name, write_particles_set

    if args.n < 1:
        raise CryobenchError("ask for at least one image (-n)")
    _not_negative(args, "shift", "contrast", "bfactor")
    output = output_path(args.output, (".mrcs", ".mrc"))
    refuse_clashes([output, clean_name(output)], [args.structure])
    device = pick_device(args.device)
    structure = _structure(args.structure, args.pixel_size, args.map_pixel_size)
    pixel_size = structure.pixel_size(args.size) if args.pixel_size is None else args.pixel_size
    fields = ("snr", "noise", "ctf", "shift", "contrast", "bfactor")
    simulation = Simulation(args.size, pixel_size, **{k: getattr(args, k) for k in fields})
    volume, notes = structure.density(args.size, pixel_size, args.resolution)
    for note in notes:
        _say(f"{structure.name}: {note}")
    particles = Simulator(volume, simulation, device).simulate(args.n, args.seed)
    origin = {"structure": structure.name, "fingerprint": structure.fingerprint, "seed": args.seed}
    for path in write_particles_set(output, particles, simulation, origin):
        print(path)
    _say(
        f"{args.n} images of {args.size} px at {pixel_size:g} A; SNR {args.snr:g} = var(clean)/var(noise), "
        f"sigma {particles.sigma:.6g}; clean = {particles.scale:.6g} * projection + {particles.offset:.6g}"
    )


def denoise(args: Namespace) -> None:
    """Denoise a stack or a micrograph; trains first where the method needs it."""
    from cryobench.bench.experiment import pick_device
    from cryobench.imaging.rotations import symmetry_matrices
    from cryobench.imaging.stacks import clean_name, read_ctf, read_images
    from cryobench.methods.apply import best_poses, prepare_method
    from cryobench.methods.noise_level import estimate_sigma
    from cryobench.reconstruction import em3d_files
    from cryobench.specimens.mrc import write_mrc

    profile = _profile(args)
    _not_negative(args, "sigma", "shift", "contrast")
    options = {name: value for name in ("shift", "contrast") if (value := getattr(args, name)) is not None}
    output = output_path(args.output, (".mrcs", ".mrc"))
    volume = output_path(args.map, (".mrc", ".map")) if args.map else None
    star = output_path(args.star, (".star",)) if args.star else None
    weights = output_path(args.save_weights) if args.save_weights else None
    taught = [path for name in args.train_on for path in (Path(name), clean_name(Path(name)))]
    inputs = [args.input, args.ctf, args.reference, *taught]
    em3d_files.check_outputs(args.method, args.weights, args.train_on, volume, star, output, inputs)
    images, pixel_size = read_images(args.input, args.pixel_size, args.ctf)
    ctf = read_ctf(args.ctf, args.input, images, pixel_size, args.pixel_size) if args.ctf else None
    sigma = estimate_sigma(images) if args.sigma is None else args.sigma
    reference = _structure(args.reference, args.pixel_size) if args.reference else None
    if args.symmetry:
        symmetry_matrices(args.symmetry)  # known, or an error
        if args.method == "em3d":
            options["symmetry"] = args.symmetry
        elif reference is None:
            raise CryobenchError("--symmetry is that of the reference: give --reference too")
        else:
            reference = dataclasses.replace(reference, symmetry=args.symmetry)
    method, kept = prepare_method(
        args.method,
        images,
        sigma,
        pixel_size,
        profile=profile,
        train_on=args.train_on,
        weights=args.weights,
        reference=reference,
        ctf=ctf,
        options=options,
        device=pick_device(args.device),
        seed=args.seed,
        say=_say,
    )
    if args.method == "em3d":
        for line in em3d_files.summary(method.info):
            _say(line)
    elif args.symmetry and method.info.get("symmetry") != args.symmetry:
        _say(f"the reference is not {args.symmetry} about its own axes and centre: its symmetry is not used")
    denoised = method.denoise(images, sigma, ctf)
    write_mrc(output, denoised.numpy(), pixel_size)
    if weights:
        method.save(weights)
    written = [output, *(em3d_files.write_maps(volume, method.state, method.info["pixel_size"]) if volume else [])]
    if star:
        em3d_files.write_poses(star, args.input, *best_poses(method), images.shape[-1], pixel_size, ctf)
        written.append(star)
    if kept:
        kept.unlink(missing_ok=True)
    known = "given" if args.sigma is not None else "estimated from the corners"
    _say(f"{method.name} ({method.supervision}): {len(images)} images, sigma {sigma:.6g} {known}")
    for path in written:
        print(path)


def evaluate(args: Namespace) -> None:
    """Scores with 95 % intervals and the Fourier ring correlation with the clean images."""
    from cryobench.imaging.stacks import read_images
    from cryobench.metrics.bootstrap import summarise
    from cryobench.metrics.conventions import CONVENTIONS, score, unit_range
    from cryobench.metrics.spectral import frc, resolution

    if args.convention not in CONVENTIONS:
        raise CryobenchError(f"no convention {args.convention!r}; there are: {', '.join(CONVENTIONS)}")
    clean, pixel_size = read_images(args.clean, args.pixel_size)
    stacks: dict[str, Tensor] = {}
    for name, path in (("denoised", args.output), ("noisy", args.noisy)):
        if path:
            stacks[name], other = read_images(path, args.pixel_size)
            shape = tuple(stacks[name].shape)
            if shape != clean.shape:
                raise CryobenchError(f"{name} images are {shape}, the clean ones {tuple(clean.shape)}")
            if abs(other / pixel_size - 1) > 1e-3:
                sizes = f"{path} has {other:g} A pixels, {args.clean} {pixel_size:g} A"
                raise CryobenchError(f"{sizes}: say which with --pixel-size")
    if clean.min() < -0.01 or clean.max() > 1.01 or clean.max() - clean.min() < 0.5:
        _say("the clean images do not fill [0, 1]: all stacks are brought there by one gain and offset")
        clean, *scaled = unit_range(clean, *stacks.values())
        stacks = dict(zip(stacks, scaled, strict=True))
    result: dict[str, Any] = {"convention": args.convention, "n": len(clean), "pixel_size": pixel_size}
    where: dict[str, str] = {}
    for name, stack in stacks.items():
        scores = {k: summarise(v) for k, v in score(args.convention, stack, clean, stacks.get("noisy")).items()}
        curve = frc(stack, clean)
        reached = resolution(curve, pixel_size, tuple(clean.shape[-2:]), 0.5)
        result[name] = {"metrics": scores, "frc_0.5_angstrom": reached}
        where[name] = f"at {reached:.2f} A" if reached else "in the first ring already"
        if curve[1:].min() >= 0.5:
            where[name] = f"nowhere up to Nyquist, {reached:.2f} A"
    if args.json:
        print(json.dumps(result, indent=1))
        return
    print(f"{len(clean)} images, convention {args.convention}, clean range {clean.min():.4g} .. {clean.max():.4g}")
    for name in stacks:
        print(f"{name}: FRC with the clean images falls below 0.5 {where[name]}")
        for metric, s in result[name]["metrics"].items():
            interval = "" if s["ci95"][0] is None else f"  [{s['ci95'][0]:.5g}, {s['ci95'][1]:.5g}]"
            mean = "infinite" if s["mean"] is None else f"{s['mean']:.5g}"
            print(f"  {metric:<10} {mean}{interval}")


def run(args: Namespace) -> int:
    """Run the cells of a table that have no valid record."""
    from cryobench.bench.runner import run_cells

    if args.jobs < 1:
        raise CryobenchError("--jobs must be at least 1")
    if args.scheduler:
        raise CryobenchError("--scheduler is not available in this version: use --jobs N on this machine")
    failed = run_cells(_cells(args), Path(args.results), args.device, args.jobs, _say)
    for cell, error in failed:
        _say(f"failed: {cell.table} {cell.specimen} {cell.method} seed {cell.seed}: {error}")
    return 1 if failed else 0


def status(args: Namespace) -> None:
    """State of every cell, and why."""
    from cryobench.bench.plan import state_shown
    from cryobench.bench.tables import load_table
    from cryobench.methods.registry import all_methods

    states = [state_shown(cell, Path(args.results)) for cell in _cells(args)]
    rows = [{**dataclasses.asdict(s.cell), "state": s.state, "why": s.why} for s in states]
    _print_rows(rows, args.json)
    for spec in map(load_table, args.table):
        unbuilt = [m for m in spec.methods if m not in all_methods()]
        if unbuilt and not args.method:
            _say(f"in {spec.name} but not built yet: {', '.join(unbuilt)}")


def table(args: Namespace) -> None:
    """Measured beside published."""
    from cryobench.bench.report import table_text

    for name in args.table:
        print(table_text(name, _profile(args), Path(args.results), args.format, args.convention, args.wide))


def reconstruct(args: Namespace) -> None:
    """A map and two half maps."""
    from cryobench.reconstruction.command import reconstruct_star

    output = output_path(args.output, (".mrc", ".map"))
    for path in reconstruct_star(Path(args.input), output, args.engine, args.symmetry, args.pixel_size, _say):
        print(path)


def fsc(args: Namespace) -> None:
    """Curve and resolution at 0.143 and 0.5."""
    from cryobench.reconstruction.command import fsc_of_maps

    result = fsc_of_maps(args.a, args.b, args.mask, args.pixel_size)
    if args.json:
        print(json.dumps(result, indent=1))
        return
    for frequency, value in zip(result["frequency"], result["fsc"], strict=True):
        print(f"{frequency:.5f} 1/A  {value:+.4f}")
    for threshold in ("0.143", "0.5"):
        reached = result["resolution"][threshold]
        whole = "not below it up to Nyquist, " if min(result["fsc"]) >= float(threshold) else ""
        print(f"FSC {threshold}: " + (f"{whole}{reached:.2f} A" if reached else "below it from the first shell on"))


def book(args: Namespace) -> None:
    """The static site."""
    from cryobench.bench.book import build_book

    print(build_book(_profile(args), Path(args.results), Path(args.output) if args.output else None, _say))


def new_method(args: Namespace) -> None:
    """A method's three files."""
    from cryobench.bench.new_method import write_method

    for path in write_method(args.name):
        print(path)


def doctor(args: Namespace) -> int:
    """What this machine has; exit code 1 if something needed is missing."""
    from cryobench.bench.doctor import examine

    rows = examine()
    _print_rows(rows, args.json)
    return 1 if any(r["state"] == "missing" for r in rows) else 0


def _cells(args: Namespace) -> list[Cell]:
    """The cells of the tables that are named, of what is asked for."""
    from cryobench.bench.plan import cells_of
    from cryobench.bench.tables import load_table

    specs = map(load_table, args.table)
    return [c for s in specs for c in cells_of(s, _profile(args), args.specimen, args.method, args.seeds)]


def _profile(args: Namespace) -> str:
    from cryobench.bench.tables import PROFILES

    if args.profile not in PROFILES:
        raise CryobenchError(f"no profile {args.profile!r}; there are: {', '.join(PROFILES)}")
    return str(args.profile)


def _structure(name: str, pixel_size: float | None, map_pixel_size: float | None = None) -> Structure:
    """The structure of that name; pixel_size (A) stands in where a map states none and none is given for it."""
    from cryobench.reconstruction.command import refuse_images
    from cryobench.specimens.catalog import MAP_SUFFIXES, resolve

    structure = resolve(name, pixel_size=map_pixel_size)
    if structure.source.lower().removesuffix(".gz").endswith(MAP_SUFFIXES):
        refuse_images(structure.source)
    if pixel_size is not None and map_pixel_size is None and structure.lacks_pixel_size():
        structure = resolve(name, pixel_size=pixel_size)
    return structure
