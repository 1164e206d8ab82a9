"""The table of a network's layers, as its chapter shows it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

#: what only holds other modules; its own name is no level of a network
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _shown(module: nn.Module, depth: int, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Name and module of each line: what is ``depth`` levels down, or has nothing below it."""
    for name, child in module.named_children():
        if name == "parametrizations":  # a normalised weight is no layer of its own
            continue
        below = any(n != "parametrizations" for n, _ in child.named_children())
        container = isinstance(child, CONTAINERS)
        if below and (container or depth > 1):
            yield from _shown(child, depth if container else depth - 1, f"{prefix}{name}.")
        else:
            yield prefix + name, child


def layer_table(network: nn.Module, *inputs: Tensor, depth: int = 1) -> str:
    """One line a module, down to ``depth`` levels (lists of modules are none), in the order of computing: name, kind,
    shape of what comes out, weights. inputs: what the network is called with.

    A last line has the sum and the multiplications per call.
    """
    from torch.utils.flop_counter import FlopCounterMode

    rows: list[tuple[str, str, str, int]] = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, _: Any, out: Any) -> None:
            shape = " x ".join(str(n) for n in out.shape) if isinstance(out, Tensor) else ""
            rows.append((name, type(module).__name__, shape, sum(w.numel() for w in module.parameters())))

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in _shown(network, depth)]
    counter = FlopCounterMode(display=False)
    was_training = network.training
    try:
        network.eval()
        with torch.no_grad(), counter:
            network(*inputs)
    finally:
        network.train(was_training)
        for handle in handles:
            handle.remove()
    head = ("layer", "kind", "output", "weights")
    lines = [head, *((*row[:3], f"{row[3]:,}") for row in rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(4)]
    text = ["  ".join([*(v.ljust(w) for v, w in zip(line[:3], widths[:3], strict=True)), line[3].rjust(widths[3])])
            for line in lines]  # fmt: skip
    total = sum(w.numel() for w in network.parameters())
    return "\n".join(
        [*text, f"in all {total:,} weights, {counter.get_total_flops() / 2e9:.3g} G multiplications a call"]
    )
