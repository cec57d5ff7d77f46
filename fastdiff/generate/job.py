"""Jobs: what a user asks for, one frozen dataclass per kind.

One object is the keyword arguments of `model.generate`, the options of a command, the recipe in a
PNG and a line of a file of jobs. What can be checked without a model is checked when the object is
made; `check` does the rest and fills in what the model decides.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, make_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from torch import Tensor

from fastdiff.configs import from_dict, to_dict
from fastdiff.generate.facts import Facts
from fastdiff.generate.settings import SampleSettings, TextSettings, first_step, resolved
from fastdiff.images import read_image, read_mask

MAX_SEED = 2**63 - 1
Picture = Tensor | str | os.PathLike[str]
"""A file, or pixels: (C, H, W) in [-1, 1]; of a mask (1, H, W), from 0.5 on new."""
Via = Literal["latent", "image"]
PLAIN, PLAIN_TEXT = SampleSettings(), TextSettings()


@dataclass(frozen=True, kw_only=True)
class ClassJob:
    """An image of a class, or of none; from an upsampler, of a small image."""

    label: int | str | None = None
    """The class by number or name; None: no class."""
    image: Picture | None = None
    """Upsamplers: the low-resolution image to enlarge."""
    seed: int = 0
    """Of all randomness in the image."""
    variation_seed: int | None = None
    """Start from noise between the seed's and this one's, on the sphere (slerp)."""
    variation: float = 0.0
    """How far towards it, 0 to 1."""
    height: int | None = None
    """Height in pixels; None: as the model was trained."""
    width: int | None = None
    """Width in pixels; None: as the model was trained."""
    settings: SampleSettings = PLAIN
    """How to sample."""

    def __post_init__(self) -> None:
        _check_start(self)


@dataclass(frozen=True, kw_only=True)
class TextJob:
    """An image from a prompt."""

    prompt: str
    """What to draw; (word:1.3), (word) and [word] are weights."""
    seed: int = 0
    """Of all randomness in the image."""
    variation_seed: int | None = None
    """Start from noise between the seed's and this one's, on the sphere (slerp)."""
    variation: float = 0.0
    """How far towards it, 0 to 1."""
    height: int | None = None
    """Height in pixels; as the model was trained if left out."""
    width: int | None = None
    """Width in pixels; as the model was trained if left out."""
    upscale: float | None = None
    """Enlarge both sides by this factor in a second pass ("hires fix")."""
    upscale_strength: float = 0.6
    """Share of the steps that the second pass does."""
    upscale_via: Via = "latent"
    """Enlarge the latents, or the image between decoding and encoding."""
    switch: float = 0.8
    """With a refiner: share of the noise that is the base's, the rest the refiner's."""
    text: TextSettings = PLAIN_TEXT
    """How the prompt becomes a condition."""
    settings: SampleSettings = PLAIN
    """How to sample."""

    def __post_init__(self) -> None:
        _check_start(self)
        if self.upscale is not None:
            _check_scale(self.upscale, self.upscale_via)
            first_step(1, self.upscale_strength)


@dataclass(frozen=True, kw_only=True)
class ImageToImageJob:
    """A variation of an image, after a prompt or a class."""

    image: Picture
    """The picture to begin with."""
    prompt: str | None = None
    """What it is to become, for models that read text."""
    label: int | str | None = None
    """What it is to become, for models of classes: one by number or name; None: no class."""
    strength: float = 0.75
    """Share of the steps that are done: 0 keeps the image, 1 makes a new one."""
    seed: int = 0
    """Of all randomness in the image."""
    height: int | None = None
    """Crop and resize the picture to this height first."""
    width: int | None = None
    """Crop and resize the picture to this width first."""
    text: TextSettings = PLAIN_TEXT
    """How the prompt becomes a condition."""
    settings: SampleSettings = PLAIN
    """How to sample."""

    def __post_init__(self) -> None:
        check_seed(self.seed)
        first_step(1, self.strength)


@dataclass(frozen=True, kw_only=True)
class InpaintJob:
    """An image that is new where a mask is 1."""

    image: Picture
    """The picture to change."""
    mask: Picture
    """A picture of the same size, white where the image is to be new."""
    prompt: str | None = None
    """What the masked part is to become, for models that read text."""
    label: int | str | None = None
    """What it is to become, for models of classes: one by number or name; None: no class."""
    strength: float = 1.0
    """Below 1 the image shines through where it is masked."""
    paste: bool = True
    """Put the image's own pixels back outside the mask."""
    seed: int = 0
    """Of all randomness in the image."""
    height: int | None = None
    """Crop and resize the picture and the mask to this height first."""
    width: int | None = None
    """Crop and resize the picture and the mask to this width first."""
    text: TextSettings = PLAIN_TEXT
    """How the prompt becomes a condition."""
    settings: SampleSettings = PLAIN
    """How to sample."""

    def __post_init__(self) -> None:
        check_seed(self.seed)
        first_step(1, self.strength)


