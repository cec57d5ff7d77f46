"""The dataclasses of jobs as options of commands, and the options that these commands share.

The options of a command are the fields of a job (`fastdiff.generate.job`) with additions that only
a command line needs: which fields are words without a flag, and which ones the command fills in.
This module does not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol

import tyro

from fastdiff.checkpoint.options import LoadOptions
from fastdiff.cli.machine import SamplingCompute
from fastdiff.cli.parsing import OptionalFloat, OptionalInt, OptionalName, OptionalPath
from fastdiff.generate.job import (
    PLAIN,
    PLAIN_CONTROL,
    PLAIN_TEXT,
    ClassJob,
    ControlSettings,
    ImageToImageJob,
    InpaintJob,
    InterpolationJob,
    SampleSettings,
    TextJob,
    TextSettings,
)

FLAT, NO_NONE = tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone
"""Markers of a field: no prefix for its options; None is expressed by leaving an option out."""
Prompts = Annotated[
    tyro.conf.Positional[tuple[str, ...]],
    tyro.conf.arg(metavar="PROMPT [PROMPT ...]", help_behavior_hint=""),
]
OptionalPrompt = Annotated[
    tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[PROMPT]", help_behavior_hint="")
]

ControlPictures = Annotated[
    tuple[Path, ...], tyro.conf.arg(metavar="PATH [PATH ...]", help_behavior_hint="")
]


@dataclass(frozen=True, kw_only=True)
class ClassOptions(ClassJob):
    """What to make."""

    label: tyro.conf.Suppress[int | str | None] = None
    image: OptionalPath = None
    """For upsamplers, the low-resolution picture to enlarge; for models of sketches, the sketch."""
    seed: int = 0
    """Seed of the first image of each class; the following seeds count up from it."""
    variation_seed: OptionalInt = None
    """Start from noise between that of --seed and that of this seed (slerp)."""
    height: OptionalInt = None
    """Height in pixels; by default the size that the model was trained at."""
    width: OptionalInt = None
    """Width in pixels; by default the size that the model was trained at."""
    settings: SampleSettings = PLAIN


@dataclass(frozen=True, kw_only=True)
class TextOptions(TextJob):
    """What to make."""

    prompt: tyro.conf.Suppress[str] = ""
    image: OptionalPath = None
    """For upsamplers, the low-resolution picture to enlarge; for models with an image encoder
    (unCLIP), the picture to vary; for models of sketches, the
    sketch."""
    seed: int = 0
    """Seed of the first image of each prompt; the following seeds count up from it."""
    variation_seed: OptionalInt = None
    """Start from noise between that of --seed and that of this seed (slerp)."""
    height: OptionalInt = None
    """Height in pixels; by default the size that the model was trained at."""
    width: OptionalInt = None
    """Width in pixels; by default the size that the model was trained at."""
    upscale: OptionalFloat = None
    """Enlarge both sides by this factor in a second pass ("hires fix")."""
    control: ControlPictures = ()
    """With --controlnet: the picture that it reads, of the size of the image; one for each."""
    text: TextSettings = PLAIN_TEXT
    settings: SampleSettings = PLAIN
    controls: ControlSettings = PLAIN_CONTROL


@dataclass(frozen=True, kw_only=True)
class ImageToImageOptions(ImageToImageJob):
    """What to make."""

    prompt: OptionalPrompt = None
    """What the image should become; class-conditional models take --label instead."""
    image: Path
    """The picture to start from."""
    label: OptionalName = None
    """Class that the image should become, by number or name, for class-conditional models."""
    depth: OptionalPath = None
    """Only for depth models (Stable Diffusion 2): a depth map of the picture, brighter where it is
    nearer."""
    seed: int = 0
    """Seed of the first image; the following seeds count up from it."""
    height: OptionalInt = None
    """Crop and resize the picture to this height first."""
    width: OptionalInt = None
    """Crop and resize the picture to this width first."""
    control: ControlPictures = ()
    """With --controlnet: the picture that it reads, of the size of the image; one for each."""
    text: TextSettings = PLAIN_TEXT
    settings: SampleSettings = PLAIN
    controls: ControlSettings = PLAIN_CONTROL


@dataclass(frozen=True, kw_only=True)
class InpaintOptions(InpaintJob):
    """What to make."""

    prompt: OptionalPrompt = None
    """What the masked part should become; class-conditional models take --label instead."""
    image: Path
    """The picture to change."""
    mask: Path
    """A picture of the same size, white where the image is to be replaced."""
    label: OptionalName = None
    """Class that the masked part should become, by number or name, for class-conditional models."""
    seed: int = 0
    """Seed of the first image; the following seeds count up from it."""
    height: OptionalInt = None
    """Crop and resize the picture and the mask to this height first."""
    width: OptionalInt = None
    """Crop and resize the picture and the mask to this width first."""
    control: ControlPictures = ()
    """With --controlnet: the picture that it reads, of the size of the image; one for each."""
    text: TextSettings = PLAIN_TEXT
    settings: SampleSettings = PLAIN
    controls: ControlSettings = PLAIN_CONTROL


@dataclass(frozen=True, kw_only=True)
class InterpolationOptions(InterpolationJob):
    """What to make."""

    prompt: OptionalPrompt = None
    """Prompt of the first image; class-conditional models take --label instead."""
    to_prompt: OptionalName = None
    """Prompt of the last image; by default that of the first."""
    label: OptionalName = None
    """Class of the first image, by number or name, for class-conditional models."""
    to_label: OptionalName = None
    """Class of the last image; by default that of the first."""
    image: OptionalPath = None
    """Models with an image encoder (unCLIP): the picture that the first image varies."""
    to_image: OptionalPath = None
    """The picture that the last image varies; by default that of the first, changed by what
    --to-prompt adds to the prompt."""
    to_seed: OptionalInt = None
    """Seed of the last image; by default that of the first."""
    at: float = 0.0
    """With --frames 1: position of the frame, from 0 (the first image) to 1 (the last)."""
    height: OptionalInt = None
    """Height in pixels; by default the size that the model was trained at."""
    width: OptionalInt = None
    """Width in pixels; by default the size that the model was trained at."""
    text: TextSettings = PLAIN_TEXT
    settings: SampleSettings = PLAIN


@dataclass(frozen=True, kw_only=True)
class Output:
    """What a command writes, and the picture whose recipe it takes."""

    out: Path = Path("out")
    """Folder for the images, created if it is missing; existing pictures are not overwritten."""
    preview: bool = False
    """Write preview.png to the folder after each step: a cheap preview of the images."""
    like: OptionalPath = None
    """Take the options from the recipe in this PNG. Without other options, the image is made again
    bit for bit, compared, and written as NAME-again.png. Of a picture of a web UI, the prompt and
    the settings are used."""


class Command(Protocol):
    """The options that every command for making images has."""

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
    def compute(self) -> SamplingCompute: ...
