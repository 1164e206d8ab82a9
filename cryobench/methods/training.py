"""The one training loop of all learned methods: seeded, resumable, plain.

A method gives a module, a function that makes batch number ``step``, and a loss. A method with several
networks that learn against each other gives one :class:`Player` for each; they take turns within a step.

Everything random depends on (seed, step) alone: batches by contract, and whatever a loss or a dropout draws
because the global generator is seeded anew at each step (and given back to the caller untouched). A killed fit
thus goes on from its checkpoint to the same weights as an undisturbed one.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cryobench.errors import CryobenchError
from cryobench.methods import flops
from cryobench.methods.base import Budget
from cryobench.methods.checkpoint import read_checkpoint, write_checkpoint

#: (model, input, target) -> scalar loss; runs under autocast
Loss = Callable[[Any, Tensor, Tensor], Tensor]
#: (step, batch size, seed, device) -> (input, target), a pure function, as TrainingData.batch
Batch = Callable[[int, int, int, torch.device], tuple[Tensor, Tensor]]

SNAPSHOT_STEPS = 16  # losses are looked at and a state to roll back to is kept this often: each look waits for the GPU
CHECKPOINT_SECONDS = 15.0
ROLLBACK_RATE = 0.25


class BudgetSpent(CryobenchError):
    """The fit stopped at its time limit; the checkpoint holds all it did and the next call goes on from there."""


@dataclass(frozen=True)
class TrainConfig:
    """Hyper-parameters of the loop; a method's Config inherits them and sets its paper's values.

    Adam; the rate rises linearly over ``warmup`` steps and falls as a cosine to ``final_rate`` times itself.
    clip: largest gradient norm (0: none). ema: decay of the weight average that becomes the result (0: none).
    precision: "float32", "bfloat16" (autocast), or "auto": bfloat16 where the device computes in it.
    compile: torch.compile, on CUDA only; off, since on an H200 it took 20 s, after which 120
    steps were no faster. channels_last: memory order, faster for convolutions on CPU and GPU.
    """

    steps: int = 4000
    batch_size: int = 32
    learning_rate: float = 1e-3
    final_rate: float = 0.01
    warmup: int = 100
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    clip: float = 1.0
    ema: float = 0.0
    precision: str = "auto"
    channels_last: bool = True
    compile: bool = False


@dataclass(frozen=True)
class Player:
    """A network with its own loss and optimiser: ``rate`` times the learning rate, each ``every`` steps."""

    module: nn.Module
    loss: Loss
    rate: float = 1.0
    every: int = 1


def pick_precision(wanted: str, device: torch.device) -> str:
    """ "float32" or "bfloat16". CPUs without bfloat16 instructions emulate it, three times slower than float32."""
    if wanted not in ("auto", "float32", "bfloat16"):
        raise CryobenchError(f'precision must be "auto", "float32" or "bfloat16", not {wanted!r}')
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    checks = (getattr(torch.cpu, f"_is_{name}_supported", lambda: False) for name in ("avx512_bf16", "amx_tile"))
    return "bfloat16" if device.type == "cpu" and any(check() for check in checks) else "float32"


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Within, torch's global generator is seeded; afterwards it is as it was. For a network's first weights."""
    cuda = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        yield


def train(
    model: nn.Module, batch: Batch, loss: Loss | list[Player], config: TrainConfig, budget: Budget,
    seed: int, device: torch.device, name: str = "model",
) -> dict[str, Any]:  # fmt: skip
    """Train ``model`` (on ``device``) in place; it ends with the averaged weights where ``config.ema`` > 0.

    Returns plain facts: loss curve ``[[step, loss of each player], ...]`` of at most 200 means, images per second,
    seconds (over all resumed pieces), device, precision, parameters, and operations with their rate (see
    :func:`cryobench.methods.flops.rates`). Raises BudgetSpent (call again to go on), BadFileError for a checkpoint of
    another fit, and CryobenchError where the training diverges twice or not even one image fits into the device's
    memory.
    """
    if config.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with seeded(seed, device):
        fit = _Fit(model, batch, loss, config, budget, seed, device, name)
        fit.run()
    return fit.facts()


