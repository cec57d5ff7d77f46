"""The jobs' dataclasses as options of commands, and the options that all such commands share.

A command's options are a job's own fields (`fastdiff.generate.job`) with what only a command line
needs to know beside them: which ones are words without a flag, and which ones it fills in itself.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, TypeVar

import tyro

from fastdiff.checkpoint.options import LoadOptions
from fastdiff.cli.machine import BackendName, DtypeName
from fastdiff.cli.parsing import OptionalFloat, OptionalInt, OptionalName, OptionalPath
from fastdiff.generate.job import (
    MAX_SEED,
    PLAIN,
    PLAIN_TEXT,
    ClassJob,
    ImageToImageJob,
    InpaintJob,
    TextJob,
)
from fastdiff.generate.settings import SampleSettings, TextSettings

FLAT, NO_NONE = tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone
"""Of a field: its options without the field's name; None is said by leaving an option out."""
Prompt = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PROMPT")]
OptionalPrompt = Annotated[
    tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[PROMPT]", help_behavior_hint="")
]
AnyJob = TypeVar("AnyJob")
HIDDEN = tyro.conf.arg(help_behavior_hint="")


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


def as_job(kind: type[AnyJob], options: Any, **change: Any) -> AnyJob:
    """A plain job of the options of one."""
    own = {field.name: getattr(options, field.name) for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{**own, **change})


def as_options(cls: type[AnyJob], job: Any) -> AnyJob:
    """The options that make this job."""
    own = {f.name: getattr(job, f.name) for f in fields(cls) if hasattr(job, f.name)}  # type: ignore[arg-type]
    for name in ("image", "mask"):
        if own.get(name) is not None:
            own[name] = Path(own[name])
    if cls is not ClassOptions and own.get("label") is not None:
        own["label"] = str(own["label"])
    return cls(**own)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where a command computes, and what it writes."""

    out: Path = Path("out")
    """Folder for the images; made if it is missing."""
    preview: bool = False
    """Write out/preview.png after each step: a cheap look at what is being made."""
    backend: BackendName = "auto"
    """Who computes the ops; auto takes the best that serves ('fastdiff doctor' lists them)."""
    device: str = "auto"
    """cpu, cuda or cuda:N; auto takes a GPU if there is one."""
    dtype: DtypeName = "fp32"
    """Number format of the networks; beside fp16 the autoencoder computes in fp32."""
    like: OptionalPath = None
    """Take the options from the recipe in this PNG. Without others the image is made again, bit for
    bit, compared, and written as NAME-again.png."""


class Command(Protocol):
    """What the options of each command that makes images have."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def model(self) -> str: ...
    @property
    def count(self) -> int: ...
    @property
    def job(self) -> Any: ...
    @property
    def load(self) -> LoadOptions: ...
    @property
    def machine(self) -> Machine: ...


def seeds(options: Command) -> range:
    """The seeds of `count` images, from the job's own up."""
    return range(options.job.seed, options.job.seed + options.count)


def check_count(options: Command) -> None:
    """Raise ValueError unless there are images to make and seeds for them."""
    if options.count < 1:
        raise ValueError(f"count must be at least 1, got {options.count}")
    first, last = seeds(options)[0], seeds(options)[-1]
    if not 0 <= first <= last <= MAX_SEED:
        raise ValueError(f"seeds must lie in 0 to 2^63 - 1, got {first} to {last}")
