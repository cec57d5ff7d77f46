"""``fastdiff inpaint``: new pixels inside a mask."""

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
from fastdiff.generate.image_to_image import check_image, first_step
from fastdiff.generate.inpainting import check_mask, inpaint
from fastdiff.generate.text import TextDiffusion
from fastdiff.images import read_image, read_mask


@dataclass(frozen=True, kw_only=True)
class Inpaint:
    """Make a part of an image new, with any Stable Diffusion checkpoint or one for inpainting.

    The mask is a picture of the image's size, white where the image is to be new. Everything else
    keeps its pixels. Writes a PNG per seed, and a contact sheet of several.

    Examples:
      fastdiff inpaint "a dog" --image photo.png --mask mask.png --model sd-inpainting/
      fastdiff inpaint "a tree" --image photo.png --mask mask.png --model sd15.ckpt --count 4
      fastdiff inpaint "sky" --image photo.png --mask mask.png --model sdxl/ --strength 0.8
    """

    prompt: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PROMPT")]
    """What the masked part is to become."""
    image: Path
    """The picture to change."""
    mask: Path
    """A picture of the same size, white where the image is to be new."""
    model: Path
    """The checkpoint: a diffusers folder, or a .safetensors or .ckpt file."""
    strength: float = 1.0
    """Below 1 the image shines through where it is masked."""
    paste: bool = True
    """Put the image's own pixels back outside the mask."""
    height: OptionalInt = None
    """Crop and resize the picture and the mask to this height first."""
    width: OptionalInt = None
    """Crop and resize the picture and the mask to this width first."""
    shared: Annotated[pictures.Shared, tyro.conf.arg(name="")] = field(
        default_factory=pictures.Shared
    )


def main(words: Sequence[str]) -> int:
    like = original(Inpaint, "inpaint", words)
    options = parse(Inpaint, words, prog="fastdiff inpaint", default=like and like.options)
    return 0 if options is None else run(options, like)


def run(options: Inpaint, like: Original | None = None) -> int:
    """``like``: the picture given as --like."""
    shared = options.shared
    first_step(shared.settings.steps, options.strength)
    size = {"height": options.height, "width": options.width}
    image, mask = read_image(options.image, **size), read_mask(options.mask, **size)
    check_mask(mask, image[None], 1)

    def prepare(model: TextDiffusion) -> tuple[pictures.Make, dict[str, Any]]:
        check_image(model, image, 1)
        make = functools.partial(
            inpaint,
            model,
            image,
            mask,
            options.prompt,
            strength=options.strength,
            paste=options.paste,
            text=shared.text,
            settings=shared.settings,
        )
        return make, {
            "pipeline": "inpaint",
            "image": pictures.identity(options.image),
            "mask": pictures.identity(options.mask),
            "strength": options.strength,
            "paste": options.paste,
            "height": image.shape[1],
            "width": image.shape[2],
        }

    inputs = [options.image, options.mask]
    return pictures.run(options, prepare, inputs=inputs, original=like)
