"""``fastdiff txt2img``: images from a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

from fastdiff.cli import again, pictures
from fastdiff.cli.options import FLAT, NO_NONE, LoadOptions, Machine, TextOptions, check_count
from fastdiff.cli.parsing import OptionalPath, option_value, parse
from fastdiff.generate.job import TextJob


@dataclass(frozen=True, kw_only=True)
class Txt2Img:
    """Make images from a prompt with a Stable Diffusion checkpoint (1, 2, XL).

    Weights in prompts: (word:1.3), (word), [word]; a backslash before a bracket takes it as text.
    Writes a PNG per seed with its recipe inside, and a contact sheet of several.

    Examples:
      fastdiff txt2img "a red cat, oil painting" --model stable-diffusion-v1-5/ --seed 7
      fastdiff txt2img "a (foggy:1.3) bay" --model sdxl/ --refiner refiner/ --negative people
      fastdiff txt2img --like out/a-red-cat-oil-painting-seed7.png
    """

    job: Annotated[TextOptions, FLAT, NO_NONE]
    model: str
    """The checkpoint: a diffusers folder, or a .safetensors or .ckpt file."""
    refiner: OptionalPath = None
    """Stable Diffusion XL's refiner, for the last of the noise; takes the last --tokenizer."""
    count: int = 1
    """Images to make."""
    load: Annotated[LoadOptions, FLAT, NO_NONE] = field(default_factory=LoadOptions)
    machine: Annotated[Machine, FLAT, NO_NONE] = field(default_factory=Machine)

    def __post_init__(self) -> None:
        check_count(self)
        if self.job.upscale is not None and self.refiner is not None:
            raise ValueError("upscale and refiner do not go together; give one of them")


def main(words: Sequence[str]) -> int:
    path = option_value(words, "--like")
    like = None if path is None else again.original("txt2img", path)
    default = like and again.options(like, Txt2Img, TextOptions)
    options = parse(Txt2Img, words, prog="fastdiff txt2img", default=default)
    return 0 if options is None else run(options, like and like.asking(default))


def run(options: Txt2Img, like: again.Original | None = None) -> int:
    """``like``: the picture given as --like."""
    want = pictures.of_one_prompt(options, TextJob)
    return pictures.run(options, want, refiner=options.refiner, original=like)
