"""``fastdiff img2img``: variations of an image, led by a prompt."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from fastdiff.cli import pictures
from fastdiff.cli.again import Original, original
from fastdiff.cli.parsing import OptionalInt, parse
from fastdiff.generate.image_to_image import check_image, first_step, image_to_image
from fastdiff.generate.text import TextDiffusion
from fastdiff.images import read_image


@dataclass(frozen=True, kw_only=True)
class Img2Img:
    """Change an image after a prompt with a Stable Diffusion checkpoint (1, 2, XL).

    Writes a PNG per seed with its recipe inside, and a contact sheet of several.

    Examples:
      fastdiff img2img "an oil painting" --image photo.jpg --model stable-diffusion-v1-5/
      fastdiff img2img "winter" --image photo.jpg --model sd15.safetensors --strength 0.5 --count 4
      fastdiff img2img "a castle" --image sketch.png --model sdxl/ --height 1024 --width 1024
    """

    prompt: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PROMPT")]
    """What the image is to become."""
    image: Path
    """The picture to begin with."""
    model: Path
    """The checkpoint: a diffusers folder, or a .safetensors or .ckpt file."""
    strength: float = 0.75
    """Share of the steps that are done: 0 keeps the image, 1 makes a new one."""
    height: OptionalInt = None
    """Crop and resize the picture to this height first."""
    width: OptionalInt = None
    """Crop and resize the picture to this width first."""
    shared: Annotated[pictures.Shared, tyro.conf.arg(name="")] = field(
        default_factory=pictures.Shared
    )


def main(words: Sequence[str]) -> int:
    like = original(Img2Img, "img2img", words)
    options = parse(Img2Img, words, prog="fastdiff img2img", default=like and like.options)
    return 0 if options is None else run(options, like)


def run(options: Img2Img, like: Original | None = None) -> int:
    """``like``: the picture given as --like."""
    shared = options.shared
    first_step(shared.settings.steps, options.strength)
    image = read_image(options.image, height=options.height, width=options.width)

    def prepare(model: TextDiffusion) -> tuple[pictures.Make, dict[str, Any]]:
        check_image(model, image, 1)
        make = functools.partial(
            image_to_image,
            model,
            image,
            options.prompt,
            strength=options.strength,
            text=shared.text,
            settings=shared.settings,
        )
        return make, {
            "pipeline": "img2img",
            "image": pictures.identity(options.image),
            "strength": options.strength,
            "height": image.shape[1],
            "width": image.shape[2],
        }

    return pictures.run(options, prepare, inputs=[options.image], original=like)
