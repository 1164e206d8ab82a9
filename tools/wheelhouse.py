#!/usr/bin/env python3
"""Collects the wheels that a Linux x86-64 node without a network, with torch, needs to run cryobench.

What torch itself brings is left out, and so is what --have names with all that it brings: a node with torch mostly has
the numerical packages too, which are most of the bytes. Versions are those of constraints.txt.
"""

import argparse
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
#: wheels of glibc 2.28 and older: what a machine of 2019 runs
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in range(28, 4, -1)] + ["manylinux2014_x86_64", "manylinux1_x86_64"]


def closure(names: list[str], python: str) -> set[str]:
    """The packages and all that they need on Linux; known from what is installed here."""
    target = {
        "python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux", "os_name": "posix",
        "platform_system": "Linux", "platform_machine": "x86_64", "implementation_name": "cpython",
        "platform_python_implementation": "CPython", "extra": "",
    }  # fmt: skip
    found: set[str] = set()
    todo = list(names)
    while todo:
        name = canonicalize_name(todo.pop())
        try:
            needs = [Requirement(line) for line in requires(name) or []] if name not in found else []
        except PackageNotFoundError:
            print(f"{name} is not installed here and is left out", file=sys.stderr)
            continue
        found.add(name)
        todo += [r.name for r in needs if r.marker is None or r.marker.evaluate(target)]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", metavar="X.Y", help="of the node")
    parser.add_argument("--have", nargs="*", default=[], metavar="NAME", help="packages on the node beside torch")
    args = parser.parse_args()
    wanted = closure(["cryobench"], args.python) - closure(["torch", *args.have], args.python) - {"cryobench"}
    lines = [line.strip() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    pins = {canonicalize_name(line.split("==")[0]): line for line in lines}
    missing = sorted(wanted - pins.keys())
    if missing:
        sys.exit(f"not in constraints.txt: {', '.join(missing)}")
    args.folder.mkdir(parents=True, exist_ok=True)
    for old in args.folder.glob("*.whl"):
        old.unlink()  # two versions of one package stop the whole installation
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--only-binary=:all:",
        "-d",
        str(args.folder),
    ]
    command += ["--implementation", "cp", "--python-version", args.python]
    command += [option for name in PLATFORMS for option in ("--platform", name)]
    subprocess.run([*command, *sorted(pins[name] for name in wanted)], check=True)
    wheels = list(args.folder.glob("*.whl"))
    size = sum(w.stat().st_size for w in wheels) / 1e6
    print(f"{len(wheels)} wheels for Python {args.python}, {size:.0f} MB in {args.folder}")
    print(f"the node needs beside them: torch{''.join(f', {name}' for name in args.have)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
