"""``fastdiff interpolate``: make the frames between two images of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from fastdiff.cli import pictures
from fastdiff.cli.options import (
    FLAT,
    NO_NONE,
    InterpolationOptions,
    LoadOptions,
    Output,
    SamplingCompute,
)
from fastdiff.generate.job import InterpolationJob, check_frames, frame_of

if TYPE_CHECKING:
    from fastdiff.cli.again import Original
    from fastdiff.generate.facts import Facts
    from fastdiff.generate.job import Job


@dataclass(frozen=True, kw_only=True)
class Interpolate:
    """Make the frames between two seeds, prompts, classes or (unCLIP) pictures.

    The noise moves along the great circle between those of the seeds, as do image embeddings, and
    any other condition along a straight line; the first and the last frame are the two images
    themselves. Writes one PNG per frame that contains its recipe, and a contact sheet.

    Examples:
      fastdiff interpolate --label 3 --to-label 8
      fastdiff interpolate --label 3 --to-seed 1 --frames 16 --out out/walk
      fastdiff interpolate "a cat" --to-prompt "a dog" --model stable-diffusion-v1-5/ --to-seed 7
    """

    job: Annotated[InterpolationOptions, FLAT, NO_NONE]
    model: str = "digits"
    """File or folder of a checkpoint, folder of a run, or name of a shipped model."""
    frames: int = 9
    """Number of frames including both ends; 1: only the frame at the position --at."""
    load: Annotated[LoadOptions, FLAT, NO_NONE] = field(default_factory=LoadOptions)
    output: Annotated[Output, FLAT, NO_NONE] = field(default_factory=Output)
    compute: Annotated[SamplingCompute, FLAT, NO_NONE] = field(default_factory=SamplingCompute)

    def __post_init__(self) -> None:
        check_frames(self.job, self.frames)


def main(words: Sequence[str]) -> int:
    return pictures.main(
        Interpolate, InterpolationOptions, words, run, more=lambda job: {"frames": 1}
    )


def run(options: Interpolate, like: Original | None = None) -> int:
    """``like``: the picture given as --like."""
    job = pictures.as_job(InterpolationJob, options.job)
    inputs = [image for image in (options.job.image, options.job.to_image) if image is not None]
    ends: tuple[object, ...] = (job.prompt, job.to_prompt)
    if all(end is None for end in ends):
        ends = tuple(image.stem for image in inputs) or (job.label, job.to_label)
    name = " to ".join(str(end) for end in ends if end is not None) or f"seed {job.seed}"
    stem = pictures.file_stem(name)

    def frame(_: int, number: int) -> tuple[str, Job]:
        name = f"{stem}-frame{number:0{len(str(options.frames - 1))}}"
        return name, frame_of(job, number, options.frames)

    def want(facts: Facts) -> pictures.Wanted:
        return pictures.Wanted([name], range(options.frames), frame, column="frame")

    return pictures.run(options, want, inputs=inputs, original=like)
