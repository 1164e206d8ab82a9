"""How much arithmetic a training step is, and what share of the device's peak a fit reached.

Counted are the operations of convolutions and matrix products, forward and backward, two for each multiply-add: what
the peak rates of the makers count too. Point-wise work is not, and is what keeps the share low where it dominates.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

#: images of the step that is counted: few, since it is computed once more than the training needs
IMAGES = 4

#: part of the device's name, peak without sparsity in TFLOP/s of bfloat16 and of TF32, cuDNN's default for float32:
#: half of what NVIDIA's data sheets of H100, H100 NVL, H200 and A100 state with sparsity. The first match counts
PEAKS = (
    ("H100 PCIe", 756.0, 378.0),
    ("H100 NVL", 835.0, 417.5),
    ("H100", 989.0, 494.0),
    ("H200", 989.0, 494.0),
    ("A100", 312.0, 156.0),
)


def count(
    model: nn.Module,
    losses: Sequence[tuple[Callable[[Any, Tensor, Tensor], Tensor], Sequence[nn.Parameter], int]],
    source: Tensor,
    target: Tensor,
    bfloat16: bool,
) -> float | None:
    """Floating-point operations per image of one training step; None where the images do not fit into the memory.

    losses: each with the parameters it is differentiated by and every how many steps that is done (counted as
    1/every). The model's weights, batch statistics and gradients and torch's random numbers end as they were; it must
    not be compiled yet.
    """
    from torch.utils.flop_counter import FlopCounterMode

    kept = copy.deepcopy(model.state_dict())
    gradients = [(w, w.grad) for w in model.parameters()]
    for weight, _ in gradients:
        weight.grad = None
    device = source.device
    cuda = [device.index or 0] if device.type == "cuda" else []
    total = 0.0
    try:
        for loss, parameters, every in losses:
            counter = FlopCounterMode(display=False)
            with torch.random.fork_rng(devices=cuda), counter:
                with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                    value = loss(model, source, target)
                value.backward(inputs=list(parameters))  # autograd.grad fails under the counter with weight norm
            total += counter.get_total_flops() / every
    except torch.OutOfMemoryError:
        return None
    finally:
        model.load_state_dict(kept)
        for weight, gradient in gradients:
            weight.grad = gradient
    return total / len(source)


def rates(flop_per_image: float | None, images_per_second: float, device: str, precision: str) -> dict[str, Any]:
    """For the record: ``flop_per_image``, ``tflops`` reached (1e12 operations a second, all that the training waited
    for included) and ``mfu``, their share of the peak of the device of that name; None for what is not known."""
    if flop_per_image is None:
        return {"flop_per_image": None, "tflops": None, "mfu": None}
    peaks = next(((bf16, tf32) for part, bf16, tf32 in PEAKS if part in device), None)
    reached = flop_per_image * images_per_second / 1e12
    share = None if peaks is None else float(f"{reached / peaks[precision != 'bfloat16']:.4g}")
    return {"flop_per_image": round(flop_per_image), "tflops": float(f"{reached:.4g}"), "mfu": share}
