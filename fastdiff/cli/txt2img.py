"""``fastdiff txt2img``: make images from a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from fastdiff.cli import pictures
from fastdiff.cli.options import (
    FLAT,
    NO_NONE,
    LoadOptions,
    Output,
    SamplingCompute,
    TextOptions,
)
from fastdiff.cli.parsing import OptionalPath
from fastdiff.generate.job import TextJob, check_seeds

if TYPE_CHECKING:
    from fastdiff.cli.again import Original


@dataclass(frozen=True, kw_only=True)
class Txt2Img:
    """Make images from a prompt with a Stable Diffusion checkpoint (1, 2, XL).

    In prompts, (word:1.3), (word) and [word] are weights, and BREAK begins a new chunk of 77
    tokens. Other syntax of web UIs (AND, [a:b:0.5], [a|b], <lora:...>, __wildcards__) is rejected.
    A preceding backslash turns any of it into text; --no-emphasis does so for the whole prompt.
    Writes one PNG per seed that contains its recipe, and a contact sheet if there are several.

    Examples:
      fastdiff txt2img "a red cat, oil painting" --model stable-diffusion-v1-5/ --seed 7
      fastdiff txt2img "a (foggy:1.3) bay" --model sdxl/ --refiner refiner/ --negative people
      fastdiff txt2img --like out/a-red-cat-oil-painting-seed7.png
    """

    job: Annotated[TextOptions, FLAT, NO_NONE]
    model: str
    """The checkpoint: a diffusers folder, or a .safetensors or .ckpt file."""
    refiner: OptionalPath = None
    """Stable Diffusion XL's refiner for the last steps; it uses the last --tokenizer."""
    count: int = 1
    """Number of images."""
    load: Annotated[LoadOptions, FLAT, NO_NONE] = field(default_factory=LoadOptions)
    output: Annotated[Output, FLAT, NO_NONE] = field(default_factory=Output)
    compute: Annotated[SamplingCompute, FLAT, NO_NONE] = field(default_factory=SamplingCompute)

    def __post_init__(self) -> None:
        check_seeds(self.job.seed, self.count)
        if self.job.upscale is not None and self.refiner is not None:
            raise ValueError("--upscale and --refiner cannot be combined; give only one of them")


def main(words: Sequence[str]) -> int:
    return pictures.main(Txt2Img, TextOptions, words, run)


def run(options: Txt2Img, like: Original | None = None) -> int:
    """``like``: the picture given as --like."""
    want = pictures.of_one_prompt(options, TextJob, options.count)
    inputs = [] if options.job.image is None else [options.job.image]
    return pictures.run(options, want, refiner=options.refiner, inputs=inputs, original=like)
