"""The jobs' dataclasses as options of commands, and the options that all such commands share.

A command's options are a job's own fields (`fastdiff.generate.job`) with what only a command line
needs to know beside them: which ones are words without a flag, and which ones it fills in itself.
Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol

import tyro

from fastdiff.checkpoint.options import LoadOptions
from fastdiff.cli.machine import Compute
from fastdiff.cli.parsing import OptionalFloat, OptionalInt, OptionalName, OptionalPath
from fastdiff.generate.job import (
    PLAIN,
    PLAIN_TEXT,
    ClassJob,
    ImageToImageJob,
    InpaintJob,
    InterpolationJob,
    SampleSettings,
    TextJob,
    TextSettings,
)

FLAT, NO_NONE = tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone
"""Of a field: its options without the field's name; None is said by leaving an option out."""
Prompt = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PROMPT")]
OptionalPrompt = Annotated[
    tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[PROMPT]", help_behavior_hint="")
]


@dataclass(frozen=True, kw_only=True)
class ClassOptions(ClassJob):
    """What to make."""

    label: tyro.conf.Suppress[int | str | None] = None
    image: OptionalPath = None
    """Upsamplers: the low-resolution picture to enlarge."""
    seed: int = 0
    """Seed of the first image of each class; the next ones count up from it."""
    variation_seed: OptionalInt = None
    """Start from noise between the seed's and this one's, on the sphere (slerp)."""
    height: OptionalInt = None
    """Height in pixels; as the model was trained if left out."""
    width: OptionalInt = None
    """Width in pixels; as the model was trained if left out."""
    settings: SampleSettings = PLAIN


@dataclass(frozen=True, kw_only=True)
class TextOptions(TextJob):
    """What to make."""

    prompt: Prompt
    """What to draw."""
    seed: int = 0
    """Seed of the first image; the next ones count up from it."""
    variation_seed: OptionalInt = None
    """Start from noise between the seed's and this one's, on the sphere (slerp)."""
    height: OptionalInt = None
    """Height in pixels; as the model was trained if left out."""
    width: OptionalInt = None
    """Width in pixels; as the model was trained if left out."""
    upscale: OptionalFloat = None
    """Enlarge both sides by this factor in a second pass ("hires fix")."""
    text: TextSettings = PLAIN_TEXT
    settings: SampleSettings = PLAIN


@dataclass(frozen=True, kw_only=True)
class ImageToImageOptions(ImageToImageJob):
    """What to make."""

    prompt: OptionalPrompt = None
    """What the image is to become; models of classes take --label instead."""
    image: Path
    """The picture to begin with."""
    label: OptionalName = None
    """What it is to become, for models of classes: one by number or name."""
    seed: int = 0
    """Seed of the first image; the next ones count up from it."""
    height: OptionalInt = None
    """Crop and resize the picture to this height first."""
    width: OptionalInt = None
    """Crop and resize the picture to this width first."""
    text: TextSettings = PLAIN_TEXT
    settings: SampleSettings = PLAIN


@dataclass(frozen=True, kw_only=True)
class InpaintOptions(InpaintJob):
    """What to make."""

    prompt: OptionalPrompt = None
    """What the masked part is to become; models of classes take --label instead."""
    image: Path
    """The picture to change."""
    mask: Path
    """A picture of the same size, white where the image is to be new."""
    label: OptionalName = None
    """What it is to become, for models of classes: one by number or name."""
    seed: int = 0
    """Seed of the first image; the next ones count up from it."""
    height: OptionalInt = None
    """Crop and resize the picture and the mask to this height first."""
    width: OptionalInt = None
    """Crop and resize the picture and the mask to this width first."""
    text: TextSettings = PLAIN_TEXT
    settings: SampleSettings = PLAIN


@dataclass(frozen=True, kw_only=True)
class InterpolationOptions(InterpolationJob):
    """What to make."""

    prompt: OptionalPrompt = None
    """The first image's prompt; models of classes take --label instead."""
    to_prompt: OptionalName = None
    """The last image's prompt; the first's if left out."""
    label: OptionalName = None
    """The first image's class by number or name, for models of classes."""
    to_label: OptionalName = None
    """The last image's class; the first's if left out."""
    to_seed: OptionalInt = None
    """The last image's seed; the first's if left out."""
    at: float = 0.0
    """With --frames 1: where on the way, from 0, the first image, to 1, the last."""
    height: OptionalInt = None
    """Height in pixels; as the model was trained if left out."""
    width: OptionalInt = None
    """Width in pixels; as the model was trained if left out."""
    text: TextSettings = PLAIN_TEXT
    settings: SampleSettings = PLAIN


@dataclass(frozen=True, kw_only=True)
class Output:
    """What a command writes, and the picture that it starts from."""

    out: Path = Path("out")
    """Folder for the images; made if it is missing. No picture in it is written over."""
    preview: bool = False
    """Write out/preview.png after each step: a cheap look at what is being made."""
    like: OptionalPath = None
    """Take the options from the recipe in this PNG. Without others the image is made again, bit for
    bit, compared, and written as NAME-again.png. Of a web UI's picture prompt and settings are
    taken."""


class Command(Protocol):
    """What the options of each command that makes images have."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def model(self) -> str: ...
    @property
    def job(self) -> Any: ...
    @property
    def load(self) -> LoadOptions: ...
    @property
    def output(self) -> Output: ...
    @property
    def compute(self) -> Compute: ...
