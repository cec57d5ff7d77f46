"""``fastdiff sample``: make new images, each containing its recipe, and a contact sheet."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import tyro

from fastdiff.cli import pictures
from fastdiff.cli.options import (
    FLAT,
    NO_NONE,
    ClassOptions,
    LoadOptions,
    Output,
    SamplingCompute,
)
from fastdiff.generate.job import ClassJob, Job, check_seeds

if TYPE_CHECKING:
    from fastdiff.cli.again import Original
    from fastdiff.generate.facts import Facts

NO_CLASS = "none"
MAX_NAME = 40
"""Letters of a class's name in a file's name, which may have 255 bytes."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Make new images with a class-conditional or unconditional model, or enlarge a picture.

    Writes one PNG per image, with its recipe in the metadata, and a contact sheet, sheet.png. An
    image depends only on its class, its seed and the settings, not on the other images.

    Examples:
      fastdiff sample
      fastdiff sample --classes 3 7 --count 4 --steps 20 --sampler ddim --out out/digits
      fastdiff sample --like out/3-seed0.png
    """

    model: str = "digits"
    """File or folder of a checkpoint, folder of a run, or name of a shipped model."""
    classes: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="CLASS [CLASS ...]", help_behavior_hint="")
    ] = ()
    """Classes by name or number, "none" for no class; by default all classes of the model."""
    count: int = 8
    """Images per class."""
    job: Annotated[ClassOptions, FLAT, NO_NONE] = field(default_factory=ClassOptions)
    load: Annotated[LoadOptions, FLAT, NO_NONE] = field(default_factory=LoadOptions)
    output: Annotated[Output, FLAT, NO_NONE] = field(default_factory=Output)
    compute: Annotated[SamplingCompute, FLAT, NO_NONE] = field(default_factory=SamplingCompute)

    def __post_init__(self) -> None:
        check_seeds(self.job.seed, self.count)


def main(words: Sequence[str]) -> int:
    return pictures.main(Sample, ClassOptions, words, run, more=_classes)


def run(options: Sample, like: Original | None = None) -> int:
    """``like``: the picture given as --like."""

    def want(facts: Facts) -> pictures.Wanted:
        labels = class_labels(options.classes, facts)
        names = class_names(labels, facts)
        stems = file_names(names, labels)
        seeds = range(options.job.seed, options.job.seed + options.count)

        def job(row: int, seed: int) -> tuple[str, Job]:
            label = labels[row]
            made = pictures.as_job(ClassJob, options.job, label=label, seed=seed)
            return f"{stems[label]}-seed{seed}", made

        return pictures.Wanted([names[label] for label in labels], seeds, job)

    inputs = [] if options.job.image is None else [options.job.image]
    return pictures.run(options, want, inputs=inputs, original=like)


def class_labels(words: Sequence[str], facts: Facts) -> list[int | None]:
    """Convert class names or numbers to labels, None for no class; without words, all classes.

    Raises:
        ValueError: the model has no such class.
    """
    if not words:
        return [None] if facts.label_classes is None else [*range(facts.label_classes)]
    labels = [
        None if word == NO_CLASS and NO_CLASS not in facts.class_names else facts.label(word)
        for word in words
    ]
    return [*dict.fromkeys(labels)]


def class_names(labels: Sequence[int | None], facts: Facts) -> dict[int | None, str]:
    """The name of each class."""
    known = facts.class_names
    return {
        label: NO_CLASS if label is None else known[label] if known else f"class{label}"
        for label in labels
    }


def file_names(names: dict[int | None, str], labels: Sequence[int | None]) -> dict[int | None, str]:
    """The stem of each class's files: its name if that is a valid file name, else with a number."""
    safe = all(re.fullmatch(rf"\w[\w-]{{,{MAX_NAME - 1}}}", name) for name in names.values())
    if safe and len(set(map(str.lower, names.values()))) == len(names):
        return names
    return {
        label: NO_CLASS if label is None else f"{label}-{_plain(names[label])}" for label in labels
    }


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "-", unicodedata.normalize("NFC", name)[:MAX_NAME])


def _classes(job: ClassJob) -> dict[str, tuple[str, ...]]:
    """The value of --classes for a recipe's job."""
    return {"classes": (NO_CLASS if job.label is None else str(job.label),)}
