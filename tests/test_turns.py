"""Turned and mirrored, a projection is another projection: the one of a turned structure, pixel by pixel."""

import pytest
import torch

from cryobench.imaging.projection import Projector
from cryobench.imaging.turns import TURNS, over_turns, turn, turn_back


@pytest.mark.parametrize("size", [24, 25])
def test_turned_projections_are_projections(size: int) -> None:
    """About n // 2, also for even sides, where reversed pixels alone are off by one."""
    generator = torch.Generator().manual_seed(0)
    grid = torch.arange(size) - size // 2
    z, y, x = torch.meshgrid(grid, grid, grid, indexing="ij")
    volume = torch.zeros(size, size, size)
    for place in torch.rand(6, 3, generator=generator) * 8 - 4:
        volume += torch.exp(-((z - place[0]) ** 2 + (y - place[1]) ** 2 + (x - place[2]) ** 2) / (2 * 1.5**2))
    projector = Projector(volume)
    pose = torch.linalg.qr(torch.randn(3, 3, generator=generator))[0]
    pose = pose * pose.det()  # a rotation
    quarter = torch.tensor([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    behind = torch.diag(torch.tensor([-1.0, 1.0, -1.0]))
    image = projector.project(pose[None])[0]
    for quarters, mirror in TURNS:
        # which of the two ways a quarter turn is depends on the direction of the y axis and on nothing else
        others = []
        for way in (quarter, quarter.T):
            change = (behind if mirror else torch.eye(3)) @ torch.linalg.matrix_power(way, quarters)
            others.append(projector.project((pose @ change)[None])[0])
        error = min(float((turn(image, quarters, mirror) - other).abs().max()) for other in others)
        assert error < 1e-3 * float(image.max())
    if size % 2 == 0:
        moved = float((image.flip(-1) - turn(image, 0, mirror=True)).abs().max())
        assert moved > 0.1 * float(image.max())


@pytest.mark.parametrize("shape", [(8, 13), (9, 9), (12, 6)])
def test_group(shape: tuple[int, int]) -> None:
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    for t in TURNS:
        assert torch.equal(turn_back(turn(images, *t), *t), images)
    assert torch.equal(turn(turn(images, 1), 3), images)
    centre = images[:, shape[0] // 2, shape[1] // 2]
    for t in TURNS:
        out = turn(images, *t)
        assert torch.equal(out[:, out.shape[1] // 2, out.shape[2] // 2], centre)
    odd = torch.randn(2, 9, 7)
    assert torch.equal(turn(odd, 1, mirror=True), torch.rot90(odd.flip(-1), 1, (-2, -1)))


def test_mean_over_turns_commutes_with_turning() -> None:
    """A convolution does not; its mean over turns does, also where sides differ. One that does stays as it is."""
    torch.manual_seed(0)
    net, smooth = torch.nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"), torch.nn.AvgPool2d(3, 1, 1)
    x = torch.randn(2, 1, 9, 14)
    with torch.no_grad():
        for apply, commutes in ((net, False), (over_turns(net), True)):
            other = turn(apply(x), 1, mirror=True)
            assert torch.allclose(apply(turn(x, 1, mirror=True)), other, atol=1e-5) == commutes
        odd = x[..., 1:]
        assert torch.allclose(over_turns(smooth)(odd), smooth(odd), atol=1e-6)