@dataclass(frozen=True, kw_only=True)
class UpscaleJob:
    """A larger image: enlarged, then given detail by image-to-image."""

    image: Picture
    """The picture to enlarge."""
    prompt: str | None = None
    """What it shows, for models that read text."""
    label: int | str | None = None
    """What it shows, for models of classes: one by number or name; None: no class."""
    scale: float = 2.0
    """Factor of both sides; the result's are rounded to what the networks can halve."""
    via: Via = "latent"
    """Enlarge the latents (bicubic; soft, so strength 0.5 and more), or the image between decoding
    and encoding (keeps more at low strength)."""
    strength: float = 0.6
    """Share of the steps that are done."""
    seed: int = 0
    """Of all randomness in the image."""
    text: TextSettings = PLAIN_TEXT
    """How the prompt becomes a condition."""
    settings: SampleSettings = PLAIN
    """How to sample."""

    def __post_init__(self) -> None:
        check_seed(self.seed)
        first_step(1, self.strength)
        _check_scale(self.scale, self.via)


ImageJob = ImageToImageJob | InpaintJob | UpscaleJob
Job = ClassJob | TextJob | ImageJob
KINDS: dict[str, type[Any]] = {
    "class": ClassJob,
    "text": TextJob,
    "image-to-image": ImageToImageJob,
    "inpaint": InpaintJob,
    "upscale": UpscaleJob,
}
PICTURES = ("image", "mask")
GROUPS = {"text": TextSettings, "settings": SampleSettings}
AnyJob = TypeVar("AnyJob", ClassJob, TextJob, ImageToImageJob, InpaintJob, UpscaleJob)


def check(job: Job, facts: Facts) -> Job:
    """The job as the model does it: the class as a number, the defaults filled in.

    Raises:
        ValueError: it does not fit the model; one line with the way out.
    """
    settings = resolved(job.settings, facts)
    facts.check_guidance(settings.weight)
    negative = None if isinstance(job, ClassJob) else job.text.negative
    if settings.weight == 1 and negative is not None:
        raise ValueError(
            f"guidance_scale {settings.guidance_scale:g} is no guidance and has no negative "
            f"prompt, got {negative!r:.40}; leave one of them out"
        )
    _check_condition(job, facts)
    change: dict[str, Any] = {"settings": settings}
    if not isinstance(job, TextJob) and not facts.reads_text:
        change["label"] = facts.label(job.label)
    if isinstance(job, ClassJob | TextJob):
        change["height"], change["width"] = facts.size(job.height, job.width)
    return replace(job, **change)


