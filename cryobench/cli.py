"""The command line: what there is to say, and nothing of how it is done (that is in commands.py).

Exit codes: 0 done; 1 something asked for could not be done (one line on stderr); 2 wrong usage.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

from cryobench import __version__
from cryobench.errors import CryobenchError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cryobench", description="Denoising single-particle cryo-EM images: course and benchmark."
    )
    parser.add_argument("--version", action="version", version=f"cryobench {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return sub

    c = command("list", "what there is: methods, tables, specimens, profiles")
    c.add_argument("what", choices=["methods", "tables", "specimens", "profiles"])
    c.add_argument("--json", action="store_true")

    c = command("fetch", "download archive entries, with resume and checksum")
    c.add_argument("entries", nargs="*", metavar="ENTRY")
    c.add_argument("--all", action="store_true", help="every entry that is a single file")
    c.add_argument("--data-dir", metavar="D")

    c = command("simulate", "noisy particle images of a structure, with a STAR file that RELION reads")
    c.add_argument("structure", metavar="STRUCTURE", help="specimen name, or a .pdb/.cif/.mrc/.map file")
    c.add_argument("-o", "--output", required=True, metavar="OUT.mrcs")
    c.add_argument("-n", type=int, default=100, help="number of images (100)")
    c.add_argument("--size", type=int, default=128, metavar="PX", help="of the images (128)")
    c.add_argument(
        "--pixel-size", type=float, metavar="A", help="angstrom; default: a model fills 60 %%, a map's box all of it"
    )
    c.add_argument("--map-pixel-size", type=float, metavar="A", help="of a map whose header states none")
    c.add_argument("--resolution", type=float, metavar="A", help="of the density (default: that of the pixels)")
    c.add_argument("--snr", type=float, default=0.1, help="var(clean)/var(noise) over the whole stack (0.1)")
    c.add_argument("--noise", choices=["white", "coloured", "poisson"], default="white")
    c.add_argument("--ctf", action="store_true")
    c.add_argument("--shift", type=float, default=0.0, metavar="PX", help="uniform random shifts of +-PX")
    c.add_argument("--contrast", type=float, default=0.0, metavar="SD", help="sd of each particle's gain")
    c.add_argument("--bfactor", type=float, default=0.0, metavar="A2")
    c.add_argument("--seed", type=int, default=0)
    c.add_argument("--device", default="auto")

    c = command("denoise", "denoise a stack or a micrograph")
    c.add_argument("input", metavar="IN.mrcs")
    c.add_argument("-m", "--method", required=True, help="one of `cryobench list methods`")
    c.add_argument("-o", "--output", required=True, metavar="OUT.mrcs")
    c.add_argument("--sigma", type=float, help="noise standard deviation; default: estimated from the corners")
    c.add_argument(
        "--reference",
        metavar="STRUCTURE",
        help="specimen name or .pdb/.cif/.mrc/.map file, for methods that know the structure; particles must be "
        "centred and bright",
    )
    c.add_argument(
        "--symmetry",
        metavar="GROUP",
        help="as C4 or D7: of the reference about its axes, which saves time; of the particle, for em3d (default C1)",
    )
    c.add_argument("--shift", type=float, metavar="PX", help="em3d: particles are off-centre by up to PX pixels")
    c.add_argument("--contrast", type=float, metavar="SD", help="em3d: standard deviation of the particles' gains")
    c.add_argument("--map", metavar="MAP.mrc", help="em3d: write the map it finds, MAP_half1 and MAP_half2 beside it")
    c.add_argument(
        "--star",
        metavar="OUT.star",
        help="em3d: write the input's images with their poses, for RELION; without --ctf, the optics that it wants are "
        "stated as 300 kV, 2.7 mm, 0.1",
    )
    c.add_argument("--ctf", metavar="STAR", help="CTF of the input's images, and their pixel size if they have none")
    c.add_argument("--train-on", nargs="+", default=[], metavar="STACK", help="with STACK_clean.mrcs beside it")
    c.add_argument("--weights", metavar="FILE", help="saved before; or 'shipped': those that come with cryobench")
    c.add_argument("--save-weights", metavar="FILE", help="keep what was learned: FILE.safetensors, FILE.json")
    c.add_argument("--profile", default="quick", help="how long to learn: smoke (a trial), quick (default) or full")
    c.add_argument("--pixel-size", type=float, metavar="A")
    c.add_argument("--seed", type=int, default=0)
    c.add_argument("--device", default="auto")

    c = command("evaluate", "scores of denoised images against the clean ones")
    c.add_argument("output", metavar="OUT.mrcs")
    c.add_argument("--clean", required=True, metavar="CLEAN.mrcs")
    c.add_argument("--noisy", metavar="NOISY.mrcs")
    c.add_argument("--convention", default="fair", help="fair (default), or as a paper (probably) scored")
    c.add_argument("--pixel-size", type=float, metavar="A")
    c.add_argument("--json", action="store_true")

    c = command("run", "plan a table, skip what is recorded, run the rest")
    _add_cells(c)
    c.add_argument("--jobs", type=int, default=1)
    c.add_argument("--scheduler", metavar="ADDR", help="of a cluster (not available yet)")
    c.add_argument("--device", default="auto")

    c = command(
        "status", "per cell: done, stale (and what changed), failed, missing, shipped (committed, not run here)"
    )
    _add_cells(c)
    c.add_argument("--json", action="store_true")

    c = command("table", "measured beside published")
    c.add_argument("table", nargs="+")
    c.add_argument("--profile", default="quick")
    c.add_argument("--format", choices=["text", "csv", "html", "latex", "json"], default="text")
    c.add_argument("--convention", help="the scoring shown as legacy (default: the paper's)")
    c.add_argument("--wide", action="store_true", help="all columns (text)")
    c.add_argument("--results", default="results", metavar="DIR")

    c = command("reconstruct", "a map and half maps from images with known poses")
    c.add_argument("input", metavar="IN.star")
    c.add_argument("-o", "--output", required=True, metavar="MAP.mrc")
    c.add_argument("--engine", choices=["fourier", "relion"], default="fourier")
    c.add_argument("--symmetry", default="C1", metavar="GROUP", help="as C4 or D7 (C1)")
    c.add_argument("--pixel-size", type=float, metavar="A")

    c = command("fsc", "Fourier shell correlation of two maps")
    c.add_argument("a", metavar="A.mrc")
    c.add_argument("b", metavar="B.mrc")
    c.add_argument("--mask", metavar="M.mrc")
    c.add_argument("--pixel-size", type=float, metavar="A")
    c.add_argument("--json", action="store_true")

    c = command("book", "build the static site from the records")
    c.add_argument("--profile", default="quick")
    c.add_argument("--results", default="results", metavar="DIR")
    c.add_argument("--output", metavar="DIR", help="default: book/_build")

    c = command("new-method", "one file, its notebook and its test, from a template that passes")
    c.add_argument("name")

    c = command("doctor", "what this machine has, what would fail and how to mend it")
    c.add_argument("--json", action="store_true")
    return parser


def _add_cells(c: argparse.ArgumentParser) -> None:
    c.add_argument("table", nargs="+")
    c.add_argument("--profile", default="quick")
    c.add_argument("--specimen", nargs="+", action="extend", metavar="S", help="name or structure file")
    c.add_argument("--method", nargs="+", action="extend", metavar="M")
    c.add_argument("--seeds", type=integers, default=[0], metavar="0,1,2")
    c.add_argument("--results", default="results", metavar="DIR")


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    args = _parser().parse_args(arguments)
    from cryobench import commands

    names = {"list": "list_things", "new-method": "new_method"}
    handler = getattr(commands, names.get(args.command, args.command))
    shown = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"cryobench: warning: {message}\n"
    try:
        return int(handler(args) or 0)
    except CryobenchError as error:
        if args.debug:
            raise
        print(f"cryobench: {error}", file=sys.stderr)
    except BrokenPipeError:
        # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("cryobench: stopped; what was finished is kept, run the same command to go on", file=sys.stderr)
    except Exception as error:
        if args.debug:
            raise
        reason = " ".join(str(error).split()) or "no reason given"
        hint = "" if isinstance(error, OSError) else " (a mistake of ours? see it with --debug)"
        print(f"cryobench: {type(error).__name__}: {reason}{hint}", file=sys.stderr)
    finally:
        warnings.formatwarning = shown
    return 1
