"""Stable Diffusion XL in two parts: the base starts from noise, the refiner finishes the image.

Both follow the same table. The base stops at the noise level given by `switch`, and the refiner,
which was trained on low noise levels, continues from there (Podell et al. 2023, section 2.5).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fastdiff.generate.job import TextJob, stage_seed
from fastdiff.generate.session import Pass, Session


def second_pass(
    base: Session, refiner: Session, job: TextJob
) -> tuple[int, Callable[[Tensor], Pass]]:
    """The step at which the base stops, and a function that plans the refiner's pass.

    Raises:
        ValueError: as for `switch_step`.
    """
    start = switch_step(base, refiner, job)

    def go_on(x: Tensor) -> Pass:
        factor = refiner.facts.factor
        size = x.shape[1] * factor, x.shape[2] * factor
        table = refiner.table(job.settings, start=start, files=base)
        seed = stage_seed(job.seed, "refine")
        return Pass(session=refiner, request=refiner.request(job, table, x, size, seed=seed))

    return start, go_on


def switch_step(base: Session, refiner: Session, job: TextJob) -> int:
    """The first of the refiner's steps.

    Raises:
        ValueError: the models do not share latents and noise schedule, the job also upscales, or
            one of the models would have no step.
    """
    if job.upscale is not None:
        raise ValueError("upscale and refiner cannot be combined; give only one of them")
    check_pair(base, refiner)
    table = base.table(job.settings)
    total = base.schedule.num_timesteps
    first = round(total - job.switch * total)
    rows = list(zip(table.steps.tolist(), table.timesteps.tolist(), strict=True))
    begins = dict(reversed(rows))  # the t of the first row of each step
    at = sum(t >= first for t in begins.values())
    if not 0 < at < job.settings.total:
        raise ValueError(
            f"switch must leave steps for both the base and the refiner, got {job.switch}, which "
            f"gives the base {at} of {job.settings.total} steps; 0.8 is usual"
        )
    return at


def check_pair(base: Session, refiner: Session) -> None:
    """Raise ValueError unless the refiner can continue where the base stops."""
    counts = [len(session.model.text_encoders) for session in (base, refiner)]
    if counts[0] < counts[1]:
        raise ValueError(
            "the base must have at least as many text encoders as the refiner, got "
            f"{counts[0]} and {counts[1]}; swap the two models"
        )
    facts = [(s.facts.channels, s.model.scale_factor, s.model.schedule) for s in (base, refiner)]
    if facts[0] != facts[1] or refiner.facts.extra != "none":
        raise ValueError(
            "base and refiner must share latent channels, scale factor and schedule, got "
            f"{facts[0]} and {facts[1]}; use Stable Diffusion XL's own pair"
        )
