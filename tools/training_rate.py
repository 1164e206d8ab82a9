#!/usr/bin/env python3
"""How fast a method trains when it has the device to itself, and what share of the device's peak that is.

    python tools/training_rate.py zhang2024 unet batch_size=128 compile=true     # options as of the method's Config

Fits of two lengths on the table's first specimen: a step takes what the longer one took more. Of sr3-post, the network
behind the diffusion model.
"""

import argparse

import yaml

from cryobench.bench.experiment import Cell, Experiment
from cryobench.bench.tables import load_table
from cryobench.methods import flops
from cryobench.methods.base import Budget


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table")
    parser.add_argument("method")
    parser.add_argument("options", nargs="*", metavar="KEY=VALUE", help="hyper-parameters; values as in YAML")
    parser.add_argument("--profile", default="full")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, nargs=2, default=(32, 160), metavar=("FEW", "MORE"))
    args = parser.parse_args()
    given = {key: yaml.safe_load(value) for key, value in (option.split("=", 1) for option in args.options)}
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    cell = Cell(args.table, next(iter(load_table(args.table).specimens)), args.method, args.profile)
    length = "post_steps" if args.method == "sr3-post" else "steps"
    few, many = args.steps
    seconds = []
    for steps in (few, few, many):  # the first also warms up, and compiles
        run = Experiment(cell, args.device, {**options, length: steps})
        run.counts = {**run.counts, "n_train": 2048, "n_test": 8}  # enough to draw batches from
        method = run.method_class(run.config, run.device)
        method.fit(run.train, Budget(progress=False))
        facts = method.info
        seconds.append(steps * facts["batch_size"] / facts["images_per_second"])
    step = (seconds[2] - seconds[1]) / (many - few)
    if step <= 0:
        parser.error("the longer fit was no slower: ask for more --steps, or wait until the machine is quiet")
    rates = flops.rates(facts["flop_per_image"], facts["batch_size"] / step, facts["device"], facts["precision"])
    share = "unknown" if rates["mfu"] is None else f"{100 * rates['mfu']:.1f} %"
    print(f"{args.table} {args.method} {given or ''} on {facts['device']}, {facts['precision']}")
    print(f"{1e3 * step:.1f} ms a step of {facts['batch_size']} images; the first {few} steps took {seconds[0]:.1f} s")
    print(f"{facts['flop_per_image'] / 1e9:.2f} GFLOP an image, {rates['tflops']:.2f} TFLOP/s, {share} of the peak")


if __name__ == "__main__":
    main()
