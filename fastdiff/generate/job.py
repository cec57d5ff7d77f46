"""Jobs: what a user asks for, one frozen dataclass per kind.

One object is the keyword arguments of `model.generate`, the options of a command, the recipe in a
PNG and a line of a file of jobs. What can be checked without a model is checked when the object is
made; `facts.check` does the rest and fills in what the model decides. Nothing here imports torch,
so that a command can be read before it is loaded.
"""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from fastdiff.diffusion.guidance import GuidanceConfig
from fastdiff.diffusion.respacing import check_spacing, check_steps
from fastdiff.models.prompts import read_prompt

if TYPE_CHECKING:
    from torch import Tensor

    Picture = Tensor | str | os.PathLike[str]
    """A file, or pixels: (C, H, W) in [-1, 1]; of a mask (1, H, W), from 0.5 on new."""
else:
    Picture = Any  # readers of the annotations get by without torch

MAX_SEED = 2**64 - 1
Via = Literal["latent", "image"]
Fit = Literal["crop", "resize"]
DEFAULT_SAMPLER = "dpmpp-2m"
CHECKPOINT = "checkpoint"
"""As a sampler: what the model's files say (diffusers' scheduler_config.json)."""


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """How to get from noise to an image. What is None is chosen for the model, see
    `facts.resolved`."""

    sampler: str | None = None
    """One of those that 'fastdiff samplers' lists, or checkpoint: as the model's files say; None:
    checkpoint where the files name a sampler, else dpmpp-2m."""
    steps: int | None = None
    """Steps from noise to image; None: as many as a spacing such as 10,15,20 has, else 30 with a
    prompt and 50 without."""
    eta: float | None = None
    """Noise added back per step, for samplers that have it; None: the sampler's own default."""
    guidance_scale: float | None = None
    """Up to 1: the conditional model as it is, at half the cost; more: closer to the condition.
    None: 7.5 with a prompt, 1.5 with classes, 1 where the model cannot be guided."""
    guidance_rescale: float = 0.0
    """phi of Lin et al. 2023 in [0, 1]: against the over-exposure of strong guidance."""
    guidance_interval: tuple[int, int] | None = None
    """Steps [first, stop) that are guided, from 0, the noisiest; None: all."""
    spacing: str | None = None
    """Where the steps lie: trailing, leading, linspace, simple, karras, exponential, FastDPM's
    var-linear, var-quadratic, step-linear, step-quadratic, or IDDPM's strings such as 10,15,20 and
    ddim50; None: with sampler checkpoint as the files say, else the sampler's own."""
    clamp: float | None = None
    """Bound on the estimate of x0; None: with sampler checkpoint as the files say, 1 for the
    published pixel models, else none."""
    tile: int | None = None
    """Latents with a longer side are decoded in tiles of this side, 0: never; None: 128 for models
    that read text, else 96."""
    batch: int | None = None
    """Images at once: bounds memory, has no influence on the images; None: by their size."""

    def __post_init__(self) -> None:
        if self.sampler not in (None, CHECKPOINT):
            from fastdiff.diffusion.samplers import SAMPLERS  # imports torch

            if self.sampler not in SAMPLERS:
                known = ", ".join((*SAMPLERS, CHECKPOINT))
                raise ValueError(f"unknown sampler {self.sampler!r}; expected one of {known}")
        if self.spacing is not None:
            check_spacing(self.spacing)
            if self.steps is not None:
                check_steps(self.spacing, self.steps)
        for name, least in (("steps", 1), ("batch", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.tile is not None and self.tile != 0 and self.tile < 8:
            raise ValueError(f"tile must be at least 8, got {self.tile}; 0 decodes images whole")
        if self.eta is not None and not (math.isfinite(self.eta) and self.eta >= 0):
            raise ValueError(f"eta must be a number >= 0, got {self.eta}; 0 adds no noise")
        if self.clamp is not None and not self.clamp > 0:
            raise ValueError(f"clamp must be positive, got {self.clamp}; 1 fits images")
        if (self.guidance_scale, self.guidance_rescale, self.guidance_interval) != (None, 0, None):
            GuidanceConfig(
                scale=1.0 if self.guidance_scale is None else self.guidance_scale,
                rescale=self.guidance_rescale,
                interval=self.guidance_interval,
            )

    @property
    def weight(self) -> float:
        """The scale that guidance computes with: at least 1, as in diffusers."""
        assert self.guidance_scale is not None, "settings of a checked job"
        return max(self.guidance_scale, 1.0)

    @property
    def total(self) -> int:
        """Steps, of settings of a checked job."""
        assert self.steps is not None, "settings of a checked job"
        return self.steps


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """How prompts become conditions."""

    negative: str | None = None
    """What to guide away from; None: what the model was trained with for "no prompt", which is the
    empty prompt, and for XL's base zeros."""
    clip_skip: int = 0
    """Layers of the text encoder left out, of the negative prompt too; "clip skip 2" elsewhere."""
    emphasis: bool = True
    """Read (word:1.2), (word) and [word] as weights, BREAK as the end of a chunk; False: as
    text, like all other syntax of web UIs, which is refused otherwise."""
    original_size: tuple[int, int] | None = None
    """XL: height and width the image claims to have had before cropping; None: its own."""
    crop: tuple[int, int] = (0, 0)
    """XL: top and left of the crop that the image claims to be."""
    target_size: tuple[int, int] | None = None
    """XL's base: height and width the image claims to have been made for; None: its own."""
    aesthetic_score: float = 6.0
    """XL's refiner: what the prompt claims of the image, 0 to 10."""
    negative_aesthetic_score: float = 2.5
    """XL's refiner: the same of the negative prompt."""

    def __post_init__(self) -> None:
        for name, least in (("original_size", 1), ("crop", 0), ("target_size", 1)):
            sides = getattr(self, name)
            if sides is not None and min(sides) < least:
                raise ValueError(f"{name} must be two numbers >= {least}, got {sides}")
        for name in ("aesthetic_score", "negative_aesthetic_score"):
            if not 0 <= getattr(self, name) <= 10:
                raise ValueError(f"{name} must lie in 0 to 10, got {getattr(self, name)}")
        if self.clip_skip < 0:
            raise ValueError(f"clip_skip must be at least 0, got {self.clip_skip}; 0 leaves none")
        if self.negative is not None:
            read_prompt(self.negative, emphasis=self.emphasis)


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
    """What to draw; (word:1.3), (word) and [word] are weights, BREAK begins a new chunk."""
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
        _check_prompts(self)
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
    fit: Fit | None = None
    """Pictures whose sides the model cannot take: crop them to the next smaller ones around the
    centre, or resize them to the nearest ones; None: refuse them."""
    height: int | None = None
    """Crop and resize the picture to this height first."""
    width: int | None = None
    """Crop and resize the picture to this width first."""
    text: TextSettings = PLAIN_TEXT
    """How the prompt becomes a condition."""
    settings: SampleSettings = PLAIN
    """How to sample."""

    def __post_init__(self) -> None:
        _check_prompts(self)
        _check_fit(self)
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
    fit: Fit | None = None
    """Pictures and masks whose sides the model cannot take: crop them to the next smaller ones
    around the centre, or resize them to the nearest ones; None: refuse them."""
    height: int | None = None
    """Crop and resize the picture and the mask to this height first."""
    width: int | None = None
    """Crop and resize the picture and the mask to this width first."""
    text: TextSettings = PLAIN_TEXT
    """How the prompt becomes a condition."""
    settings: SampleSettings = PLAIN
    """How to sample."""

    def __post_init__(self) -> None:
        _check_prompts(self)
        _check_fit(self)
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
    fit: Fit | None = None
    """Pictures whose sides the model cannot take: crop them to the next smaller ones around the
    centre, or resize them to the nearest ones; None: refuse them."""
    seed: int = 0
    """Of all randomness in the image."""
    text: TextSettings = PLAIN_TEXT
    """How the prompt becomes a condition."""
    settings: SampleSettings = PLAIN
    """How to sample."""

    def __post_init__(self) -> None:
        _check_prompts(self)
        _check_fit(self)
        check_seed(self.seed)
        first_step(1, self.strength)
        _check_scale(self.scale, self.via)


@dataclass(frozen=True, kw_only=True)
class InterpolationJob:
    """A frame on the way from one image to another: between seeds, prompts or classes.

    The noise goes along the great circle between two seeds', the condition along the straight line
    between two. Noise that a sampler adds on its way is the first seed's in every frame.
    """

    prompt: str | None = None
    """The first image's prompt, for models that read text."""
    to_prompt: str | None = None
    """The last image's prompt; None: the first's."""
    label: int | str | None = None
    """The first image's class by number or name, for models of classes; None: no class."""
    to_label: int | str | None = None
    """The last image's class; None: the first's."""
    seed: int = 0
    """The first image's seed."""
    to_seed: int | None = None
    """The last image's seed; None: the first's."""
    at: float = 0.0
    """Where the frame is on the way, from 0, the first image, to 1, the last."""
    height: int | None = None
    """Height in pixels; None: as the model was trained."""
    width: int | None = None
    """Width in pixels; None: as the model was trained."""
    text: TextSettings = PLAIN_TEXT
    """How the prompts become conditions."""
    settings: SampleSettings = PLAIN
    """How to sample."""

    def __post_init__(self) -> None:
        _check_prompts(self)
        check_seed(self.seed)
        if self.to_seed is not None:
            check_seed(self.to_seed)
        if not 0 <= self.at <= 1:
            raise ValueError(f"at must lie in [0, 1], got {self.at}; 0 is the first image")
        if (self.to_seed, self.to_prompt, self.to_label) == (None, None, None):
            raise ValueError(
                "an interpolation needs another image to go to; give one or more of to_seed, "
                "to_prompt and to_label"
            )


ImageJob = ImageToImageJob | InpaintJob | UpscaleJob
Job = ClassJob | TextJob | ImageJob | InterpolationJob
KINDS: dict[str, type[Any]] = {
    "class": ClassJob,
    "text": TextJob,
    "image-to-image": ImageToImageJob,
    "inpaint": InpaintJob,
    "upscale": UpscaleJob,
    "interpolation": InterpolationJob,
}
PICTURES = ("image", "mask")
GROUPS = {"text": TextSettings, "settings": SampleSettings}


def frames_of(job: InterpolationJob, count: int) -> list[InterpolationJob]:
    """The frames of an interpolation at equal distances, both ends included; 1: the one at `at`.

    Raises:
        ValueError: as `check_frames`.
    """
    check_frames(job, count)
    return [frame_of(job, index, count) for index in range(count)]


def frame_of(job: InterpolationJob, index: int, count: int) -> InterpolationJob:
    """One of the frames."""
    return job if count == 1 else replace(job, at=index / (count - 1))


def check_frames(job: InterpolationJob, count: int) -> None:
    """Raise ValueError for fewer frames than 1, or for several with an `at`."""
    if count < 1:
        raise ValueError(f"frames must be at least 1, got {count}; 2 are the ends themselves")
    if count > 1 and job.at:
        raise ValueError(
            f"at is for a single frame, got {job.at:g} and {count} frames; leave one of them out"
        )


def check_seed(seed: int) -> None:
    """Raise ValueError unless it is a whole number from 0 to 2**64 - 1."""
    if type(seed) is not int or not 0 <= seed <= MAX_SEED:
        raise ValueError(f"a seed must be a whole number from 0 to 2**64 - 1, got {seed!r:.40}")


def check_seeds(first: int, count: int) -> None:
    """Raise ValueError unless there is something to make, and a seed for each."""
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if not 0 <= first <= MAX_SEED - (count - 1):
        raise ValueError(f"seeds must lie in 0 to 2^64 - 1, got {first} to {first + count - 1}")


def stage_seed(seed: int, stage: str) -> int:
    """A seed for a second pass, such as "upscale": no number of the first pass's noise recurs."""
    digest = hashlib.blake2b(f"{stage} {seed}".encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little") & (2**63 - 1)


def _check_prompts(job: Any) -> None:
    """Raise ValueError for a prompt in a syntax that is not supported; `TextSettings` checks the
    negative one."""
    for prompt in (job.prompt, getattr(job, "to_prompt", None)):
        if prompt is not None:
            read_prompt(prompt, emphasis=job.text.emphasis)


def _check_fit(job: Any) -> None:
    if job.fit not in (None, *get_args(Fit)):
        raise ValueError(f"unknown fit {job.fit!r:.40}; expected one of crop, resize")


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


def first_step(steps: int, strength: float) -> int:
    """The first of the steps that `strength` leaves to do; `steps` for none.

    Raises:
        ValueError: strength outside [0, 1].
    """
    if not 0 <= strength <= 1:
        raise ValueError(
            f"strength must lie in [0, 1], got {strength}; 0 keeps the image, 1 makes a new one"
        )
    return steps - int(steps * strength + 1e-9)  # 100 * 0.29 is 28.999999999999996
