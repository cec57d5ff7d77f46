"""Image to image: encode, add the noise of a step in the middle of the table, go on from there."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastdiff.diffusion.sampling import OnStep
from fastdiff.generate.core import Progress, SampleSettings
from fastdiff.generate.text import PLAIN_TEXT, TEXT_SETTINGS, TextDiffusion, TextSettings, samples


def image_to_image(
    model: TextDiffusion,
    image: Tensor,
    prompt: str | Sequence[str],
    seeds: Sequence[int] = (0,),
    *,
    strength: float = 0.75,
    text: TextSettings = PLAIN_TEXT,
    settings: SampleSettings = TEXT_SETTINGS,
    on_step: OnStep | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Variations of an image, one per seed.

    The image goes in as the mode of its latents' distribution, so the noise of the seed is all the
    chance there is.

    Args:
        image: (3, H, W) or (1 or N, 3, H, W) in [-1, 1], one for all seeds or one per seed.
        strength: share of the steps that are done, 0 to 1: 0 gives the image back through the
            autoencoder, 1 starts from (nearly) pure noise.
        prompt, on_step, progress: as in `text_to_image`.

    Returns (N, 3, H, W) fp32 on the CPU, in [-1, 1].

    Raises:
        ValueError: an image, prompts, seeds or settings that do not fit the model.
    """
    model.check_plain()
    image = check_image(model, image, len(seeds))
    z = model.core.encode(image, tile=settings.tile)
    z = latents_to_latents(
        model,
        z,
        prompt,
        seeds,
        strength=strength,
        text=text,
        settings=settings,
        on_step=on_step,
        progress=progress,
    )
    return model.decode(z, settings)


def latents_to_latents(
    model: TextDiffusion,
    z: Tensor,
    prompt: str | Sequence[str],
    seeds: Sequence[int] = (0,),
    *,
    strength: float = 0.75,
    text: TextSettings = PLAIN_TEXT,
    settings: SampleSettings = TEXT_SETTINGS,
    on_step: OnStep | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """The same from latents to latents. z: (1 or N, C, h, w), scaled. Returns (N, C, h, w)."""
    model.check_plain()
    prompts = samples(prompt, seeds)
    table = model.core.table(settings, start=first_step(settings.steps, strength))
    z = z.expand(len(seeds), -1, -1, -1)
    if not len(table):
        return z.clone()
    factor = model.autoencoder.downsample_factor
    size = z.shape[2] * factor, z.shape[3] * factor
    conditions, unconditional = model.conditions(prompts, size, text, guided=any(table.guided))
    level = table.initial_level
    noise = model.core.noise(seeds, z.shape[1:])
    return model.core.denoise(
        table,
        level.alpha * z + level.sigma * noise,
        conditions,
        unconditional,
        seeds,
        settings=settings,
        on_step=on_step,
        progress=progress,
    )


def first_step(steps: int, strength: float) -> int:
    """The first of the steps that `strength` leaves to do; `steps` for none.

    Raises:
        ValueError: strength outside [0, 1].
    """
    if not 0 <= strength <= 1:
        raise ValueError(
            f"strength must lie in [0, 1], got {strength}; 0 keeps the image, 1 makes a new one"
        )
    return steps - int(steps * strength + 1e-9)  # 100 * 0.29 is 28.999999999999996


def check_image(model: TextDiffusion, image: Tensor, count: int) -> Tensor:
    """An image as (1 or N, 3, H, W).

    Raises:
        ValueError: no RGB, values outside [-1, 1], sides that the networks cannot halve, or
            another number of images than seeds.
    """
    channels = model.autoencoder.config.image_channels
    image = image[None] if image.ndim == 3 else image
    if image.ndim != 4 or image.shape[1] != channels or not image.is_floating_point():
        raise ValueError(
            f"the image must be ({channels}, H, W) floating point in [-1, 1], got "
            f"{tuple(image.shape)} {image.dtype}; fastdiff.images.read_image reads one so"
        )
    if len(image) not in (1, count):
        raise ValueError(f"expected one image, or one per seed, got {len(image)} for {count} seeds")
    model.check_size(image.shape[2], image.shape[3])
    low, high = float(image.min()), float(image.max())
    if not -1.001 <= low <= high <= 1.001:
        raise ValueError(
            f"pixels must lie in [-1, 1], got {low:g} to {high:g}; "
            "fastdiff.images.read_image reads an image so"
        )
    return image
