"""``fastdiff img2img``: variations of an image, led by a prompt or a class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

from fastdiff.cli import again, pictures
from fastdiff.cli.options import (
    FLAT,
    NO_NONE,
    ImageToImageOptions,
    LoadOptions,
    Machine,
    check_count,
)
from fastdiff.cli.parsing import option_value, parse
from fastdiff.generate.job import ImageToImageJob
from fastdiff.images import read_image


@dataclass(frozen=True, kw_only=True)
class Img2Img:
    """Change an image after a prompt, or after a class with a model of classes.

    Writes a PNG per seed with its recipe inside, and a contact sheet of several.

    Examples:
      fastdiff img2img "an oil painting" --image photo.jpg --model stable-diffusion-v1-5/
      fastdiff img2img "winter" --image photo.jpg --model sd15.safetensors --strength 0.5 --count 4
      fastdiff img2img --image out/3-seed0.png --label 8 --model digits
    """

    job: Annotated[ImageToImageOptions, FLAT, NO_NONE]
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
    like = None if path is None else again.original("img2img", path)
    default = like and again.options(like, Img2Img, ImageToImageOptions)
    options = parse(Img2Img, words, prog="fastdiff img2img", default=default)
    return 0 if options is None else run(options, like and like.asking(default))


def run(options: Img2Img, like: again.Original | None = None) -> int:
    """``like``: the picture given as --like."""
    job = options.job
    read_image(job.image, height=job.height, width=job.width)  # what is wrong is said before load
    want = pictures.of_one_prompt(options, ImageToImageJob)
    return pictures.run(options, want, inputs=[job.image], original=like)