class _Fit:
    """The state of one training run."""

    def __init__(
        self, model: nn.Module, batch: Batch, loss: Loss | list[Player], config: TrainConfig, budget: Budget,
        seed: int, device: torch.device, name: str,
    ) -> None:  # fmt: skip
        self.model, self.batch, self.config, self.budget = model, batch, config, budget
        self.seed, self.device, self.name = seed, device, name
        self.players = loss if isinstance(loss, list) else [Player(model, loss)]
        self.parameters = [[w for w in p.module.parameters() if w.requires_grad] for p in self.players]
        betas = (config.beta1, config.beta2)
        self.optimisers = [
            torch.optim.AdamW(w, config.learning_rate, betas, weight_decay=config.weight_decay, fused=True)
            for w in self.parameters
        ]
        self.average = copy.deepcopy(model.state_dict()) if config.ema else {}
        self.losses = torch.zeros(config.steps, len(self.players), device=device)
        # pieces: how many parts a batch is computed in; rate: lowered by a roll-back
        self.at: dict[str, Any] = {"step": 0, "seconds": 0.0, "pieces": 1, "rate": 1.0, "rolled_back_at": None}
        self.at["precision"] = pick_precision(config.precision, device)
        shapes = [(k, tuple(v.shape)) for k, v in model.state_dict().items()]
        self.key = hashlib.sha256(repr((name, dataclasses.astuple(config), seed, shapes)).encode()).hexdigest()

    def run(self) -> None:
        if self.budget.checkpoint is not None:
            kept = read_checkpoint(self.budget.checkpoint, self.key, self.device)
            if kept is not None:
                self._restore(kept)
        self.model.train()
        if "flop_per_image" not in self.at:
            self.at["flop_per_image"] = self._flop_per_image()
        if self.device.type == "cuda" and self.config.compile and (shutil.which("cc") or shutil.which("gcc")):
            for player in self.players:
                player.module.compile()  # in place, so the names of the weights stay; triton needs a C compiler
        good, start, saved = self._snapshot(), time.monotonic(), time.monotonic()
        before, first = self.at["seconds"], self.at["step"]
        from tqdm import tqdm

        bar = tqdm(
            total=self.config.steps, initial=first, desc=f"train {self.name}", file=sys.stderr,
            disable=not self.budget.progress, unit="step", mininterval=0.5,
        )  # fmt: skip
        with bar:
            while self.at["step"] < self.config.steps:
                self._step()
                now, step = time.monotonic(), self.at["step"]
                spent = self.budget.seconds is not None and now - start >= self.budget.seconds
                bar.update(1)
                if step % SNAPSHOT_STEPS and step < self.config.steps and not spent:
                    continue
                recent = self.losses[good["at"]["step"] : step]
                if not bool(recent.isfinite().all()):
                    self._roll_back(good)
                    good = self._snapshot()
                    bar.n = self.at["step"]
                    continue
                self.at["seconds"] = before + time.monotonic() - start
                good = self._snapshot()
                bar.set_postfix(loss=f"{float(recent[:, -1].mean()):.4g}", refresh=False)
                due = spent or step == self.config.steps or now - saved > CHECKPOINT_SECONDS
                if due and self.budget.checkpoint is not None:
                    write_checkpoint(self.budget.checkpoint, good)
                    saved = now
                if spent and step < self.config.steps:
                    mend = "run it again to go on" if self.budget.checkpoint else "give a checkpoint file to go on from"
                    raise BudgetSpent(f"{self.name}: time is up at step {step} of {self.config.steps}; {mend}")
        if self.config.ema:
            self.model.load_state_dict(self.average)

    def _flop_per_image(self) -> float | None:
        source, target = self.batch(0, min(flops.IMAGES, self.config.batch_size), self.seed, self.device)
        turns = [(p.loss, w, p.every) for p, w in zip(self.players, self.parameters, strict=True)]
        return flops.count(self.model, turns, source, target, self.at["precision"] == "bfloat16")

    def _step(self) -> None:
        step = self.at["step"]
        torch.manual_seed(self.seed * 1_000_003 + step)
        source, target = self.batch(step, self.config.batch_size, self.seed, self.device)
        for i, player in enumerate(self.players):
            if step % player.every:
                self.losses[step, i] = self.losses[step - 1, i]
                continue
            for group in self.optimisers[i].param_groups:
                group["lr"] = self._rate(step) * player.rate
            self.losses[step, i] = self._update(i, source, target)
        self._average()
        self.at["step"] = step + 1

    def _rate(self, step: int) -> float:
        config = self.config
        cosine = 0.5 * (1 + math.cos(math.pi * step / config.steps))
        rise = min(1.0, (step + 1) / max(1, config.warmup))
        return config.learning_rate * self.at["rate"] * rise * (config.final_rate + (1 - config.final_rate) * cosine)

    def _update(self, i: int, source: Tensor, target: Tensor) -> Tensor:
        """One step of player i. Where the memory is too small, the batch is computed in halves, quarters, ..."""
        bfloat16 = self.at["precision"] == "bfloat16"
        while True:
            try:
                self.optimisers[i].zero_grad(set_to_none=True)
                total = torch.zeros((), device=self.device)
                chunks = zip(source.chunk(self.at["pieces"]), target.chunk(self.at["pieces"]), strict=True)
                for x, y in chunks:
                    with torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16):
                        value = self.players[i].loss(self.model, x, y) * (len(x) / len(source))
                    value.backward(inputs=self.parameters[i])
                    total += value.detach().float()
                norm = nn.utils.clip_grad_norm_(self.parameters[i], self.config.clip or math.inf)
                self.optimisers[i].step()
                return total + 0 * norm  # a gradient that is not finite makes the loss NaN, without waiting for the GPU
            except torch.OutOfMemoryError as error:
                if self.at["pieces"] >= len(source):
                    raise CryobenchError(
                        f"{self.name}: not even one image fits into memory of {self.device}"
                    ) from error
                self.at["pieces"] = min(2 * self.at["pieces"], len(source))
                print(
                    f"{self.name}: out of memory on {self.device}: a batch of {len(source)} images is now computed "
                    f"in {self.at['pieces']} pieces", file=sys.stderr,
                )  # fmt: skip
            torch.cuda.empty_cache()  # outside the handler, whose traceback holds on to the tensors

    def _average(self) -> None:
        """Moving average of weights and of batch statistics, shorter at the start, when the weights are still poor."""
        if not self.average:
            return
        decay = min(self.config.ema, (1 + self.at["step"]) / (10 + self.at["step"]))
        pairs = zip(self.average.values(), self.model.state_dict().values(), strict=False)
        means, values = map(list, zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True))
        get_ema_multi_avg_fn(decay)(means, values, 0)  # all tensors at once: on a GPU one launch, not hundreds

    def _roll_back(self, good: dict[str, Any]) -> None:
        failed = self.at["step"]
        if self.at["rolled_back_at"] is not None:
            raise CryobenchError(f"{self.name}: training diverged twice, now near step {failed}: lower learning_rate")
        self._restore(good)
        self.at.update(rate=self.at["rate"] * ROLLBACK_RATE, rolled_back_at=failed)
        print(
            f"{self.name}: the loss is not finite near step {failed}: back to step {self.at['step']} at a lower rate",
            file=sys.stderr,
        )

    def _snapshot(self) -> dict[str, Any]:
        state = {
            "key": self.key, "at": self.at, "model": self.model.state_dict(), "average": self.average,
            "optimisers": [o.state_dict() for o in self.optimisers], "losses": self.losses[: self.at["step"]],
        }  # fmt: skip
        return copy.deepcopy(state)

    def _restore(self, state: dict[str, Any]) -> None:
        state = copy.deepcopy(state)  # the optimiser would keep, and change, the tensors it is given
        self.at, self.average = state["at"], state["average"]
        self.model.load_state_dict(state["model"])
        for optimiser, kept in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(kept)
        self.losses[: len(state["losses"])] = state["losses"]

    def facts(self) -> dict[str, Any]:
        steps, seconds = self.config.steps, self.at["seconds"]
        width = math.ceil(steps / 200)
        curve = [
            [min(first + width, steps), *self.losses[first : first + width].mean(dim=0).tolist()]
            for first in range(0, steps, width)
        ]
        speed = steps * self.config.batch_size / max(seconds, 1e-9)
        on = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        return {
            "loss": curve,
            "steps": steps,
            "batch_size": self.config.batch_size,
            "pieces": self.at["pieces"],
            "rolled_back_at": self.at["rolled_back_at"],
            "seconds": round(seconds, 2),
            "images_per_second": round(speed, 2),
            **flops.rates(self.at["flop_per_image"], speed, on, self.at["precision"]),
            "device": on,
            "precision": self.at["precision"],
            "parameters": sum(w.numel() for w in self.model.parameters()),
        }
