"""Text to image: noise(seed) -> the whole table -> decode."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastdiff.diffusion.sampling import OnStep
from fastdiff.generate.core import Progress, SampleSettings
from fastdiff.generate.text import PLAIN_TEXT, TEXT_SETTINGS, TextDiffusion, TextSettings, samples


def text_to_image(
    model: TextDiffusion,
    prompt: str | Sequence[str],
    seeds: Sequence[int] = (0,),
    *,
    height: int | None = None,
    width: int | None = None,
    text: TextSettings = PLAIN_TEXT,
    settings: SampleSettings = TEXT_SETTINGS,
    on_step: OnStep | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """One image per seed.

    Args:
        prompt: for all seeds, or one per seed. Prompts may differ in length.
        height, width: of the images, in pixels; None: as the model was trained.
        on_step: called after each network evaluation with a `Step`; an exception of its own ends
            the sampling.
        progress: called as progress(done, total) after each network evaluation.

    Returns (N, 3, H, W) fp32 on the CPU, in [-1, 1].

    Raises:
        ValueError: sizes, prompts, seeds or settings that do not fit the model.
    """
    z = text_to_latents(
        model,
        prompt,
        seeds,
        height=height,
        width=width,
        text=text,
        settings=settings,
        on_step=on_step,
        progress=progress,
    )
    return model.decode(z, settings)


def text_to_latents(
    model: TextDiffusion,
    prompt: str | Sequence[str],
    seeds: Sequence[int] = (0,),
    *,
    height: int | None = None,
    width: int | None = None,
    stop: int | None = None,
    text: TextSettings = PLAIN_TEXT,
    settings: SampleSettings = TEXT_SETTINGS,
    on_step: OnStep | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """The same before decoding, or with the noise that is left before step `stop`.

    Returns (N, C, h, w) fp32, scaled, on the model's device.
    """
    prompts = samples(prompt, seeds)
    size = model.default_size(height, width)
    model.check_plain()
    table = model.core.table(settings, stop=stop)
    conditions, unconditional = model.conditions(prompts, size, text, guided=any(table.guided))
    return model.core.denoise(
        table,
        model.core.noise(seeds, model.latent_shape(*size)),
        conditions,
        unconditional,
        seeds,
        settings=settings,
        on_step=on_step,
        progress=progress,
    )
