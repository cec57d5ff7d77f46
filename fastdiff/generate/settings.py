"""How a job is sampled, and the defaults that depend on the model."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fastdiff.diffusion.guidance import GuidanceConfig
from fastdiff.diffusion.samplers import SAMPLERS, SPACINGS

if TYPE_CHECKING:
    from fastdiff.generate.facts import Facts

DEFAULT_SAMPLER = "dpmpp-2m"
CHECKPOINT = "checkpoint"
"""As a sampler: what the model's files say (diffusers' scheduler_config.json)."""
STEPS, TEXT_STEPS = 50, 30
GUIDANCE, TEXT_GUIDANCE = 1.5, 7.5
TILE, TEXT_TILE = 96, 128
BATCH_PIXELS = 64 * 32 * 32
"""Pixels of x at once by default, in at most 64 images: 64 of 32 x 32, 16 of 64 x 64."""


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """How to get from noise to an image. What is None is chosen for the model, see `resolved`."""

    sampler: str | None = None
    """One of those that 'fastdiff samplers' lists, or checkpoint: as the model's files say; None:
    checkpoint where the files name a sampler, else dpmpp-2m."""
    steps: int | None = None
    """Steps from noise to image; None: 30 with a prompt, else 50."""
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
    """Where the steps lie: trailing, leading, linspace, simple, karras or exponential; None: with
    sampler checkpoint as the files say, else trailing."""
    clamp: float | None = None
    """Bound on the estimate of x0; None: with sampler checkpoint as the files say, 1 for the
    published pixel models, else none."""
    tile: int | None = None
    """Latents with a longer side are decoded in tiles of this side, 0: never; None: 128 for models
    that read text, else 96."""
    batch: int | None = None
    """Images at once: bounds memory, has no influence on the images; None: by their size."""

    def __post_init__(self) -> None:
        if self.sampler not in (None, *SAMPLERS, CHECKPOINT):
            known = ", ".join((*SAMPLERS, CHECKPOINT))
            raise ValueError(f"unknown sampler {self.sampler!r}; expected one of {known}")
        if self.spacing is not None and self.spacing not in SPACINGS:
            raise ValueError(
                f"unknown spacing {self.spacing!r}; expected one of {', '.join(SPACINGS)}"
            )
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
        """Steps, of settings that are `resolved`."""
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
    """Read (word:1.2), (word) and [word] as weights; False: as text."""
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


def resolved(settings: SampleSettings, facts: Facts) -> SampleSettings:
    """The settings with nothing left open but what the sampler itself decides."""
    text, named = facts.reads_text, facts.names_sampler
    guidance = TEXT_GUIDANCE if text else GUIDANCE if facts.null_class else 1.0
    # The papers' samplers clip the estimate of x0 to the range of pixels.
    clamp = 1.0 if facts.pixels and facts.published and not named else None
    defaults: dict[str, Any] = {
        "sampler": CHECKPOINT if named else DEFAULT_SAMPLER,
        "steps": TEXT_STEPS if text else STEPS,
        "guidance_scale": guidance,
        "clamp": clamp,
        "tile": TEXT_TILE if text else TILE,
    }
    return replace(
        settings,
        **{name: value for name, value in defaults.items() if getattr(settings, name) is None},
    )


def default_batch(height: int, width: int, *, text: bool) -> int:
    """Samples of x at once, from the size of one; text: with a context to attend to."""
    return max(1, min(4 if text else 64, BATCH_PIXELS // (height * width)))


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
