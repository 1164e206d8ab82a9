#!/usr/bin/env python3
"""Copies finished records to where they are committed: results/shipped, each beside its notebook without figures.

Records of uncommitted or of changed code are refused, with the reason; then the exit code is 1.
"""

import argparse
import sys
from pathlib import Path

from cryobench.bench.shipped import ship, ship_weights
from cryobench.paths import project_root


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", metavar="RESULTS_DIR")
    parser.add_argument("--profile", default="quick", help="quick or full")
    parser.add_argument("--specimen", nargs="+", default=[], metavar="S", help="only these")
    parser.add_argument("--to", metavar="DIR", help="default: results/shipped of this project")
    parser.add_argument("--weights", metavar="DIR", help="copy there what trained methods learned, from the cache")
    parser.add_argument(
        "--unchecked", action="store_true", help="also of uncommitted or changed code: to carry, not to commit"
    )
    args = parser.parse_args()
    results = Path(args.results)
    target = Path(args.to) if args.to else project_root() / "results" / "shipped"
    copied, refused = ship(
        results, target, args.profile, lambda line: print(line, file=sys.stderr), args.specimen, not args.unchecked
    )
    print(f"{copied} records copied to {target}, {refused} refused")
    if args.weights:
        for path in ship_weights(results, Path(args.weights), args.profile):
            print(path)
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
