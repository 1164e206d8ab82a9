"""A method made ready for somebody's own images: weights from a file, or a fit on what is at hand."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cryobench.errors import CryobenchError
from cryobench.imaging.ctf import ContrastTransfer
from cryobench.imaging.image_scale import image_scale
from cryobench.imaging.particles import Simulation, Simulator, stream_seed
from cryobench.imaging.stacks import clean_beside, read_images
from cryobench.imaging.training_data import Reference, TrainingData
from cryobench.methods import em3d
from cryobench.methods.base import Budget, Denoiser
from cryobench.methods.noise_level import corner_mask, estimate_sigma
from cryobench.methods.registry import get_method
from cryobench.paths import cache_dir, project_root
from cryobench.specimens.catalog import Structure, resolve
from cryobench.specimens.mrc import read_header

#: what a trained method learns from where the user gives nothing: size in px, number of images
BUILT_IN_TRAINING = {"smoke": (32, 64), "quick": (64, 1000), "full": (128, 10_000)}
#: how many times wider than the structure's usual box an image may be
WIDEST = 5.0
#: pixel sizes that differ by less are taken for the same
PIXEL_TOLERANCE = 1e-2


def prepare_method(
    name: str,
    images: Tensor,
    sigma: float,
    pixel_size: float,
    *,
    profile: str,
    train_on: Sequence[str] = (),
    weights: str | None = None,
    reference: Structure | None = None,
    ctf: ContrastTransfer | None = None,
    options: Mapping[str, Any] | None = None,
    device: str = "cpu",
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Denoiser, Path | None]:
    """The method ``name`` ready to denoise ``images`` (n, h, w) of noise level sigma and pixel size in angstrom; and
    where its fit is kept, a file for the caller to delete once what the fit was for is written (None: nothing is).

    weights: file to load, or "shipped" for those that come with cryobench. train_on: stacks to learn from, each with
    its clean images beside it (STACK_clean.mrcs) if the method's supervision asks for them. reference: the structure,
    for methods that know it; ctf: of ``images``. With neither weights nor train_on, a method that needs noisy images
    only learns from ``images``; one that needs clean images or pairs learns from simulated projections, at the SNR of
    ``images``, of the reference or the built-in ``channel``; and ``channel`` is the reference where none is given.
    options: fields of the method's configuration, over those of the profile. A killed fit goes on from what is kept.
    ``say`` announces what is not the user's own.
    Raises CryobenchError for unknown methods, for what the method cannot use, for images that are not finite, and for
    stacks of different sizes or without clean images.
    """
    method_class = get_method(name)
    supervision = method_class.supervision
    if not torch.isfinite(images).all():
        raise CryobenchError("images hold NaN or infinite values: mend or remove those images first")
    if reference is not None and supervision != "reference":
        raise CryobenchError(f"{name} knows no structure: --reference is for methods of supervision 'reference'")
    if reference is not None and weights:
        raise CryobenchError("--weights hold the structure already: give them or --reference")
    if train_on and supervision == "reference":
        raise CryobenchError(f"{name} does not learn from stacks: give the structure with --reference")
    if train_on and method_class.fit is Denoiser.fit:
        raise CryobenchError(f"{name} learns nothing: leave --train-on out")
    if train_on and supervision == "noisy-pairs":
        raise CryobenchError(f"{name} learns from pairs of exposures, which --train-on cannot give: use --weights")
    if train_on and ctf is not None and method_class.uses_ctf:
        raise CryobenchError(f"{name} needs the CTF of what it learns from, and --ctf is that of the input only")
    fields = {f.name for f in dataclasses.fields(method_class.Config)}
    for option in options or {}:
        if option not in fields:
            raise CryobenchError(f"{name} takes no --{option}: leave it out, or use em3d")
        if weights:
            raise CryobenchError(f"--weights hold the settings of their fit: give them or --{option}")
    if ctf is not None and not method_class.uses_ctf:
        say(f"{name} makes no use of the CTF")
    if ctf is None and (weights == "shipped" or supervision not in ("none", "sigma", "noisy")) and _looks_dark(images):
        say(f"these particles look dark, and {name} expects bright ones: multiply the images by -1 first")
    if weights:
        method = method_class.load(_shipped(name, say) if weights == "shipped" else weights, device)
        learnt = method.info.get("pixel_size", pixel_size)
        if "volume" in method.state and abs(learnt / pixel_size - 1) > PIXEL_TOLERANCE:
            raise CryobenchError(
                f"--weights hold a structure of {learnt:g} A pixels, the images have {pixel_size:g} A (or --pixel-size)"
            )
        return method, None
    method = method_class(method_class.config_for(profile, **(options or {})), device, seed)
    if method_class.fit is Denoiser.fit:
        return method, None
    if train_on:
        train = _from_stacks(supervision, train_on, pixel_size, say)
    elif supervision in ("none", "sigma", "noisy"):
        train = TrainingData(supervision, images, None, sigma, pixel_size, ctf=ctf)
    elif supervision == "reference" and not method_class.trained:
        train = _from_structure(reference, images, sigma, pixel_size, ctf, device, say)
    else:  # it learns from pairs, and of these images there are none
        train = _from_simulation(reference, supervision, images, sigma, pixel_size, profile, device, seed, say)
    kept = _checkpoint(method, train, say) if method_class.trained else None
    method.fit(train, Budget(checkpoint=kept))
    return method, kept


def _looks_dark(images: Tensor) -> bool:
    """Whether images (n, h, w), n > 1, are clearly darker in the middle than in their corners."""
    height, width = images.shape[1:]
    corners, middle = corner_mask(height, width), (slice(height // 4, -(height // 4)), slice(width // 4, -(width // 4)))
    if len(images) < 2 or min(height, width) < 8 or not corners.any():
        return False
    contrast = images[:, middle[0], middle[1]].mean((1, 2)) - images[:, corners].mean(1)
    return bool(contrast.mean() < -5 * contrast.std() / len(contrast) ** 0.5)


def _checkpoint(method: Denoiser, train: TrainingData, say: Callable[[str], None]) -> Path | None:
    """The file of the cache for this very fit: no other data, settings, device or version of the code share its name.
    None where the cache cannot be written."""
    facts = [method.name, method.config, method.seed, method.device, train.supervision, train.pixel_size, train._sigma]
    stacks = [train._noisy, train._clean]
    if train.ctf is not None:
        facts.append(train.ctf.optics)
        stacks.append(train.ctf.defocus)
    facts.append([None if stack is None else stack.shape for stack in stacks])
    key = hashlib.sha256(repr(facts).encode())
    for stack in stacks:
        if stack is not None:
            key.update(stack.cpu().contiguous().numpy().data)
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        key.update(file.read_bytes())
    path = cache_dir() / "denoise" / f"{method.name}-{key.hexdigest()[:24]}.pt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        say(f"nothing is kept for the case that this is killed ({error}): set CRYOBENCH_CACHE to a folder for it")
        return None
    if path.exists():
        say(f"going on from {path}")
    return path


def best_poses(method: Denoiser) -> tuple[Tensor, Tensor, Tensor]:
    """Of each image that em3d was fitted to, the likeliest pose, rotation (n, 3, 3) and shift (n, 2) in pixels; and its
    half (n,), 1 or 2.

    Raises CryobenchError where an image has none.
    """
    if not isinstance(method, em3d.Method):
        raise CryobenchError(f"{method.name} finds no poses: em3d does")
    modes, subset = method.poses, method.subset
    images = torch.arange(len(subset))
    order = modes.evidence().argsort(descending=True)
    order = order[modes.owner[order].argsort(stable=True)]  # image by image, the best first
    first = torch.searchsorted(modes.owner[order], images).clamp(max=len(order) - 1)
    best = order[first]
    if not torch.equal(modes.owner[best], images):
        raise CryobenchError("there are images without a pose: no STAR file can be written")
    return modes.rotations[best], modes.shifts[best], subset


def _shipped(name: str, say: Callable[[str], None]) -> Path:
    """Weights that come with cryobench, of the full profile rather than of quick; says what they learned from."""
    files = {p.stem: p for p in (project_root() / "weights").glob("*.json")}
    path = next((files[f"{name}-{p}"] for p in ("full", "quick") if f"{name}-{p}" in files), None)
    if path is None:
        raise CryobenchError(f"no weights of {name} are shipped; there are: {', '.join(sorted(files)) or 'none yet'}")
    o = json.loads(path.read_text())["origin"]
    say(
        f"shipped weights {path.stem}: taught on {o['specimen']} at {o['size']} px of {o['pixel_size']:.3g} A, SNR "
        f"{o['snr']:g}, {o['noise']} noise; what they draw may be of that structure"
    )
    return path


def _from_structure(
    structure: Structure | None,
    images: Tensor,
    sigma: float,
    pixel_size: float,
    ctf: ContrastTransfer | None,
    device: str,
    say: Callable[[str], None],
) -> TrainingData:
    """The images behind the gate with their structure: bright, centred particles in white noise, all of one gain."""
    if structure is None:
        structure = resolve("channel")
        say("no --reference and no --weights: the built-in 'channel' is the structure; what it draws will be that")
    height, width = images.shape[1:]
    size = max(height, width)
    if pixel_size > WIDEST * structure.pixel_size(size):
        raise CryobenchError(
            f"images of {width} x {height} pixels of {pixel_size:g} A are far wider than {structure.name}: "
            "cut out boxes of one particle"
        )
    volume, notes = structure.density(size, pixel_size)
    for note in notes:
        say(f"{structure.name}: {note}")
    scale, offset = image_scale(images, volume.to(device), sigma, ctf)
    say(f"estimated from the images: clean = {scale:.6g} * projection of {structure.name} + {offset:.6g}")
    known = Reference(volume, structure.symmetry, scale, offset)
    return TrainingData("reference", images, None, sigma, pixel_size, ctf=ctf, reference=known)


def _from_stacks(
    supervision: str, stacks: Sequence[str], pixel_size: float, say: Callable[[str], None]
) -> TrainingData:
    for path in stacks:
        header = read_header(path)
        stated = 0.0 if header.default_voxel else header.voxel[0]
        if stated > 0 and abs(stated / pixel_size - 1) > PIXEL_TOLERANCE:
            say(f"{path} says {stated:g} A pixels, and is taken for the {pixel_size:g} A of the images to denoise")
    noisy = [read_images(path, pixel_size)[0] for path in stacks]
    clean = None
    if supervision == "clean-pairs":
        clean = [read_images(clean_beside(Path(path)), pixel_size)[0] for path in stacks]
        if [c.shape for c in clean] != [x.shape for x in noisy]:
            raise CryobenchError("a stack to train on and its clean images differ in shape")
    if len({x.shape[1:] for x in noisy}) > 1:
        raise CryobenchError("the stacks to train on have images of different sizes")
    images = torch.cat(noisy)
    return TrainingData(supervision, images, torch.cat(clean) if clean else None, estimate_sigma(images), pixel_size)


def _from_simulation(
    structure: Structure | None,
    supervision: str,
    images: Tensor,
    sigma: float,
    pixel_size: float,
    profile: str,
    device: str,
    seed: int,
    say: Callable[[str], None],
) -> TrainingData:
    size, n = BUILT_IN_TRAINING[profile]
    if sigma <= 0:
        raise CryobenchError("the noise level is zero: nothing to learn; give --train-on or --weights")
    power = float(images.double().var()) - sigma**2
    snr = min(max(power / sigma**2, 0.01), 10.0)
    name = "the built-in 'channel'" if structure is None else structure.name
    structure = structure or resolve("channel")
    # at the pixel size of the images where the structure fits the box
    pixel = max(pixel_size, structure.pixel_size(size))
    volume, _ = structure.density(size, pixel)
    simulator = Simulator(volume, Simulation(size, pixel, snr), device)
    say(
        f"no --train-on and no --weights: training on simulated projections of {name} "
        f"({size} px at {pixel:.3g} A, SNR {snr:.3g} as in these images); what it draws may be of that structure"
    )
    return TrainingData.simulated(supervision, simulator.simulate(n, stream_seed(seed, "built-in")), simulator)
