"""``fastdiff img2img``: change an image according to a prompt or a class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from fastdiff.cli import pictures
from fastdiff.cli.options import (
    FLAT,
    NO_NONE,
    ImageToImageOptions,
    LoadOptions,
    Output,
    SamplingCompute,
)
from fastdiff.generate.job import ImageToImageJob, check_seeds

if TYPE_CHECKING:
    from fastdiff.cli.again import Original


@dataclass(frozen=True, kw_only=True)
class Img2Img:
    """Change an image according to a prompt, or to a class with a class-conditional model.

    Writes one PNG per seed that contains its recipe, and a contact sheet if there are several.

    Examples:
      fastdiff img2img "an oil painting" --image photo.jpg --model stable-diffusion-v1-5/
      fastdiff img2img "winter" --image photo.jpg --model sd15.safetensors --strength 0.5 --count 4
      fastdiff img2img --image out/3-seed0.png --label 8 --model digits
    """

    job: Annotated[ImageToImageOptions, FLAT, NO_NONE]
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
    return pictures.main(Img2Img, ImageToImageOptions, words, run)


def run(options: Img2Img, like: Original | None = None) -> int:
    """``like``: the picture given as --like."""
    from fastdiff.images import read_image

    job = options.job
    # report errors in the picture before loading the model
    read_image(job.image, height=job.height, width=job.width)
    want = pictures.of_one_prompt(options, ImageToImageJob, options.count)
    inputs = [job.image, *job.control, *([] if job.depth is None else [job.depth])]
    return pictures.run(options, want, inputs=inputs, original=like)
