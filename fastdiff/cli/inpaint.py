"""``fastdiff inpaint``: a part of an image made new, after a prompt or a class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

from fastdiff.cli import again, pictures
from fastdiff.cli.options import (
    FLAT,
    NO_NONE,
    InpaintOptions,
    LoadOptions,
    Machine,
    as_job,
    check_count,
)
from fastdiff.cli.parsing import option_value, parse
from fastdiff.generate.job import InpaintJob, read_mask_of
from fastdiff.images import read_image


@dataclass(frozen=True, kw_only=True)
class Inpaint:
    """Make a part of an image new, with a model for inpainting or any other.

    The mask is a picture of the image's size, white where the image is to be new. Everything else
    keeps its pixels. Writes a PNG per seed, and a contact sheet of several.

    Examples:
      fastdiff inpaint "a dog" --image photo.png --mask mask.png --model sd-inpainting/
      fastdiff inpaint "a tree" --image photo.png --mask mask.png --model sd15.ckpt --count 4
      fastdiff inpaint "sky" --image photo.png --mask mask.png --model sdxl/ --strength 0.8
    """

    job: Annotated[InpaintOptions, FLAT, NO_NONE]
    model: str
    """The checkpoint: a file or folder, a run's folder, or the name of a shipped model."""
    count: int = 1
    """Images to make."""
    load: Annotated[LoadOptions, FLAT, NO_NONE] = field(default_factory=LoadOptions)
    machine: Annotated[Machine, FLAT, NO_NONE] = field(default_factory=Machine)

    def __post_init__(self) -> None:
        check_count(self)


def main(words: Sequence[str]) -> int:
    path = option_value(words, "--like")
    like = None if path is None else again.original("inpaint", path)
    default = like and again.options(like, Inpaint, InpaintOptions)
    options = parse(Inpaint, words, prog="fastdiff inpaint", default=default)
    return 0 if options is None else run(options, like and like.asking(default))


def run(options: Inpaint, like: again.Original | None = None) -> int:
    """``like``: the picture given as --like."""
    job = options.job
    image = read_image(job.image, height=job.height, width=job.width)
    read_mask_of(as_job(InpaintJob, job), image)  # what is wrong with them is said before load
    want = pictures.of_one_prompt(options, InpaintJob)
    return pictures.run(options, want, inputs=[job.image, job.mask], original=like)
