"""Inpainting: new pixels where the mask is 1, the rest as it was.

A denoiser of 9 channels was trained for it and reads [x, mask, latents of the image without what
is masked]. Any other is held to the image after each row: outside the mask x becomes the image's
latents with the noise of that level (Lugmayr et al. 2022, eq. 8, without resampling).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.diffusion.sampling import OnStep
from fastdiff.generate.core import Progress, SampleSettings
from fastdiff.generate.image_to_image import check_image, first_step
from fastdiff.generate.text import PLAIN_TEXT, TEXT_SETTINGS, TextDiffusion, TextSettings, samples


def inpaint(
    model: TextDiffusion,
    image: Tensor,
    mask: Tensor,
    prompt: str | Sequence[str],
    seeds: Sequence[int] = (0,),
    *,
    strength: float = 1.0,
    paste: bool = True,
    text: TextSettings = PLAIN_TEXT,
    settings: SampleSettings = TEXT_SETTINGS,
    on_step: OnStep | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Images that are new inside the mask, one per seed.

    Args:
        image: (3, H, W) or (1 or N, 3, H, W) in [-1, 1].
        mask: (H, W), (1, H, W) or (1 or N, 1, H, W), bool or numbers: from 0.5 on a pixel is new.
        strength: below 1 the image shines through where it is masked, as in `image_to_image`.
        paste: put the image's own pixels back outside the mask, which otherwise come back through
            the autoencoder.
        prompt, on_step, progress: as in `text_to_image`.

    Returns (N, 3, H, W) fp32 on the CPU, in [-1, 1].

    Raises:
        ValueError: an image, mask, prompts, seeds or settings that do not fit.
    """
    prompts = samples(prompt, seeds)
    image = check_image(model, image, len(seeds))
    mask = check_mask(mask, image, len(seeds)).to(image)
    z = inpaint_latents(
        model,
        image,
        mask,
        prompts,
        seeds,
        strength=strength,
        text=text,
        settings=settings,
        on_step=on_step,
        progress=progress,
    )
    made = model.decode(z, settings)
    if not paste:
        return made
    return torch.where(mask.bool().to(made.device), made, image.to(made))


def inpaint_latents(
    model: TextDiffusion,
    image: Tensor,
    mask: Tensor,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    strength: float,
    text: TextSettings,
    settings: SampleSettings,
    on_step: OnStep | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """The same before decoding. image: (1 or N, 3, H, W). mask: (1 or N, 1, H, W), 0 or 1."""
    core, count, size = model.core, len(seeds), (image.shape[2], image.shape[3])
    shape = model.latent_shape(*size)
    channels, trained = model.unet.config.in_channels, 2 * model.latent_channels + 1
    if channels not in (model.latent_channels, trained):
        raise ValueError(
            f"a denoiser for inpainting reads {model.latent_channels} or {trained} channels, "
            f"got one of {channels}"
        )
    table = core.table(settings, start=first_step(settings.steps, strength))
    z = core.encode(image, tile=settings.tile).expand(count, -1, -1, -1)
    if not len(table):
        return z.clone()
    noise = core.noise(seeds, shape)
    mask = mask.to(noise)
    extra: Tensor | None = None
    hold: tuple[Tensor, Tensor, Tensor] | None = None
    if channels == trained:
        small = F.interpolate(mask, shape[1:])  # the nearest pixel, as in training
        kept = core.encode(image * (mask < 0.5).to(image), tile=settings.tile)
        parts = [part.expand(count, -1, -1, -1) for part in (small, kept)]
        extra = torch.cat(parts, dim=1)
    else:
        # A latent pixel is new if any pixel of its square is: a thin stroke does not get lost.
        small = F.adaptive_max_pool2d(mask, shape[1:]).expand(count, -1, -1, -1)
        hold = small, z, noise
    conditions, unconditional = model.conditions(prompts, size, text, guided=any(table.guided))
    level = table.initial_level
    x = noise if strength == 1 else level.alpha * z + level.sigma * noise
    return core.denoise(
        table,
        x,
        conditions,
        unconditional,
        seeds,
        settings=settings,
        extra=extra,
        hold=hold,
        on_step=on_step,
        progress=progress,
    )


def check_mask(mask: Tensor, image: Tensor, count: int) -> Tensor:
    """A mask as (1 or N, 1, H, W) of 0 and 1.

    Raises:
        ValueError: another size than the image, more than one channel, or all zeros.
    """
    given = tuple(mask.shape)
    while mask.ndim < 4:
        mask = mask[None]
    if mask.shape[1] != 1 or mask.shape[2:] != image.shape[2:] or len(mask) not in (1, count):
        height, width = image.shape[2:]
        raise ValueError(
            f"the mask must be (1, {height}, {width}), as large as the image, got {given}; "
            "resize it, and give it one channel"
        )
    binary = (mask if mask.dtype == torch.bool else mask >= 0.5).float()
    if not binary.any():
        raise ValueError(
            "the mask is empty, expected 1 (white) where the image is to be new; invert it?"
        )
    return binary
