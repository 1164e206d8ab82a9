"""The course of a reconstruction from noisy images alone: first volumes, how they meet, refinement.

The images are split in two halves, each with volumes of its own (but for the low frequencies at which both agree, where
references are shared: :mod:`cryobench.methods.em_refine`). Each makes a first volume
(:mod:`cryobench.methods.em_start`); if the two are not the same object, both try again, and of each half's attempts the
one with the most evidence counts. The second is turned onto the first (:mod:`cryobench.methods.em_align`) and both are
refined (:mod:`cryobench.methods.em_refine`). A killed fit goes on from the last volume.
"""

from __future__ import annotations

import hashlib
import math
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cryobench.errors import CryobenchError
from cryobench.imaging.rotations import symmetry_matrices
from cryobench.imaging.slices import SliceTable, resized
from cryobench.methods import em_classes
from cryobench.methods.base import Budget
from cryobench.methods.checkpoint import read_checkpoint, write_checkpoint
from cryobench.methods.em_align import align, to_axes
from cryobench.methods.em_poses import Climb, Modes, Views, phases, sample_slices, softmax
from cryobench.methods.em_refine import Halves, collect, combine, expect
from cryobench.methods.em_start import GridEM, box_for
from cryobench.methods.training import BudgetSpent

if TYPE_CHECKING:
    from cryobench.methods.em3d import Config

#: correlation of two first volumes that are the same object
SAME = 0.98
#: shells beyond those that the halves agree on, in which agreement is looked for next
BEYOND = 4
#: largest ratio of all slopes to those of the signal that is believed
MOST_CAUTION = 3.0


