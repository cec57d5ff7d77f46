"""``fastdiff inpaint``: a part of an image made new, after a prompt or a class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from fastdiff.cli import pictures
from fastdiff.cli.options import (
    FLAT,
    NO_NONE,
    InpaintOptions,
    LoadOptions,
    Output,
    SamplingCompute,
)
from fastdiff.generate.job import InpaintJob, check_seeds

if TYPE_CHECKING:
    from fastdiff.cli.again import Original


@dataclass(frozen=True, kw_only=True)
class Inpaint:
    """Replace a part of an image, with an inpainting model or any other model.

    The mask is a picture of the same size as the image, white where the image is to be replaced.
    All other pixels are kept. Writes one PNG per seed, and a contact sheet if there are several.

    Examples:
      fastdiff inpaint "a dog" --image photo.png --mask mask.png --model sd-inpainting/
      fastdiff inpaint "a tree" --image photo.png --mask mask.png --model sd15.ckpt --count 4
      fastdiff inpaint "sky" --image photo.png --mask mask.png --model sdxl/ --strength 0.8
    """

    job: Annotated[InpaintOptions, FLAT, NO_NONE]
    model: str
    """File or folder of a checkpoint, folder of a run, or name of a shipped model."""
    count: int = 1
    """Number of images."""
    load: Annotated[LoadOptions, FLAT, NO_NONE] = field(default_factory=LoadOptions)
    output: Annotated[Output, FLAT, NO_NONE] = field(default_factory=Output)
    compute: Annotated[SamplingCompute, FLAT, NO_NONE] = field(default_factory=SamplingCompute)

    def __post_init__(self) -> None:
        check_seeds(self.job.seed, self.count)


def main(words: Sequence[str]) -> int:
    return pictures.main(Inpaint, InpaintOptions, words, run)


def run(options: Inpaint, like: Original | None = None) -> int:
    """``like``: the picture given as --like."""
    from fastdiff.generate.pictures import read_mask_of
    from fastdiff.images import read_image

    job = options.job
    # report errors in the pictures before loading the model
    image = read_image(job.image, height=job.height, width=job.width)
    read_mask_of(pictures.as_job(InpaintJob, job), image)
    want = pictures.of_one_prompt(options, InpaintJob, options.count)
    inputs = [job.image, job.mask, *job.control]
    return pictures.run(options, want, inputs=inputs, original=like)
