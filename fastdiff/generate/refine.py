"""Stable Diffusion XL in two: the base makes the image out of noise, the refiner ends it.

Both go along one table. The base stops at the noise that is left at `switch`, and the refiner, an
expert for little noise, goes on from there (Podell et al. 2023, section 2.5).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastdiff.diffusion.sampling import OnStep
from fastdiff.generate.core import Progress, SampleSettings, stage_seeds
from fastdiff.generate.text import PLAIN_TEXT, TEXT_SETTINGS, TextDiffusion, TextSettings, samples
from fastdiff.generate.text_to_image import text_to_latents


def refine(
    base: TextDiffusion,
    refiner: TextDiffusion,
    prompt: str | Sequence[str],
    seeds: Sequence[int] = (0,),
    *,
    switch: float = 0.8,
    height: int | None = None,
    width: int | None = None,
    text: TextSettings = PLAIN_TEXT,
    settings: SampleSettings = TEXT_SETTINGS,
    on_step: OnStep | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """One image per seed, begun by the base and ended by the refiner.

    Args:
        switch: the share of the training's timesteps, from the noisy end, that is the base's
            (diffusers' denoising_end and denoising_start).
        progress, on_step: called for both parts, one after the other, each with its own total.
        The rest as in `text_to_image`.

    Returns (N, 3, H, W) fp32 on the CPU, in [-1, 1].

    Raises:
        ValueError: the models do not share latents and noise, `switch` leaves no step to one of
            them, or what `text_to_image` refuses.
    """
    prompts = samples(prompt, seeds)
    _check_pair(base, refiner)
    refiner.check_plain()
    at = switch_step(base, settings, switch)
    x = text_to_latents(
        base,
        prompts,
        seeds,
        height=height,
        width=width,
        stop=at,
        text=text,
        settings=settings,
        on_step=on_step,
        progress=progress,
    )
    factor = refiner.autoencoder.downsample_factor
    size = x.shape[2] * factor, x.shape[3] * factor
    table = refiner.core.table(settings, start=at, files=base.core)
    conditions, unconditional = refiner.conditions(prompts, size, text, guided=any(table.guided))
    z = refiner.core.denoise(
        table,
        x.to(refiner.core.device, refiner.core.sample_dtype),
        conditions,
        unconditional,
        stage_seeds(seeds, "refine"),
        settings=settings,
        on_step=on_step,
        progress=progress,
    )
    return refiner.decode(z, settings)


def switch_step(base: TextDiffusion, settings: SampleSettings, switch: float) -> int:
    """The first of the refiner's steps.

    Raises:
        ValueError: one of the two would have none.
    """
    table = base.core.table(settings)
    total = base.core.schedule.num_timesteps
    first = round(total - switch * total)
    rows = list(zip(table.steps.tolist(), table.timesteps.tolist(), strict=True))
    begins = dict(reversed(rows))  # of a step with several rows, the first one's t
    at = sum(t >= first for t in begins.values())
    if not 0 < at < settings.steps:
        raise ValueError(
            f"switch must leave steps to the base and to the refiner, got {switch}, which gives "
            f"the base {at} of {settings.steps}; 0.8 is usual"
        )
    return at


def _check_pair(base: TextDiffusion, refiner: TextDiffusion) -> None:
    if len(base.encoders) < len(refiner.encoders):
        raise ValueError(
            f"the base must have no fewer text encoders than the refiner, got {len(base.encoders)} "
            f"and {len(refiner.encoders)}; change their places"
        )
    facts = [
        (m.latent_channels, m.core.scale_factor, m.checkpoint.schedule) for m in (base, refiner)
    ]
    if facts[0] != facts[1]:
        raise ValueError(
            "base and refiner must share latent channels, scale factor and schedule, got "
            f"{facts[0]} and {facts[1]}; use Stable Diffusion XL's own pair"
        )
