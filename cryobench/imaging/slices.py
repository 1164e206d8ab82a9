"""Central slices of a volume's transform and their derivatives, many at a time, for searches that need both.

As :class:`cryobench.imaging.projection.Projector`, but the table holds at each grid point the transforms of V, xV, yV
and zV side by side: d/dk of a transform is -2 pi i times that of the volume times the coordinate, so the slope of a
slice costs hardly more than the slice. Plain trilinear weights, a little less exact than the Projector's.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


class SliceTable:
    """Samples slices of a volume (d, d, d), z, y, x, float32.

    padding: how much finer than the images' the grid is. Memory: about 20 (padding d)^3 bytes.
    """

    def __init__(self, volume: Tensor, padding: float = 2.0) -> None:
        d = self.size = len(volume)
        m = self._padded = 2 * round(padding * d / 2)
        self.device = volume.device
        axis = torch.arange(d, device=self.device, dtype=torch.float32) - d // 2
        kernel = torch.sinc(axis / m) ** 2  # transform of the trilinear kernel, divided out beforehand
        volume = volume.float() / (kernel[:, None, None] * kernel[:, None] * kernel)
        moments = [volume, volume * axis, volume * axis[:, None], volume * axis[:, None, None]]
        # half space x >= 0 with a rim, so that every sample finds its neighbours: indices -1 .. m / 2 + 1 of y and z
        z = torch.arange(-(m // 2) - 1, m // 2 + 2, device=self.device) % m
        x = torch.arange(m // 2 + 2, device=self.device)
        rows = []
        for power, moment in enumerate(moments):
            padded = torch.zeros(m, m, m, device=self.device)
            padded[:d, :d, :d] = moment
            transform = torch.fft.rfftn(padded.roll((-(d // 2),) * 3, (0, 1, 2)))
            beyond = transform[..., m // 2 - 1].flip((0, 1)).roll((1, 1), (0, 1)).conj()  # at x = m / 2 + 1
            transform = torch.cat([transform, beyond[..., None]], -1)[z][:, z][:, :, x]
            rows.append(torch.view_as_real(transform if power == 0 else transform * (-2j * math.pi / d)))
        self._shape = rows[0].shape[:3]
        self._table = torch.stack(rows, 3).flatten(0, 2).flatten(1)  # (cells, 8)
        _, ny, nx = self._shape
        steps = [(k * ny + j) * nx + i for k in (0, 1) for j in (0, 1) for i in (0, 1)]
        self._steps = steps
        self._values = self._table[:, :2].contiguous()

    def sample(self, rotations: Tensor, points: Tensor) -> Tensor:
        """Transforms (n, m), complex, of the views through rotations (n, 3, 3) at points (2, m), kx and ky in cycles
        per image, all within Nyquist; the origin of the images is their centre pixel."""
        return self._gather(self._values, rotations, points)[..., 0]

    def with_slopes(self, rotations: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`sample`, and its derivatives (3, n, m) by the frequency along the axes of the *image* frame."""
        values = self._gather(self._table, rotations, points)
        slopes = torch.einsum("nma,nab->bnm", values[..., 1:], rotations.to(values.dtype))
        return values[..., 0], slopes

    def _gather(self, table: Tensor, rotations: Tensor, points: Tensor) -> Tensor:
        m, d = self._padded, self.size
        position = (rotations[:, :, :2].transpose(0, 1).reshape(-1, 2) @ (points * (m / d))).view(3, -1)
        opposite = position[0] < 0
        sign = 1 - 2 * opposite.to(position.dtype)
        position = position * sign
        position[1:] += m // 2 + 1
        corner = position.floor()
        f = position - corner
        x, y, z = corner.to(torch.int32)
        _, ny, nx = self._shape
        first = (z * ny + y) * nx + x
        cells = torch.stack([first + step for step in self._steps], 1)
        low = 1 - f
        planes = [a * b for a in (low[2], f[2]) for b in (low[1], f[1])]
        weight = torch.stack([plane * x for plane in planes for x in (low[0], f[0])], 1)
        value = F.embedding_bag(cells, table, per_sample_weights=weight, mode="sum")
        value = torch.view_as_complex(value.view(len(value), -1, 2))
        # at the opposite frequency a real volume's transform is the conjugate; of the slopes it is minus that
        value.imag *= sign[:, None]
        if value.shape[1] > 1:
            value[:, 1:] *= sign[:, None]
        return value.view(len(rotations), -1, value.shape[1])


def resized(volume: Tensor, size: int) -> Tensor:
    """The volume (d, d, d) on a grid of another size over the same box: its Fourier coefficients cut, or continued by
    zeros. They keep their values, so that voxels are (d / size)^3 times what they were."""
    d = len(volume)
    if d == size:
        return volume
    transform = torch.fft.fftshift(torch.fft.fftn(torch.fft.ifftshift(volume)))
    reach = (min(d, size) - 1) // 2  # the Nyquist plane of an even size has no partner

    def middle(n: int) -> slice:
        return slice(n // 2 - reach, n // 2 + reach + 1)

    out = torch.zeros(size, size, size, dtype=transform.dtype, device=volume.device)
    out[(middle(size),) * 3] = transform[(middle(d),) * 3]
    return torch.fft.fftshift(torch.fft.ifftn(torch.fft.ifftshift(out)).real)
