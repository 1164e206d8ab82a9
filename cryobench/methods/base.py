"""What every denoiser shares: supervision, configuration, checks on its input, saving and loading.

A method is one file in this folder with a frozen dataclass ``Config`` and a class ``Method(Denoiser)``.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from cryobench.errors import BadFileError, CryobenchError
from cryobench.methods.noise_level import estimate_sigma

if TYPE_CHECKING:
    from cryobench.imaging.ctf import ContrastTransfer
    from cryobench.imaging.training_data import TrainingData


@dataclass(frozen=True)
class Budget:
    """How a fit is run; never part of what it computes.

    seconds: stop after this wall time with a checkpoint to resume from (``None``: no limit).
    checkpoint: file that a killed fit resumes from (``None``: keep none).
    progress: show a progress bar on stderr.
    """

    seconds: float | None = None
    checkpoint: Path | None = None
    progress: bool = True


class Denoiser:
    """Base of all methods.

    Class attributes: ``name`` as shown in tables; ``paper``, a citation key; ``supervision``, one of
    ``imaging.training_data.SUPERVISION``; ``trained``, whether :meth:`fit` learns something; ``Config``, the frozen
    dataclass of hyper-parameters with the paper's values as defaults; ``profiles``, the fields that the
    profiles ``smoke`` and ``quick`` change; ``equivariant``, whether an input scaled by a > 0 and
    shifted by b gives an output scaled and shifted alike; ``uses_ctf``, whether :meth:`denoise` takes the images'
    contrast transfer as a third argument ``ctf``; ``streams``, whether :meth:`denoise` takes the stack where it is
    and moves parts of it to the device; ``costly``, whether an image takes so long that side experiments should use
    fewer.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    supervision: ClassVar[str] = "none"
    trained: ClassVar[bool] = False
    equivariant: ClassVar[bool] = True
    uses_ctf: ClassVar[bool] = False
    streams: ClassVar[bool] = False
    costly: ClassVar[bool] = False
    Config: ClassVar[type] = None  # type: ignore[assignment]
    profiles: ClassVar[dict[str, dict[str, Any]]] = {}

    def __init__(self, config: Any = None, device: str | torch.device = "cpu", seed: int = 0) -> None:
        self.config = self.Config() if config is None else config
        self.device = torch.device(device)
        self.seed = seed
        #: what fit learned, by name; saved and loaded as it stands
        self.state: dict[str, Tensor] = {}
        #: plain facts about the fit (loss curve, images per second), saved beside the state
        self.info: dict[str, Any] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "denoise" in cls.__dict__:
            cls.denoise = _checked(cls.__dict__["denoise"])  # type: ignore[method-assign]

    @classmethod
    def config_for(cls, profile: str, **overrides: Any) -> Any:
        """The configuration of a profile, with single fields replaced by name.

        Raises CryobenchError for a field that the method does not have or a value of another type.
        """
        values = {**cls.profiles.get(profile, {}), **overrides}
        known = {f.name: f for f in dataclasses.fields(cls.Config)}
        for key, value in values.items():
            if key not in known:
                raise CryobenchError(f"method {cls.name} has no option {key!r}; it has {', '.join(known) or 'none'}")
            default = known[key].default
            wanted = (int, float) if isinstance(default, float) else type(default)
            if default is not None and not isinstance(value, wanted):
                raise CryobenchError(f"method {cls.name}: {key} must be {type(default).__name__}, not {value!r}")
        return cls.Config(**values)

    def fit(self, train: TrainingData, budget: Budget) -> None:
        """Learn from what the supervision allows. A method without training has nothing to do here."""

    def denoise(self, images: Tensor, sigma: float | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """Denoise float32 images of shape (n, h, w); sigma is the noise standard deviation in their units.

        Without sigma it is estimated from the images' corners. A third argument ``ctf`` (ContrastTransfer of the
        images, or None) may be given to every method; those with ``uses_ctf`` use it. The result still shows the
        CTF, as the clean images do that it is scored against. Returns the same shape, on the CPU.
        Raises CryobenchError for another shape or for values that are not finite.
        """
        raise TypeError(f"method {self.name} does not define denoise")

    def save(self, path: str | Path) -> None:
        """Write PATH.safetensors (tensors) and PATH.json (method, configuration, facts about the fit)."""
        from safetensors.torch import save_file

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        head = {
            "method": self.name,
            "config": dataclasses.asdict(self.config),
            "seed": self.seed,
            "info": self.info,
        }
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.state.items()}
        # each file appears whole or not at all; the JSON goes last, so that its presence means "complete"
        partial = path.with_name(path.name + ".safetensors.part")
        save_file(tensors, partial)
        partial.rename(path.with_name(path.name + ".safetensors"))
        partial = path.with_name(path.name + ".json.part")
        partial.write_text(json.dumps(head, indent=1))
        partial.rename(path.with_name(path.name + ".json"))

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> Denoiser:
        """Read what :meth:`save` wrote; PATH may carry either suffix. Raises BadFileError otherwise."""
        from safetensors.torch import load_file

        path = Path(path)
        stem = path.with_suffix("") if path.suffix in (".safetensors", ".json") else path
        try:
            head = json.loads(stem.with_name(stem.name + ".json").read_text())
            tensors = load_file(stem.with_name(stem.name + ".safetensors"))
            name, seed = head["method"], head["seed"]
            config = {
                k: tuple(v) if isinstance(v, list) else v for k, v in head["config"].items()
            }  # JSON has no tuples
            method = cls(cls.Config(**config) if name == cls.name else None, device, seed)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise BadFileError(f"{path}: not weights saved by cryobench ({reason})") from error
        if name != cls.name:
            raise CryobenchError(f"{path}: weights of {name!r}, not of {cls.name!r}")
        # shipped weights are kept in half precision
        method.state = {k: (v.float() if v.dtype == torch.float16 else v).to(method.device) for k, v in tensors.items()}
        method.info = head["info"]
        return method


def _checked(denoise: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap a method's denoise: what every method refuses or fills in stands here once."""

    @functools.wraps(denoise)
    def wrapper(
        self: Denoiser, images: Tensor, sigma: float | None = None, ctf: ContrastTransfer | None = None
    ) -> Tensor:
        if images.ndim != 3 or min(images.shape) < 1:
            raise CryobenchError(f"images must have shape (n, height, width), not {tuple(images.shape)}")
        if not torch.isfinite(torch.stack(images.aminmax())).all():  # isfinite(images) copies the stack
            raise CryobenchError("images hold NaN or infinite values: mend or remove those images first")
        if sigma is None and self.supervision != "none":
            sigma = estimate_sigma(images)
        if ctf is not None and len(ctf) != len(images):
            raise CryobenchError(f"{len(images)} images with the CTF of {len(ctf)}")
        optional = {"ctf": ctf} if self.uses_ctf else {}
        with torch.no_grad():
            device = images.device if self.streams else self.device
            out = denoise(self, images.to(device, torch.float32), sigma, **optional)
        return out.to("cpu", torch.float32)

    return wrapper
