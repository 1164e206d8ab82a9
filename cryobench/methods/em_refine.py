"""Refinement of a volume by expectation-maximisation over the modes of each image's pose, in two independent halves.

Each half of the images is compared with a volume of its own, but for the low frequencies where both are all but equal.
What both agree on is signal, and the filter of :mod:`cryobench.methods.em_filter` leaves little else in the whole. As
references the halves are filtered too, each by what it shows itself: of pure noise they share next to nothing. A half
is split in folds: an image is compared with what the *other* folds of its half show. Its own noise would be in its
reference otherwise, at the pose it had before, and would hold it there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cryobench.imaging.slices import SliceTable, resized
from cryobench.methods.em_filter import local_wiener
from cryobench.methods.em_poses import Climb, Frame, Modes, PoseClimber, Views, phases, turn_by
from cryobench.reconstruction.fourier import Backprojector, shells
from cryobench.reconstruction.fsc import fsc

#: lightest mode that is inserted into the volume
LIGHT = 0.01
#: up to this frequency (cycles per image) samples are spread over eight cells: there they lie on few spheres, and the
#: nearest cell is not a fair one
LOW = 5
#: shells in which the halves correlate at least this much have one reference for both, which keeps them from turning
#: apart and their images from preferring their own noise (as RELION joins its halves at low resolution)
JOIN = 0.8
#: modes inserted at once: on a CPU the working set should stay in the cache
MODES = {"cpu": 128, "cuda": 4096}
#: this part of a shell's mean weight is added to each cell, so that cells with next to none hold no great noise
RIDGE = 0.01


class Collector:
    """Sums of slices for a volume of ``frame.size``: two grids, the fine one to the nearest cell."""

    def __init__(self, frame: Frame, symmetry: str) -> None:
        self.frame = frame
        size = min(2 * LOW + 6, frame.size)
        self.low = Backprojector(size, symmetry, device=frame.device)
        self.high = Backprojector(frame.size, symmetry, device=frame.device, nearest=True)

    def insert(self, values: Tensor, weights: Tensor, rotations: Tensor) -> None:
        near, far = self.frame.within(LOW + 1), self.frame.within(LOW - 1)
        points = self.frame.points[:, : values.shape[1]]
        self.low.insert_slices(values[:, :near], weights[:, :near], rotations, points[:, :near])
        self.high.insert_slices(values[:, far:], weights[:, far:], rotations, points[:, far:])

    @classmethod
    def total(cls, parts: Sequence[Collector]) -> Collector:
        """What all of them hold together."""
        both = cls.__new__(cls)
        both.frame = parts[0].frame
        both.low, both.high = parts[0].low, parts[0].high
        for part in parts[1:]:
            both.low, both.high = both.low + part.low, both.high + part.high
        return both

    def volume(self) -> Tensor:
        """Least squares (d, d, d), on the frame's device."""
        low, high = (b.volume(prior=RIDGE * b.shell_weights()).to(self.frame.device) for b in (self.low, self.high))
        d = len(high)
        low = resized(low, d)
        return torch.fft.irfftn(
            torch.where(shells(d, high.device) <= LOW, torch.fft.rfftn(low), torch.fft.rfftn(high)), s=(d, d, d)
        )


@dataclass(frozen=True)
class Halves:
    """raw: the two halves' volumes (d, d, d); references: of each half one for each of its folds, without that fold's
    images, filtered; whole: of all images, filtered; curve, filtered_curve: Fourier shell correlation (d // 2 + 1,) of
    raw, and of the halves filtered."""

    raw: tuple[Tensor, Tensor]
    references: tuple[list[Tensor], list[Tensor]]
    whole: Tensor
    curve: Tensor
    filtered_curve: Tensor

    def reach(self) -> int:
        """The last shell before the correlation first falls below 0.143."""
        below = (self.curve[1:] < 0.143).nonzero()
        return int(below[0]) if len(below) else len(self.curve) - 1


def combine(first: Sequence[Collector], second: Sequence[Collector]) -> Halves:
    """The volumes of two halves of the images, each collected in folds."""
    folds = len(first)
    raw = Collector.total(first).volume(), Collector.total(second).volume()
    parts = [Collector.total([*half[:f], *half[f + 1 :]]).volume() for half in (first, second) for f in range(folds)]
    whole, *filtered = local_wiener(*raw, parts, 1 - 1 / folds)
    curve = fsc(raw[0].cpu(), raw[1].cpu())
    # from the mean on, as far as the halves are all but equal
    sure = torch.cat([curve[1:2], curve[1:]]).cummin(0).values >= JOIN
    pick = torch.cat([sure, sure.new_zeros(1)]).to(whole.device)[shells(len(whole), whole.device)]

    def joined(own: Tensor, other: Tensor) -> Tensor:
        mine = torch.fft.rfftn(own)
        both = torch.where(pick, (mine + torch.fft.rfftn(other)) / 2, mine)
        return torch.fft.irfftn(both, s=tuple(own.shape))

    references = [joined(part, filtered[1 - k // folds]) for k, part in enumerate(filtered[2:])]
    filtered_curve = fsc(filtered[0].cpu(), filtered[1].cpu())
    return Halves(raw, (references[:folds], references[folds:]), whole, curve, filtered_curve)


def collect(views: Views, modes: Modes, weight: Tensor, symmetry: str) -> Collector:
    """Images (n) at their modes, as heavy as ``weight`` (p,), each mode spread over 2 q points of its ellipsoid."""
    frame, q = views.frame, modes.spread.shape[1]
    sums, moved = Collector(frame, symmetry), q > 3
    for part in (weight > LIGHT).nonzero()[:, 0].split(MODES.get(frame.device.type, 128)):
        mine = views[modes.owner[part]]
        share = weight[part, None] / (2 * q)
        values, weights = mine.data * mine.gain * share, mine.gain.square() * share
        points = torch.cat([modes.spread[part], -modes.spread[part]], 2) * q**0.5  # (p, q, 2 q)
        for point in points.unbind(2):
            back = phases(modes.shifts[part] + point[:, 3:], frame, values.shape[1], back=True) if moved else 1
            sums.insert(values * back, weights, modes.rotations[part] @ turn_by(point[:, :3]))
    return sums


def expect(views: Views, reference: Tensor, group: Tensor, climb: Climb, before: Modes | None) -> Modes:
    """The modes of all images, searched everywhere, or followed from where they were."""
    climber = PoseClimber(SliceTable(reference), views.frame, group, climb)
    return climber.run(views) if before is None else climber.follow(views, before)
