"""What a method may see while it learns, and nothing else. This is how the tables stay fair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cryobench.errors import CryobenchError, SupervisionError
from cryobench.imaging.ctf import ContrastTransfer
from cryobench.imaging.particles import Particles, Simulator, stream_seed
from cryobench.imaging.turns import turn

#: What a method may see, from nothing to the structure itself. Each level includes the ones before it.
SUPERVISION = ("none", "sigma", "noisy", "noisy-pairs", "clean-pairs", "reference")


@dataclass(frozen=True)
class Reference:
    """The structure behind the images: a clean image is scale * CTF * projection of volume + offset.

    volume (size, size, size), z, y, x; symmetry: its point group, C1 where none is known; noise: kind of the
    noise, one of ``imaging.noise.KINDS``; bfactor in square angstrom, part of the CTF; shift and contrast: how
    far particles are off-centre (pixels) and how much their gain varies.
    """

    volume: Tensor
    symmetry: str = "C1"
    scale: float = 1.0
    offset: float = 0.0
    noise: str = "white"
    bfactor: float = 0.0
    shift: float = 0.0
    contrast: float = 0.0


class TrainingData:
    """Training images behind a gate: asking for more than ``supervision`` allows raises SupervisionError.

    Built from a simulated data set (``simulator`` given: fresh poses and noise for every batch where the
    supervision allows it) or from stacks alone (batches are drawn from them).
    Images are float32 (n, size, size) on one global scale; sigma is the noise standard deviation; ctf the
    contrast transfer of each noisy image, None without one. reference is for data that come from no simulator.
    Raises CryobenchError for unknown supervision and for images that are not finite.
    """

    def __init__(
        self,
        supervision: str,
        noisy: Tensor,
        clean: Tensor | None,
        sigma: float,
        pixel_size: float,
        simulator: Simulator | None = None,
        affine: tuple[float, float] = (1.0, 0.0),
        second: Tensor | None = None,
        seed: int = 0,
        ctf: ContrastTransfer | None = None,
        reference: Reference | None = None,
    ) -> None:
        if supervision not in SUPERVISION:
            raise CryobenchError(f"unknown supervision {supervision!r}; one of {', '.join(SUPERVISION)}")
        for stack in (noisy, clean, second):
            if stack is not None and not torch.isfinite(torch.stack(stack.aminmax())).all():  # no copy of the stack
                raise CryobenchError("training images hold NaN or infinite values: mend or remove those images first")
        self.supervision = supervision
        self.pixel_size = pixel_size
        self.size = noisy.shape[-1]
        self._noisy, self._clean, self._second = noisy, clean, second
        self._seed = seed
        self._sigma = sigma
        self._simulator, self._affine = simulator, affine
        self._reference = reference
        #: microscopists fit it to every micrograph, so that it is known at every level of supervision
        self.ctf = ctf

    @classmethod
    def simulated(cls, supervision: str, particles: Particles, simulator: Simulator, seed: int = 0) -> TrainingData:
        """The gate before a simulated data set; seed is that of its second exposure."""
        return cls(
            supervision,
            particles.noisy,
            particles.clean,
            particles.sigma,
            simulator.simulation.pixel_size,
            simulator,
            (particles.scale, particles.offset),
            seed=seed,
            ctf=simulator.contrast_transfer(particles.defocus),
        )

    def require(self, level: str) -> None:
        """Raises SupervisionError where less than ``level`` is allowed."""
        if SUPERVISION.index(self.supervision) < SUPERVISION.index(level):
            raise SupervisionError(f"a method declared {self.supervision!r} may not see what needs {level!r}")

    @property
    def sigma(self) -> float:
        """Noise standard deviation (needs ``sigma``)."""
        self.require("sigma")
        return self._sigma

    @property
    def noisy(self) -> Tensor:
        """Noisy images (n, size, size) (needs ``noisy``)."""
        self.require("noisy")
        return self._noisy

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Two exposures of the same particles with independent noise (needs ``noisy-pairs``)."""
        self.require("noisy-pairs")
        if self._second is None:
            if self._simulator is None or self._clean is None:
                raise CryobenchError("no second exposure of these images: give pairs, or simulate them")
            second, _ = self._simulator.noisy(self._clean, stream_seed(self._seed, "second exposure"), self._sigma)
            self._second = second.cpu()
        return self._noisy, self._second

    @property
    def clean(self) -> Tensor:
        """Clean images (n, size, size) of the noisy ones (needs ``clean-pairs``)."""
        self.require("clean-pairs")
        if self._clean is None:
            raise CryobenchError(
                "no clean images beside these noisy ones: give a stack with STACK_clean.mrcs beside it"
            )
        return self._clean

    @property
    def reference(self) -> Reference:
        """The structure itself (needs ``reference``)."""
        self.require("reference")
        if self._simulator is not None:
            simulator, sim = self._simulator, self._simulator.simulation
            return Reference(
                simulator.volume, simulator.symmetry, *self._affine, sim.noise, sim.bfactor, sim.shift, sim.contrast
            )
        if self._reference is None:
            raise CryobenchError("this method needs to know the structure: give --reference")
        return self._reference

    def batch(self, step: int, batch_size: int, seed: int, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
        """Batch number ``step``: (input, target), a pure function of seed and step so that a fit can resume.
        (Fresh noise is other noise on another kind of device.)

        The target is the clean image (``clean-pairs``) or a second exposure (``noisy-pairs``). With clean
        images to be had, simulated data give fresh poses and fresh noise. Otherwise the batch is drawn from the
        stack by :func:`augmented`; pairs stay the two exposures there are, since more of them would average to the
        clean image.
        """
        self.require("noisy-pairs")
        if SUPERVISION.index(self.supervision) < SUPERVISION.index("clean-pairs"):
            return self.pair_batch(step, batch_size, seed, device)
        if self._simulator is not None:
            images, *_ = self._simulator.draw(batch_size, stream_seed(seed, step, "fresh poses"))
            target = images * self._affine[0] + self._affine[1]
            on = self._simulator.device  # hundreds of thousands of images: drawn where they are needed
            noisy, _ = self._simulator.noisy(target, stream_seed(seed, step, "fresh noise"), self._sigma, on)
            return noisy.to(device), target.to(device)
        noisy, target = augmented((self.noisy, self.clean), batch_size, stream_seed(seed, step, "choice"))
        return noisy.to(device), target.to(device)

    def pair_batch(
        self, step: int, batch_size: int, seed: int, device: str | torch.device = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`batch`, with two exposures of the same particles, in either order, at any supervision that has
        them (needs ``noisy-pairs``)."""
        first, second = augmented(self.pairs(), batch_size, stream_seed(seed, step, "choice"))
        swap = stream_seed(seed, step, "which is the input") % 2
        return (second.to(device), first.to(device)) if swap else (first.to(device), second.to(device))


def augmented(stacks: Sequence[Tensor], n: int, seed: int) -> list[Tensor]:
    """n images drawn with replacement, the same of each stack (m, h, w), all turned by one random multiple of 90
    degrees and mirrored at random: a projection so treated is another projection. Images that are not square are not
    turned."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(stacks[0]), (n,), generator=generator)
    quarters, mirror = (int(k) for k in torch.randint(4, (2,), generator=generator))
    images = torch.stack([s[index] for s in stacks])
    return list(turn(images, quarters if images.shape[-1] == images.shape[-2] else 0, mirror % 2 == 1))
