"""Jobs: what a user requests, one frozen dataclass per kind.

The same object represents the keyword arguments of `model.generate`, the options of a command, the
recipe in a PNG and a line of a file of jobs. Everything that does not depend on a model is checked
when the object is created; `facts.check` checks the rest and fills in what depends on the model.
This module does not import torch, so that a command line can be parsed before it is loaded.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

from fastdiff.configs import LATER
from fastdiff.diffusion.caching import CENTER_POWER, CacheConfig
from fastdiff.diffusion.guidance import GuidanceConfig
from fastdiff.diffusion.respacing import check_spacing, check_steps
from fastdiff.models.prompts import read_prompt

if TYPE_CHECKING:
    from torch import Tensor

    Picture = Tensor | str | os.PathLike[str]
    """A file, or pixels: (C, H, W) in [-1, 1]; for a mask (1, H, W), replaced where >= 0.5."""
else:
    Picture = Any  # annotations can be evaluated without torch

MAX_SEED = 2**64 - 1
Via = Literal["latent", "image"]
Fit = Literal["crop", "resize"]
DEFAULT_SAMPLER = "dpmpp-2m"
CHECKPOINT = "checkpoint"
"""Name of the sampler that stands for the model's own (diffusers' scheduler_config.json)."""


MOST_OF_A_PRIOR = 1000
"""Most steps, and most samples, that a job may ask of a prior."""
_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}


@functools.cache
def _scalars(cls: type) -> dict[str, tuple[type, ...]]:
    """The types that fields of numbers, text or None accept; `check_seed` checks the seeds."""
    found = {}
    for name, hint in get_type_hints(cls).items():
        if name.endswith("seed"):
            continue
        kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        if all(kind in _WORDS or kind is NoneType for kind in kinds):
            found[name] = (*kinds, int) if float in kinds else kinds
    return found


def _check_types(job: Any) -> None:
    """Raise ValueError if a number or text has another type: steps="20", strength=None."""
    cls: type = type(job)
    for name, kinds in _scalars(cls).items():
        value = getattr(job, name)
        if type(value) in kinds:
            continue
        if isinstance(value, Real) and type(value) not in _WORDS:  # NumPy's
            value = int(value) if isinstance(value, Integral) else float(value)
            object.__setattr__(job, name, value)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            named = [kind for kind in kinds if kind is not int or float not in kinds]
            words = " or ".join(_WORDS.get(kind, "None") for kind in named)
            raise ValueError(f"{name} must be {words}, got {value!r:.40}")


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """How to get from noise to an image; None means a default that depends on the model, see
    `facts.resolved`."""

    sampler: str | None = None
    """A sampler that 'fastdiff samplers' lists, or checkpoint for the one in the model's files;
    None: checkpoint if the files name a sampler, else dpmpp-2m."""
    steps: int | None = None
    """Steps from noise to image; None: the number in a spacing such as 10,15,20, else 30 with a
    prompt and 50 without."""
    eta: float | None = None
    """Amount of fresh noise per step, for samplers with this option; None: the sampler's default.
    """
    guidance_scale: float | None = None
    """Up to 1: no guidance, at half the cost; larger: closer to the condition. None: what the model
    was made for, else 7.5 with a prompt, 1.5 with classes, 1 if the model cannot be guided."""
    guidance_rescale: float = 0.0
    """phi of Lin et al. 2023 in [0, 1]: reduces the over-exposure of strong guidance."""
    guidance_interval: tuple[int, int] | None = None
    """Guided steps [first, stop), counted from 0, the noisiest; None: all steps."""
    spacing: str | None = None
    """How the steps are spaced: trailing, leading, linspace, simple, karras, exponential; FastDPM's
    var-linear, var-quadratic, step-linear, step-quadratic; or IDDPM's strings such as 10,15,20 and
    ddim50. None: that of the files with sampler checkpoint, else the sampler's own."""
    clamp: float | None = None
    """Limit of the estimate of x0; None: that of the files with sampler checkpoint, 1 for models on
    pixels, else no limit."""
    tile: int | None = None
    """Side of the tiles in which larger latents are decoded; 0: never use tiles; None: 128 for
    models that read text, else 96."""
    batch: int | None = None
    """Number of images made at once: limits memory, does not change the images; None: chosen by
    their size."""
    classifier_scale: float | None = field(default=None, metadata=LATER)
    """How strongly the model's classifier pulls towards a class (Dhariwal and Nichol 2021): a
    factor of the gradient of its log-probability, 0 for none. None: 1 if there is a classifier."""
    classifier_class: int | str | None = field(default=None, metadata=LATER)
    """Class that the classifier pulls towards, by number or name; None: the class of the image."""
    clip_scale: float | None = field(default=None, metadata=LATER)
    """How strongly the model's noised CLIP pulls towards the prompt (Nichol et al. 2022): a factor
    of the gradient of the embeddings' dot product, 0 for none. None: 1 if there is a CLIP."""
    cache: int | None = field(default=None, metadata=LATER)
    """Evaluate the whole U-Net once per this many evaluations, and reuse its deep features in the
    others (DeepCache, Ma et al. 2023): faster, but another image. None: every evaluation in full.
    """
    cache_branch: int = field(default=0, metadata=LATER)
    """With cache, the skip connection inside of which features are reused, from 0, the outermost:
    the larger, the slower, and the closer to the image without cache."""
    cache_center: int | None = field(default=None, metadata=LATER)
    """With cache, the evaluation, from 0, around which full ones are densest; None: equal
    distances."""
    cache_power: float = field(default=CENTER_POWER, metadata=LATER)
    """With cache_center, how uneven the distances are; 1: equal."""
    upsampler_steps: int | None = field(default=None, metadata=LATER)
    """unCLIP: steps of the networks that enlarge the image; None: 7, as published."""

    def __post_init__(self) -> None:
        _check_types(self)
        if self.sampler not in (None, CHECKPOINT):
            from fastdiff.diffusion.samplers import SAMPLERS  # imports torch

            if self.sampler not in SAMPLERS:
                known = ", ".join((*SAMPLERS, CHECKPOINT))
                raise ValueError(f"unknown sampler {self.sampler!r}; expected one of {known}")
        if self.spacing is not None:
            check_spacing(self.spacing)
            if self.steps is not None:
                check_steps(self.spacing, self.steps)
        for name, least in (("steps", 1), ("batch", 1), ("upsampler_steps", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.tile is not None and self.tile != 0 and self.tile < 8:
            raise ValueError(f"tile must be at least 8, got {self.tile}; 0 decodes images whole")
        if self.eta is not None and not (math.isfinite(self.eta) and self.eta >= 0):
            raise ValueError(f"eta must be a number >= 0, got {self.eta}; 0 adds no noise")
        for name in ("classifier_scale", "clip_scale"):
            scale = getattr(self, name)
            if scale is not None and not (math.isfinite(scale) and scale >= 0):
                raise ValueError(f"{name} must be a number >= 0, got {scale}; 0 turns it off")
        if self.clamp is not None and not self.clamp > 0:
            raise ValueError(f"clamp must be positive, got {self.clamp}; use 1 for images")
        if (self.guidance_scale, self.guidance_rescale, self.guidance_interval) != (None, 0, None):
            GuidanceConfig(
                scale=1.0 if self.guidance_scale is None else self.guidance_scale,
                rescale=self.guidance_rescale,
                interval=self.guidance_interval,
            )
        _ = self.caching

    @property
    def caching(self) -> CacheConfig | None:
        """The reuse of deep features; None without it."""
        if self.cache is None and (self.cache_branch, self.cache_center) != (0, None):
            raise ValueError("cache_branch and cache_center need cache; give cache, such as 3")
        if self.cache_center is None and self.cache_power != CENTER_POWER:
            raise ValueError("cache_power needs cache_center; give both")
        if self.cache is None:
            return None
        return CacheConfig(
            interval=self.cache,
            branch=self.cache_branch,
            center=self.cache_center,
            power=self.cache_power,
        )

    @property
    def weight(self) -> float:
        """The guidance scale that is used: at least 1, as in diffusers."""
        assert self.guidance_scale is not None, "settings of a checked job"
        return max(self.guidance_scale, 1.0)

    @property
    def total(self) -> int:
        """The number of steps; only for the settings of a checked job."""
        assert self.steps is not None, "settings of a checked job"
        return self.steps


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """How prompts become conditions."""

    negative: str | None = None
    """Prompt to guide away from; None: what the model was trained with for "no prompt", which is
    zeros for XL's base and else the empty prompt."""
    clip_skip: int = 0
    """Layers of the text encoder to skip at the end, also for the negative prompt; 1 is "clip skip
    2" in web UIs."""
    emphasis: bool = True
    """Read (word:1.2), (word) and [word] as weights and BREAK as the end of a chunk, and reject
    other syntax of web UIs; False: treat all of it as text."""
    original_size: tuple[int, int] | None = None
    """XL: height and width before cropping to condition on; None: those of the image."""
    crop: tuple[int, int] = (0, 0)
    """XL: top and left of the crop to condition on."""
    target_size: tuple[int, int] | None = None
    """XL's base: target height and width to condition on; None: those of the image."""
    aesthetic_score: float = 6.0
    """XL's refiner: aesthetic score to condition on, 0 to 10."""
    negative_aesthetic_score: float = 2.5
    """XL's refiner: aesthetic score for the negative prompt, 0 to 10."""
    prior_steps: int | None = field(default=None, metadata=LATER)
    """unCLIP: steps of the prior, which makes an image embedding from the prompt; None: 25."""
    prior_guidance_scale: float | None = field(default=None, metadata=LATER)
    """unCLIP: guidance scale of the prior; None: what it was made for, up to 1: no guidance."""
    prior_samples: int | None = field(default=None, metadata=LATER)
    """unCLIP: image embeddings that the prior makes, of which the one nearest to the prompt is kept
    (Ramesh et al. 2022, section 2.2); None: 2."""
    image_noise: int | None = field(default=None, metadata=LATER)
    """Stable Diffusion unCLIP: noise level of the picture's embedding, from 0, the closest to the
    picture, to 999; None: 0. x4-upscaler: noise level of the picture, 0 to 350; None: 20."""

    def __post_init__(self) -> None:
        _check_types(self)
        for name, least in (("original_size", 1), ("crop", 0), ("target_size", 1)):
            sides = getattr(self, name)
            if sides is not None and not (
                isinstance(sides, tuple | list)
                and len(sides) == 2
                and all(type(side) is int and side >= least for side in sides)
            ):
                raise ValueError(f"{name} must be two whole numbers >= {least}, got {sides!r:.40}")
        for name in ("aesthetic_score", "negative_aesthetic_score"):
            if not 0 <= getattr(self, name) <= 10:
                raise ValueError(f"{name} must be in [0, 10], got {getattr(self, name)}")
        for name in ("prior_steps", "prior_samples"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MOST_OF_A_PRIOR:
                raise ValueError(f"{name} must be 1 to {MOST_OF_A_PRIOR:,}, got {value}")
        if self.image_noise is not None and self.image_noise < 0:
            raise ValueError(f"image_noise must be at least 0, got {self.image_noise}")
        scale = self.prior_guidance_scale
        if scale is not None and not math.isfinite(scale):
            raise ValueError(f"prior_guidance_scale must be finite, got {scale}; 1 turns it off")
        if self.clip_skip < 0:
            raise ValueError(f"clip_skip must be at least 0, got {self.clip_skip}; 0 skips none")
        if self.negative is not None:
            read_prompt(self.negative, emphasis=self.emphasis)


@dataclass(frozen=True, kw_only=True)
class ControlSettings:
    """How ControlNets control the image: a number for all of them, or one for each."""

    control_scale: float | tuple[float, ...] = (1.0,)
    """Factor of what a ControlNet adds."""
    control_start: float | tuple[float, ...] = (0.0,)
    """Fraction of the sampler's evaluations before which it adds nothing."""
    control_end: float | tuple[float, ...] = (1.0,)
    """Fraction of the sampler's evaluations after which it adds nothing."""

    def __post_init__(self) -> None:
        for entry in fields(self):
            value: Any = getattr(self, entry.name)
            numbers = tuple(value) if isinstance(value, tuple | list) else (value,)
            for number in numbers:
                if isinstance(number, bool) or not isinstance(number, Real):
                    raise ValueError(f"{entry.name} must be a number, got {number!r:.40}")
                if not math.isfinite(number):
                    raise ValueError(f"{entry.name} must be finite, got {number}")
                if entry.name != "control_scale" and not 0 <= float(number) <= 1:
                    raise ValueError(f"{entry.name} must be in [0, 1], got {number}")
            if not numbers:
                raise ValueError(f"{entry.name} must be at least one number, got none")
            object.__setattr__(self, entry.name, tuple(map(float, numbers)))
        self.each(max(len(getattr(self, entry.name)) for entry in fields(self)))

    def each(self, count: int) -> list[tuple[float, float, float]]:
        """Scale, start and end of each of `count` ControlNets.

        Raises:
            ValueError: there are other numbers of them, or one starts at its end or later.
        """
        columns = []
        for entry in fields(self):
            numbers = getattr(self, entry.name)
            if len(numbers) not in (1, count):
                raise ValueError(
                    f"{entry.name} must be one number or {count}, one per ControlNet, got "
                    f"{len(numbers)}"
                )
            columns.append(numbers * count if len(numbers) == 1 else numbers)
        found = [*zip(*columns, strict=True)]
        for _, start, end in found:
            if start >= end:
                raise ValueError(
                    f"control_start must be below control_end, got {start:g} and {end:g}; leave "
                    "the picture out (None) for a ControlNet that adds nothing"
                )
        return found


PLAIN, PLAIN_TEXT, PLAIN_CONTROL = SampleSettings(), TextSettings(), ControlSettings()


@dataclass(frozen=True, kw_only=True)
class ClassJob:
    """An image of a class or without class; with an upsampler, from a small image; or a sketch."""

    label: int | str | None = None
    """The class by number or name; None: no class."""
    image: Picture | None = None
    """For upsamplers, the low-resolution image to enlarge; for models of sketches, the sketch."""
    seed: int = 0
    """Seed of all randomness in the image."""
    variation_seed: int | None = None
    """Start from noise between that of the seed and that of this seed (slerp)."""
    variation: float = 0.0
    """Position of the noise between the two seeds: 0 is the seed, 1 the variation seed."""
    height: int | None = None
    """Height in pixels; None: the size that the model was trained at."""
    width: int | None = None
    """Width in pixels; None: the size that the model was trained at."""
    settings: SampleSettings = PLAIN
    """How to sample."""

    def __post_init__(self) -> None:
        _check_types(self)
        _check_start(self)


@dataclass(frozen=True, kw_only=True)
class TextJob:
    """An image from a prompt."""

    prompt: str
    """What the image should show; (word:1.3), (word) and [word] are weights, BREAK begins a new
    chunk."""
    image: Picture | None = None
    """For upsamplers, the low-resolution image to enlarge; for models with an image encoder
    (unCLIP), the picture to vary; for models of sketches, the sketch."""
    seed: int = 0
    """Seed of all randomness in the image."""
    variation_seed: int | None = None
    """Start from noise between that of the seed and that of this seed (slerp)."""
    variation: float = 0.0
    """Position of the noise between the two seeds: 0 is the seed, 1 the variation seed."""
    height: int | None = None
    """Height in pixels; None: the size that the model was trained at."""
    width: int | None = None
    """Width in pixels; None: the size that the model was trained at."""
    upscale: float | None = None
    """Enlarge both sides by this factor in a second pass ("hires fix")."""
    upscale_strength: float = 0.6
    """Fraction of the steps that the second pass takes."""
    upscale_via: Via = "latent"
    """Enlarge the latents, or the image between decoding and encoding."""
    switch: float = 0.8
    """With a refiner: fraction of the noise levels for the base; the refiner takes the rest."""
    control: Picture | tuple[Picture | None, ...] = field(default=(), metadata=LATER)
    """The picture that the model's ControlNet reads, of the size of the image; for several, one per
    ControlNet, None for those that add nothing."""
    text: TextSettings = PLAIN_TEXT
    """How the prompt becomes a condition."""
    settings: SampleSettings = PLAIN
    """How to sample."""
    controls: ControlSettings = field(default=PLAIN_CONTROL, metadata=LATER)
    """How strongly, and in which steps, the control pictures count."""

    def __post_init__(self) -> None:
        _check_types(self)
        _check_control(self)
        _check_prompts(self)
        _check_start(self)
        if self.upscale is not None:
            if self.control:
                raise ValueError(
                    "upscale cannot be combined with control, whose picture has the size of the "
                    "first pass; enlarge the result (scale=), or leave one of them out"
                )
            _check_scale(self.upscale, self.upscale_via)
            first_step(1, self.upscale_strength)


@dataclass(frozen=True, kw_only=True)
class ImageToImageJob:
    """A variation of an image, guided by a prompt or a class."""

    image: Picture
    """The picture to start from."""
    prompt: str | None = None
    """What the image should become, for models that read text."""
    label: int | str | None = None
    """Class that the image should become, by number or name, for class-conditional models; None: no
    class."""
    strength: float = 0.75
    """Fraction of the steps that are taken: 0 keeps the image, 1 makes a new one."""
    depth: Picture | None = field(default=None, metadata=LATER)
    """Only for depth models (Stable Diffusion 2): a depth map of the picture, brighter where it is
    nearer, of any size and range."""
    seed: int = 0
    """Seed of all randomness in the image."""
    fit: Fit | None = None
    """Pictures whose sides the model cannot take: crop them to the next smaller ones around the
    centre, or resize them to the nearest ones; None: refuse them."""
    height: int | None = None
    """Crop and resize the picture to this height first."""
    width: int | None = None
    """Crop and resize the picture to this width first."""
    control: Picture | tuple[Picture | None, ...] = field(default=(), metadata=LATER)
    """The picture that the model's ControlNet reads, of the size of the image; for several, one per
    ControlNet, None for those that add nothing."""
    text: TextSettings = PLAIN_TEXT
    """How the prompt becomes a condition."""
    settings: SampleSettings = PLAIN
    """How to sample."""
    controls: ControlSettings = field(default=PLAIN_CONTROL, metadata=LATER)
    """How strongly, and in which steps, the control pictures count."""

    def __post_init__(self) -> None:
        _check_types(self)
        _check_control(self)
        _check_prompts(self)
        _check_pictures(self)
        check_seed(self.seed)
        first_step(1, self.strength)


@dataclass(frozen=True, kw_only=True)
class InpaintJob:
    """An image that is replaced where a mask is 1."""

    image: Picture
    """The picture to change."""
    mask: Picture
    """A picture of the same size, white where the image is to be replaced."""
    prompt: str | None = None
    """What the masked part should become, for models that read text."""
    label: int | str | None = None
    """Class that the masked part should become, by number or name, for class-conditional models;
    None: no class."""
    strength: float = 1.0
    """Fraction of the steps that are taken: below 1 the result depends on the masked pixels too."""
    paste: bool = True
    """Restore the original pixels outside the mask."""
    seed: int = 0
    """Seed of all randomness in the image."""
    fit: Fit | None = None
    """Pictures and masks whose sides the model cannot take: crop them to the next smaller ones
    around the centre, or resize them to the nearest ones; None: refuse them."""
    height: int | None = None
    """Crop and resize the picture and the mask to this height first."""
    width: int | None = None
    """Crop and resize the picture and the mask to this width first."""
    control: Picture | tuple[Picture | None, ...] = field(default=(), metadata=LATER)
    """The picture that the model's ControlNet reads, of the size of the image; for several, one per
    ControlNet, None for those that add nothing."""
    text: TextSettings = PLAIN_TEXT
    """How the prompt becomes a condition."""
    settings: SampleSettings = PLAIN
    """How to sample."""
    controls: ControlSettings = field(default=PLAIN_CONTROL, metadata=LATER)
    """How strongly, and in which steps, the control pictures count."""

    def __post_init__(self) -> None:
        _check_types(self)
        _check_control(self)
        _check_prompts(self)
        _check_pictures(self)
        check_seed(self.seed)
        first_step(1, self.strength)


@dataclass(frozen=True, kw_only=True)
class UpscaleJob:
    """A larger image: an image is enlarged, and image-to-image adds detail."""

    image: Picture
    """The picture to enlarge."""
    prompt: str | None = None
    """What the picture shows, for models that read text."""
    label: int | str | None = None
    """Class of the picture by number or name, for class-conditional models; None: no class."""
    scale: float = 2.0
    """Factor of both sides, which are rounded to a size that the networks support."""
    via: Via = "latent"
    """Enlarge the latents (bicubic, which is soft and needs a strength of 0.5 or more), or the
    image between decoding and encoding (which preserves more at low strength)."""
    strength: float = 0.6
    """Fraction of the steps that are taken."""
    fit: Fit | None = None
    """Pictures whose sides the model cannot take: crop them to the next smaller ones around the
    centre, or resize them to the nearest ones; None: refuse them."""
    seed: int = 0
    """Seed of all randomness in the image."""
    text: TextSettings = PLAIN_TEXT
    """How the prompt becomes a condition."""
    settings: SampleSettings = PLAIN
    """How to sample."""

    def __post_init__(self) -> None:
        _check_types(self)
        _check_prompts(self)
        _check_pictures(self)
        check_seed(self.seed)
        first_step(1, self.strength)
        _check_scale(self.scale, self.via)


@dataclass(frozen=True, kw_only=True)
class InterpolationJob:
    """A frame between two images that differ in seed, prompt or class.

    The noise moves along the great circle between those of the two seeds, the condition along a
    straight line. The noise that a sampler adds in its steps is that of the first seed in every
    frame.
    """

    prompt: str | None = None
    """Prompt of the first image, for models that read text."""
    to_prompt: str | None = None
    """Prompt of the last image; None: that of the first."""
    label: int | str | None = None
    """Class of the first image by number or name, for class-conditional models; None: no class."""
    to_label: int | str | None = None
    """Class of the last image; None: that of the first."""
    image: Picture | None = field(default=None, metadata=LATER)
    """Models with an image encoder (unCLIP): the picture that the first image varies."""
    to_image: Picture | None = field(default=None, metadata=LATER)
    """The picture that the last image varies; None: that of the first, changed by what to_prompt
    adds to the prompt (a text difference, Ramesh et al. 2022, section 3.3)."""
    seed: int = 0
    """Seed of the first image."""
    to_seed: int | None = None
    """Seed of the last image; None: that of the first."""
    at: float = 0.0
    """Position of the frame, from 0 (the first image) to 1 (the last)."""
    height: int | None = None
    """Height in pixels; None: the size that the model was trained at."""
    width: int | None = None
    """Width in pixels; None: the size that the model was trained at."""
    text: TextSettings = PLAIN_TEXT
    """How the prompts become conditions."""
    settings: SampleSettings = PLAIN
    """How to sample."""

    def __post_init__(self) -> None:
        _check_types(self)
        _check_prompts(self)
        check_seed(self.seed)
        if self.to_seed is not None:
            check_seed(self.to_seed)
        if not 0 <= self.at <= 1:
            raise ValueError(f"at must be in [0, 1], got {self.at}; 0 is the first image")
        _check_picture_types(self)
        if self.to_image is not None and self.image is None:
            raise ValueError("to_image needs image, the picture of the first image; give both")
        ends = self.to_seed, self.to_prompt, self.to_label, self.to_image
        if all(end is None for end in ends):
            raise ValueError(
                "an interpolation needs a second image; give one or more of to_seed, to_prompt, "
                "to_label and to_image"
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
PICTURES = ("image", "mask", "to_image", "control", "depth")
GROUPS = {"text": TextSettings, "settings": SampleSettings, "controls": ControlSettings}


PRIOR_OPTIONS = ("prior_steps", "prior_guidance_scale", "prior_samples")


def stage_options(job: Job) -> list[str]:
    """Names of the options that a job gives and that only models with a prior, an image encoder or
    upsamplers have (unCLIP)."""
    text = getattr(job, "text", PLAIN_TEXT)
    names = (*PRIOR_OPTIONS, "image_noise")
    given = [name for name in names if getattr(text, name) is not None]
    if isinstance(job, InterpolationJob):
        given += [name for name in ("image", "to_image") if getattr(job, name) is not None]
    return given if job.settings.upsampler_steps is None else [*given, "upsampler_steps"]


def frames_of(job: InterpolationJob, count: int) -> list[InterpolationJob]:
    """The frames of an interpolation at equal distances, including both ends; 1: the one at `at`.

    Raises:
        ValueError: as for `check_frames`.
    """
    check_frames(job, count)
    return [frame_of(job, index, count) for index in range(count)]


def frame_of(job: InterpolationJob, index: int, count: int) -> InterpolationJob:
    """One of the frames of an interpolation."""
    return job if count == 1 else replace(job, at=index / (count - 1))


def check_frames(job: InterpolationJob, count: int) -> None:
    """Raise ValueError if there are fewer frames than 1, or several although `at` is given."""
    if count < 1:
        raise ValueError(f"frames must be at least 1, got {count}; 2 frames are the two images")
    if count > 1 and job.at:
        raise ValueError(
            f"at is for a single frame, got {job.at:g} and {count} frames; leave one of them out"
        )


def check_seed(seed: int) -> None:
    """Raise ValueError unless the seed is a whole number from 0 to 2**64 - 1."""
    if type(seed) is not int or not 0 <= seed <= MAX_SEED:
        raise ValueError(f"a seed must be a whole number from 0 to 2**64 - 1, got {seed!r:.40}")


def check_seeds(first: int, count: int) -> None:
    """Raise ValueError unless there is at least one image, and a valid seed for each."""
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if not 0 <= first <= MAX_SEED - (count - 1):
        raise ValueError(f"seeds must be 0 to 2^64 - 1, got {first} to {first + count - 1}")


def stage_seed(seed: int, stage: str) -> int:
    """A seed for a second pass such as "upscale", whose noise is independent of the first pass."""
    digest = hashlib.blake2b(f"{stage} {seed}".encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little") & (2**63 - 1)


def _check_prompts(job: Any) -> None:
    """Raise ValueError if a prompt uses unsupported syntax (`TextSettings`: the negative one)."""
    for prompt in (job.prompt, getattr(job, "to_prompt", None)):
        if prompt is not None:
            read_prompt(prompt, emphasis=job.text.emphasis)


def _check_pictures(job: Any) -> None:
    """The pictures of a job are files or tensors, and its fit is known."""
    _check_picture_types(job)
    if job.fit not in (None, *get_args(Fit)):
        raise ValueError(f"unknown fit {job.fit!r:.40}; expected one of crop, resize")


def _check_picture_types(job: Any) -> None:
    defaults = {entry.name: entry.default for entry in fields(job)}
    for name in PICTURES:
        if name not in defaults or name == "control":
            continue
        value = getattr(job, name)
        if value is not None or defaults[name] is not None:
            _check_picture(name, value)


def _check_picture(name: str, value: Any) -> None:
    # a tensor is recognised by a method, so that making a job does not import torch
    if not (isinstance(value, str | os.PathLike) or hasattr(value, "is_floating_point")):
        raise ValueError(
            f"{name} must be a file or a tensor, got {type(value).__name__}; "
            "fastdiff.images.read_image turns Pillow images into tensors"
        )


def _check_control(job: Any) -> None:
    """The control pictures of a job as a tuple, one per ControlNet."""
    given = () if job.control is None else job.control
    pictures = tuple(given) if isinstance(given, tuple | list) else (given,)
    object.__setattr__(job, "control", pictures)
    for picture in pictures:
        if picture is not None:
            _check_picture("control", picture)
    if all(picture is None for picture in pictures):
        object.__setattr__(job, "control", ())
        if job.controls != PLAIN_CONTROL:
            raise ValueError(
                "control_scale, control_start and control_end need a picture; give control"
            )
    else:
        job.controls.each(len(pictures))


def _check_start(job: Any) -> None:
    check_seed(job.seed)
    if job.variation_seed is not None:
        check_seed(job.variation_seed)
    if not 0 <= job.variation <= 1:
        raise ValueError(
            f"variation must be in [0, 1], got {job.variation}; 0 is the image of the seed itself"
        )
    if job.variation and job.variation_seed is None:
        raise ValueError(f"variation {job.variation:g} needs a second seed; give variation_seed")


def _check_scale(scale: float, via: str) -> None:
    if not 1 <= scale <= 16:
        raise ValueError(f"scale must be in [1, 16], got {scale}; 2 doubles both sides")
    if via not in get_args(Via):
        raise ValueError(f"unknown way to enlarge {via!r}; expected one of latent, image")


def first_step(steps: int, strength: float) -> int:
    """The first step that is taken at this `strength`; `steps` if none is taken.

    Raises:
        ValueError: strength is outside [0, 1].
    """
    if not 0 <= strength <= 1:
        raise ValueError(
            f"strength must be in [0, 1], got {strength}; 0 keeps the image, 1 makes a new one"
        )
    return steps - int(steps * strength + 1e-9)  # 100 * 0.29 is 28.999999999999996