class Fit:
    """State and steps; ``run`` does all that is left. views: all images, which are split at random."""

    def __init__(self, views: Views, config: Config, seed: int, budget: Budget) -> None:
        self.config, self.seed, self.budget = config, seed, budget
        order = torch.randperm(len(views), generator=torch.Generator().manual_seed(seed))
        #: which images (n / 2,) the halves are
        self.members = [part.sort().values.to(views.frame.device) for part in order.chunk(2)]
        self.halves = [views[part] for part in self.members]
        self.folds = max(2, min(config.folds, len(self.members[1])))  # none is empty
        self.group = symmetry_matrices(config.symmetry).to(views.frame.device, torch.float32)
        # of the data a few digits: sums differ a little with the number of threads
        power = views.data.abs().square().sum(1, dtype=torch.float64)
        sums = [power, power * torch.arange(len(power), device=power.device), views.gain.double()]
        facts = [config, seed, views.data.shape, *(f"{float(x.sum()):.5g}" for x in sums)]
        key = hashlib.sha256(repr(facts).encode()).hexdigest()
        self.at: dict[str, Any] = {"key": key, "starts": [], "evidence": [], "settling": [], "refined": 0}
        self.at["seconds"] = 0.0
        #: the result: volumes and modes of the last iteration, what became of each image
        self.result: Halves | None = None
        self.modes: list[Modes] = []
        self.classes: list[em_classes.Classes] = []
        self.gains = [torch.ones(len(half), device=views.frame.device) for half in self.halves]
        self._heat = 1.0

    def run(self) -> None:
        """Raises BudgetSpent when the time is up; the checkpoint holds what was done."""
        from tqdm import tqdm

        budget, config = self.budget, self.config
        kept = read_checkpoint(budget.checkpoint, self.at["key"], torch.device("cpu")) if budget.checkpoint else None
        if kept:
            self.at = kept
            self.modes = [Modes(*(t.to(self.group.device) for t in tensors)) for tensors in kept.get("modes", [])]
            self.gains = [g.to(self.group.device) for g in kept.get("gains", self.gains)]
            self._heat = kept.get("heat", self._heat)
        self._start, self._before = time.monotonic(), self.at["seconds"]
        self._bar = tqdm(desc="em3d", file=sys.stderr, disable=not budget.progress, unit="step")
        with self._bar:
            while not self._met():
                self._first_volumes()
            small = min(box_for(config.settle_band), self.halves[0].frame.size)
            coarse = [half.shrunk(small) for half in self.halves]
            for _ in range(len(self.at["settling"]), config.settling):
                self._settle(coarse)
            for _ in range(self.at["refined"], config.iterations):
                self._refine()

    def _met(self) -> bool:
        """Whether there are enough first volumes: the best of both halves agree, or both have tried often enough."""
        tried = len(self.at["starts"]) // 2
        if tried == 0 or len(self.at["starts"]) % 2:
            return False
        if "correlation" not in self.at:
            self._meet()
        return bool(self.at["correlation"] >= SAME or tried >= self.config.starts)

    def first_volume(self, number: int) -> tuple[Tensor, float]:
        """Attempt ``number`` (even: the first half's, odd: the second's), and its evidence."""
        generator = torch.Generator().manual_seed(self.seed * 1009 + number)
        return GridEM(self.halves[number % 2], self.config.annealing(), generator, self.config.shift).run()

    def _first_volumes(self) -> None:
        number = len(self.at["starts"])
        volume, evidence = self.first_volume(number)
        self.at["starts"].append(volume.cpu())
        self.at["evidence"].append(evidence)
        self.at.pop("correlation", None)
        self._tick(f"first volume {number // 2 + 1} of half {number % 2 + 1}")

    def _meet(self) -> None:
        """The best volume of each half, the second turned onto the first, both about the axes of the symmetry."""
        starts, evidence = self.at["starts"], self.at["evidence"]
        best = [max(range(h, len(starts), 2), key=lambda k: evidence[k]) for h in (0, 1)]
        first, second = (starts[k].to(self.group.device) for k in best)
        move = align(first, second, self.config.start_band, shifts=self.config.shift > 0)
        second = move.apply(second)
        if len(self.group) > 1:
            axes, likeness = to_axes((first + second) / 2, self.group, self.config.start_band)
            turn = type(move)(axes, torch.zeros(3, device=axes.device), False, 1.0)
            first, second = turn.apply(first), turn.apply(second)
            self.at["likeness"] = likeness
        self.at["correlation"] = move.correlation
        self.at["references"] = [[first.cpu()], [second.cpu()]]

    def _settle(self, coarse: list[Views]) -> None:
        """One iteration at low frequencies; most follow the poses of the one before, some search everywhere."""
        done, config = len(self.at["settling"]), self.config
        limit = config.band if done == 0 else math.inf
        result = self._iterate(coarse, limit, everywhere=done == 0 or done % 4 == 1, judge=done > 0)
        self.at["settling"].append(round(float(result.curve.mean()), 4))
        self._keep(result)
        self._tick(
            f"settling {done + 1} of {config.settling}: mean correlation of the halves {self.at['settling'][-1]:.3f}"
        )

    def _refine(self) -> None:
        """One iteration at all frequencies a little beyond those that the halves agree on."""
        done, reach = self.at["refined"], self.at["reach"]
        self.result = result = self._iterate(self.halves, reach + BEYOND, everywhere=False)
        last = done == self.config.iterations - 1
        if not last:  # a resumed fit does at least the last iteration, which makes the result
            self.at["refined"] = done + 1
            self._keep(result)
        name = f"{'last ' if last else ''}iteration {done + 1} of {self.config.iterations}"
        self._tick(f"{name}: the halves agree up to ring {result.reach()}")

    def _iterate(self, halves: list[Views], limit: float, everywhere: bool, judge: bool = True) -> Halves:
        """Poses of all images, and the volumes that follow from them."""
        config, size, device = self.config, halves[0].frame.size, self.group.device
        climb = Climb(config.spacing, config.band, config.modes, shift=config.shift, limit=limit)
        heat = self._heat
        sums, found, classes, powers = [], [], [], []
        for h, half in enumerate(halves):
            references = [resized(volume.to(device), size) for volume in self.at["references"][h]]
            plain = half.scaled(self.gains[h]) if config.contrast else half
            before = None if everywhere or not self.modes else self.modes[h]
            views, number = plain.tempered(heat), torch.arange(len(half), device=device)
            folds = [number[f :: self.folds] for f in range(self.folds)]
            parts, slices = [], torch.zeros_like(views.data)
            for f, fold in enumerate(folds):
                reference = references[f % len(references)]
                own = None if before is None else fold_of(before, f, self.folds)
                modes = expect(views[fold], reference, self.group, climb, own)
                slices[fold] = best_slices(views[fold], modes, reference)
                parts.append(replace(modes, owner=fold[modes.owner]))
            modes = Modes.cat(parts)
            weight, evidence = softmax(modes.evidence(), modes.owner, len(views))
            powers.append(em_classes.ring_means(slices, views.frame.radius))
            kinds = em_classes.classify(views, evidence, powers[-1], volume_of_poses(len(self.group), config.shift))
            if judge:  # at first the volume knows too little
                weight = weight * kinds.view[modes.owner]
            if config.contrast:
                self.gains[h] = gains(half, slices, config.contrast)
            where = [(modes.owner % self.folds == f).nonzero()[:, 0] for f in range(self.folds)]
            sums.append([collect(plain, modes[part], weight[part], config.symmetry) for part in where])
            found.append(modes)
            classes.append(kinds)
        self.modes, self.classes, result = found, classes, combine(*sums)
        # images of near directions are drawn the same way by the same noise, which the next volume then shows more of:
        # the square of what a single image needs was measured to be best
        self._heat = caution(result.filtered_curve, (powers[0] + powers[1]) / 2, limit) ** 2
        return result

    def _keep(self, result: Halves) -> None:
        """Take this as the state that the next iteration, or a resumed fit, goes on from."""
        self.at.update(reach=result.reach(), gains=[g.cpu() for g in self.gains], heat=self._heat)
        self.at["references"] = [[volume.cpu() for volume in half] for half in result.references]
        self.at["modes"] = [[x.cpu() for x in vars(modes).values()] for modes in self.modes]

    def _tick(self, text: str) -> None:
        now = time.monotonic() - self._start
        self.at["seconds"] = self._before + now
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(1)
        if self.budget.checkpoint is not None:
            write_checkpoint(self.budget.checkpoint, self.at)
        if self.budget.seconds is not None and now >= self.budget.seconds and not text.startswith("last"):
            raise BudgetSpent(f"em3d: time is up after {text}; run it again to go on")


