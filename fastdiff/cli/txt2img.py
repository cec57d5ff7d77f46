"""``fastdiff txt2img``: make images from prompts."""

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
    Prompts,
    SamplingCompute,
    TextOptions,
)
from fastdiff.cli.parsing import OptionalPath
from fastdiff.generate.job import Job, TextJob, check_seeds

if TYPE_CHECKING:
    from fastdiff.cli.again import Original
    from fastdiff.generate.facts import Facts


@dataclass(frozen=True, kw_only=True)
class Txt2Img:
    """Make images from prompts with a Stable Diffusion checkpoint (1, 2, XL) or a trained model.

    In prompts, (word:1.3), (word) and [word] are weights, and BREAK begins a new chunk of tokens,
    75 of Stable Diffusion's. Other syntax of web UIs (AND, [a:b:0.5], [a|b], <lora:...>,
    __wildcards__) is rejected. A preceding backslash turns any of it into text; --no-emphasis does
    so for the whole prompt. Writes one PNG per prompt and seed that contains its recipe, and a
    contact sheet if there are several.

    Examples:
      fastdiff txt2img "a red cat" "a blue cat" --model stable-diffusion-v1-5/ --count 4 --seed 7
      fastdiff txt2img "a (foggy:1.3) bay" --model sdxl/ --refiner refiner/ --negative people
      fastdiff txt2img --like out/a-red-cat-seed7.png
    """

    prompts: Prompts = ()
    """What the images should show; each prompt gets --count images."""
    job: Annotated[TextOptions, FLAT, NO_NONE] = field(default_factory=TextOptions)
    model: str
    """Folder of a run, or a checkpoint: a diffusers folder, or a .safetensors or .ckpt file."""
    refiner: OptionalPath = None
    """Stable Diffusion XL's refiner for the last steps; it uses the last --tokenizer."""
    count: int = 1
    """Images per prompt."""
    load: Annotated[LoadOptions, FLAT, NO_NONE] = field(default_factory=LoadOptions)
    output: Annotated[Output, FLAT, NO_NONE] = field(default_factory=Output)
    compute: Annotated[SamplingCompute, FLAT, NO_NONE] = field(default_factory=SamplingCompute)

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("missing: PROMPT; such as fastdiff txt2img 'a red cat' --model DIR")
        for prompt in self.prompts:
            pictures.as_job(TextJob, self.job, prompt=prompt)
        check_seeds(self.job.seed, self.count)
        if self.job.upscale is not None and self.refiner is not None:
            raise ValueError("--upscale and --refiner cannot be combined; give only one of them")


def main(words: Sequence[str]) -> int:
    return pictures.main(Txt2Img, TextOptions, words, run, more=_prompts)


def run(options: Txt2Img, like: Original | None = None) -> int:
    """``like``: the picture given as --like."""
    prompts = tuple(dict.fromkeys(options.prompts))
    stems = [pictures.file_stem(prompt) for prompt in prompts]
    seeds = range(options.job.seed, options.job.seed + options.count)

    def job(row: int, seed: int) -> tuple[str, Job]:
        made = pictures.as_job(TextJob, options.job, prompt=prompts[row], seed=seed)
        return f"{stems[row]}-seed{seed}", made

    def want(_: Facts) -> pictures.Wanted:
        return pictures.Wanted(prompts, seeds, job)

    inputs = [*([] if options.job.image is None else [options.job.image]), *options.job.control]
    return pictures.run(options, want, refiner=options.refiner, inputs=inputs, original=like)


def _prompts(job: TextJob) -> dict[str, tuple[str, ...]]:
    """The prompts of a recipe's job."""
    return {"prompts": (job.prompt,)}
