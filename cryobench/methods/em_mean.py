"""Posterior means over poses: sums over the modes of each image's posterior.

The posterior about a mode is all but Gaussian, and the integral over it a sum over 2 q points on its ellipsoid, q being
3, or 5 with shifts (cubature of third degree), each with its true likelihood.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cryobench.methods.em_poses import CHUNK, Modes, PoseClimber, Views, phases, softmax, turn_by


def mean_slices(climber: PoseClimber, views: Views, modes: Modes) -> tuple[Tensor, Tensor]:
    """Posterior means (n, m) of the images' slices, shifted as they are but without their gain; and the log (n,) of the
    likelihood's integral over poses, relative to that of noise alone."""
    q, m, n = modes.spread.shape[1], len(climber.frame.radius), len(views)
    directions = torch.cat([modes.spread.mT, -modes.spread.mT], 1) * math.sqrt(q)  # (p, 2q, q)
    moves = climber.climb.shift > 0
    turns = turn_by(directions[..., :3].flatten(0, 1)).view(-1, 2 * q, 3, 3)
    rotations = (modes.rotations[:, None] @ turns).flatten(0, 1)
    shifts = (modes.shifts[:, None] + (directions[..., 3:] if moves else 0)).expand(-1, 2 * q, 2).flatten(0, 1)
    owner = modes.owner.repeat_interleave(2 * q)
    prior = modes.spread.det().abs().log().repeat_interleave(2 * q)
    step = max(1, CHUNK.get(climber.frame.device.type, 2**16) // m)
    scores, slices = [], []
    for start in range(0, len(owner), step):
        part = slice(start, start + step)
        mine = views[owner[part]]
        value = climber.table.sample(rotations[part], climber.frame.points)
        if moves:
            value = value * phases(shifts[part], climber.frame, m)
        model = value * mine.gain
        scores.append((model.conj() * (mine.data - model / 2)).real.sum(1))
        slices.append(value)
    # a Gaussian mode has exp(-q / 2) of its height at each of the points
    weight, evidence = softmax(torch.cat(scores) + prior + q / 2 * (1 + math.log(2 * math.pi)), owner, n)
    mean = torch.zeros(n, m, dtype=torch.complex64, device=weight.device)
    mean.index_add_(0, owner, torch.cat(slices) * weight[:, None])
    return mean, evidence - math.log(2 * q)