def volume_of_poses(order: int, shift: float) -> float:
    """Square pixels times cubic radians over which poses of a particle of this symmetry are spread."""
    return 8 * math.pi**2 / order * (2 * math.ceil(shift) + 1) ** 2


def fold_of(modes: Modes, fold: int, folds: int) -> Modes:
    """The modes of every ``folds``-th image from number ``fold`` on, numbered anew."""
    mine = modes[(modes.owner % folds == fold).nonzero()[:, 0]]
    return replace(mine, owner=mine.owner // folds)


def caution(curve: Tensor, power: Tensor, limit: float) -> float:
    """The heat at which images should be compared with a reference that is partly noise.

    curve (rings,): correlation of the halves, the part of their power that is signal; power: of the slices of the
    references, already filtered; up to ``limit``. A pose is as sharp as the slopes of the slice, |d slice / d pose|^2 ~
    sum k^2 |S|^2 of a ring, and slopes of the noise count among them: with r times as much in the noise as in the
    signal the curvature comes out 1 + r times too large, while the noise moves the top of the likelihood so that the
    error's variance is 1 + r times larger than the signal's slopes say: (1 + r)^2 together, where the noise fills no
    more of the box than the signal, as the filter leaves it.
    """
    rings = min(len(curve), len(power))
    k = torch.arange(rings, device=power.device)
    slope = torch.where(k <= limit, k**3 * power[:rings], 0)  # a ring has some pi k coefficients
    signal = slope * curve[:rings].to(slope).clamp(0, 1)
    return float((slope.sum() / signal.sum().clamp(min=1e-30)).clamp(1, MOST_CAUTION) ** 2)


def best_slices(views: Views, modes: Modes, reference: Tensor) -> Tensor:
    """The slice (n, m) of each image's heaviest mode."""
    score = modes.evidence()
    top = torch.full((len(views),), -math.inf, device=score.device).scatter_reduce(0, modes.owner, score, "amax")
    chosen = (score >= top[modes.owner]).nonzero()[:, 0]
    place = torch.full((len(views),), -1, device=score.device)
    place[modes.owner[chosen]] = chosen
    if len(place) and int(place.min()) < 0:
        raise CryobenchError(
            "em3d: images without a pose: are there values in them, or in their CTF, that are not finite?"
        )
    frame = views.frame
    slices = sample_slices(SliceTable(reference), modes.rotations[place], frame, len(frame.radius))
    if modes.spread.shape[1] > 3:
        slices = slices * phases(modes.shifts[place], frame, slices.shape[1])
    return slices


def gains(views: Views, slices: Tensor, spread: float) -> Tensor:
    """Contrast (n,) of each image: least squares against its slice, with a prior of mean 1 and standard deviation
    ``spread``."""
    model = slices * views.gain
    cross = (model.conj() * views.data).real.sum(1) + 1 / spread**2
    return cross / (model.abs().square().sum(1) + 1 / spread**2)