def _check_condition(job: Job, facts: Facts) -> None:
    """A prompt, a class, an image to inpaint or enlarge: what the model reads, and no more."""
    prompt = None if isinstance(job, ClassJob) else job.prompt
    if facts.reads_text and prompt is None:
        raise ValueError(
            f"{facts.name} draws what a prompt says; give it one "
            "(model.generate('a cat'), or fastdiff txt2img PROMPT)"
        )
    if not facts.reads_text and prompt is not None:
        raise ValueError(
            f"the denoiser of {facts.name} reads no text, got prompt {prompt!r:.40}; leave the "
            "prompt out (fastdiff sample draws classes)"
        )
    if facts.reads_text and getattr(job, "label", None) is not None:
        raise ValueError(f"this model has no classes, got class {job.label!r}; leave it out")  # type: ignore[union-attr]
    if facts.extra == "inpainting" and not isinstance(job, InpaintJob):
        reads = facts.channels * 2 + 1
        raise ValueError(
            f"this denoiser reads {reads} channels, {facts.channels} of latents and an image to "
            "inpaint; use inpaint, with a mask of ones to make the whole image new"
        )
    if facts.extra == "upsampler" and (not isinstance(job, ClassJob) or job.image is None):
        raise ValueError(
            f"{facts.name} enlarges a small image and needs one; give image= "
            "(fastdiff sample --image FILE)"
        )
    if facts.extra != "upsampler" and isinstance(job, ClassJob) and job.image is not None:
        raise ValueError(
            f"{facts.name} is not an upsampler and starts from noise; for variations of an image "
            "use an ImageToImageJob (fastdiff img2img)"
        )


def make_job(kind: type[AnyJob], options: Mapping[str, Any]) -> AnyJob:
    """A job from flat names: its own fields, and those of its settings and of its text.

    Raises:
        ValueError: an unknown name, a missing one, or a value that makes no sense.
    """
    own: dict[str, Any] = {field.name: field for field in fields(kind)}
    groups: dict[str, type[Any]] = {name: GROUPS[name] for name in own if name in GROUPS}
    given: dict[str, Any] = {name: options[name] for name in own if name in options}
    for name, group in groups.items():
        inner = {f.name: options[f.name] for f in fields(group) if f.name in options}
        if inner:
            given[name] = replace(given.get(name, own[name].default), **inner)
    known = [*own, *(f.name for group in groups.values() for f in fields(group))]
    if unknown := [name for name in options if name not in known]:
        raise ValueError(
            f"unknown option {unknown[0]!r}; expected one of "
            f"{', '.join(name for name in known if name not in GROUPS)}"
        )
    return kind(**given)


def to_json(job: Job) -> dict[str, Any]:
    """A job as JSON: its kind, its fields, and pictures as path and sha256 of the file's bytes.

    A picture given as pixels has no path, and the hash of its numbers.
    """
    kind = next(name for name, cls in KINDS.items() if isinstance(job, cls))
    data: dict[str, Any] = {"kind": kind}
    for field in fields(job):
        value = getattr(job, field.name)
        if is_dataclass(value):
            value = {k: v for k, v in to_dict(value).items() if k != "batch"}
        elif field.name in PICTURES and value is not None:
            value = identity(value)
        data[field.name] = value
    return data


def from_json(data: Any) -> Job:
    """Read what `to_json` gave; what is left out has its default.

    Raises:
        ValueError: an unknown kind or field, a missing or wrong value.
    """
    if not isinstance(data, dict) or data.get("kind") not in tuple(KINDS):
        got = data.get("kind") if isinstance(data, dict) else data
        raise ValueError(f"unknown kind of job {got!r:.40}; expected one of {', '.join(KINDS)}")
    cls = KINDS[data["kind"]]
    hints = get_type_hints(cls)
    plain = [
        (f.name, hints[f.name], f) if f.default is not MISSING else (f.name, hints[f.name])
        for f in fields(cls)
        if f.name not in PICTURES
    ]
    rest = {k: v for k, v in data.items() if k != "kind" and k not in PICTURES}
    shape = make_dataclass(cls.__name__, plain, frozen=True, kw_only=True)
    made: Any = from_dict(shape, rest)
    given = {name: getattr(made, name) for name, *_ in plain}
    for name in PICTURES:
        if data.get(name) is not None:
            given[name] = _path(name, data[name])
    missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in given]
    if missing:
        raise ValueError(f"{cls.__name__}: {missing[0]}: missing")
    job: Job = cls(**given)
    return job


def identity(picture: Picture) -> dict[str, str | None]:
    """A picture in a recipe: where it lay, and the hash of its bytes or numbers."""
    if isinstance(picture, Tensor):
        numbers = picture.detach().float().cpu().contiguous().numpy().tobytes()
        return {"path": None, "sha256": hashlib.sha256(numbers).hexdigest()}
    path = Path(picture)
    return {"path": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _path(name: str, value: Any) -> str:
    path = value.get("path") if isinstance(value, dict) else value
    if not isinstance(path, str):
        raise ValueError(
            f"the {name} was given as pixels, not as a file, so it cannot be found again; give it"
        )
    return path


def read_picture(picture: Picture, channels: int, height: int | None, width: int | None) -> Tensor:
    """An image as (C, H, W) in [-1, 1], from a file in the model's colours.

    Raises:
        FileNotFoundError, ValueError: no such file, or not such an image.
    """
    if not isinstance(picture, Tensor):
        if channels == 1:
            return read_mask(picture, height=height, width=width) * 2 - 1
        return read_image(picture, height=height, width=width)
    image = picture[0] if picture.ndim == 4 and len(picture) == 1 else picture
    if image.ndim != 3 or image.shape[0] != channels or not image.is_floating_point():
        raise ValueError(
            f"the image must be ({channels}, H, W) floating point in [-1, 1], got "
            f"{tuple(image.shape)} {image.dtype}; fastdiff.images.read_image reads one so"
        )
    if (height or image.shape[1], width or image.shape[2]) != tuple(image.shape[1:]):
        raise ValueError(
            f"height and width resize files, got them with pixels of {tuple(image.shape)}; "
            "leave them out"
        )
    low, high = float(image.min()), float(image.max())
    if not -1.001 <= low <= high <= 1.001:
        raise ValueError(
            f"pixels must lie in [-1, 1], got {low:g} to {high:g}; "
            "fastdiff.images.read_image reads an image so"
        )
    return image


def read_mask_of(job: InpaintJob, image: Tensor) -> Tensor:
    """The mask as (1, H, W), 0 or 1, fp32. image: (C, H, W), the job's.

    Raises:
        ValueError: another size than the image, more than one channel, or all zeros.
    """
    mask = job.mask
    if not isinstance(mask, Tensor):
        mask = read_mask(mask, height=job.height, width=job.width)
    given = tuple(mask.shape)
    mask = mask[None] if mask.ndim == 2 else mask[0] if mask.ndim == 4 and len(mask) == 1 else mask
    if mask.ndim != 3 or mask.shape[0] != 1 or mask.shape[1:] != image.shape[1:]:
        height, width = image.shape[1:]
        raise ValueError(
            f"the mask must be (1, {height}, {width}), as large as the image, got {given}; "
            "resize it, and give it one channel"
        )
    binary = (mask if mask.is_floating_point() is False else mask >= 0.5).float()
    if not binary.any():
        raise ValueError(
            "the mask is empty, expected 1 (white) where the image is to be new; invert it?"
        )
    return binary


def check_seed(seed: int) -> None:
    """Raise ValueError unless it is a whole number from 0 to 2**63 - 1."""
    if type(seed) is not int or not 0 <= seed <= MAX_SEED:
        raise ValueError(f"a seed must be a whole number from 0 to 2**63 - 1, got {seed!r:.40}")


def stage_seed(seed: int, stage: str) -> int:
    """A seed for a second pass, such as "upscale": no number of the first pass's noise recurs."""
    digest = hashlib.blake2b(f"{stage} {seed}".encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little") & MAX_SEED


def _check_start(job: Any) -> None:
    check_seed(job.seed)
    if job.variation_seed is not None:
        check_seed(job.variation_seed)
    if not 0 <= job.variation <= 1:
        raise ValueError(
            f"variation must lie in [0, 1], got {job.variation}; 0 is the seed's own image"
        )
    if job.variation and job.variation_seed is None:
        raise ValueError(
            f"variation {job.variation:g} goes towards another seed's noise; give variation_seed"
        )


def _check_scale(scale: float, via: str) -> None:
    if not 1 <= scale <= 16:
        raise ValueError(f"scale must lie in 1 to 16, got {scale}; 2 doubles both sides")
    if via not in get_args(Via):
        raise ValueError(f"unknown way {via!r}; expected one of latent, image")
