"""A text-conditioned checkpoint made ready to sample: Stable Diffusion 1, 2, XL, XL's refiner.

    prompt, negative prompt, sizes -> conditions (tokens; for XL the pooled text and the sizes)

The pipelines are functions of it, a page each: `text_to_image`, `image_to_image`, `inpaint`,
`upscale`, `refine`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastdiff
from fastdiff.checkpoint.model import Model
from fastdiff.configs import to_dict
from fastdiff.generate.core import CHECKPOINT, Core, SampleSettings, check_seeds
from fastdiff.kernels.choose import selected_backend
from fastdiff.models.layers import timestep_embedding
from fastdiff.models.text import EncodedPrompt, count_chunks, encode_prompt
from fastdiff.runtime.conditions import Condition

TEXT_SETTINGS = SampleSettings(sampler=CHECKPOINT, steps=30, guidance_scale=7.5, tile=128, batch=4)
"""Defaults that suit Stable Diffusion: the sampler and the spacing that the model's files name,
1024 x 1024 pixels decoded at once, more in tiles."""


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """How prompts become conditions."""

    negative: str | None = None
    """What to guide away from; None: what the model was trained with for "no prompt", which is the
    empty prompt, and for XL's base zeros."""
    clip_skip: int = 0
    """Layers of the text encoder left out, of the negative prompt too; "clip skip 2" elsewhere."""
    emphasis: bool = True
    """Read (word:1.2), (word) and [word] as weights; False: as text."""
    original_size: tuple[int, int] | None = None
    """XL: height and width the image claims to have had before cropping; None: its own."""
    crop: tuple[int, int] = (0, 0)
    """XL: top and left of the crop that the image claims to be."""
    target_size: tuple[int, int] | None = None
    """XL's base: height and width the image claims to have been made for; None: its own."""
    aesthetic_score: float = 6.0
    """XL's refiner: what the prompt claims of the image, 0 to 10."""
    negative_aesthetic_score: float = 2.5
    """XL's refiner: the same of the negative prompt."""

    def __post_init__(self) -> None:
        for name, least in (("original_size", 1), ("crop", 0), ("target_size", 1)):
            sides = getattr(self, name)
            if sides is not None and min(sides) < least:
                raise ValueError(f"{name} must be two numbers >= {least}, got {sides}")
        for name in ("aesthetic_score", "negative_aesthetic_score"):
            if not 0 <= getattr(self, name) <= 10:
                raise ValueError(f"{name} must lie in 0 to 10, got {getattr(self, name)}")
        if self.clip_skip < 0:
            raise ValueError(f"clip_skip must be at least 0, got {self.clip_skip}; 0 leaves none")


PLAIN_TEXT = TextSettings()


class TextDiffusion:
    """A checkpoint whose denoiser reads text, prepared for inference in place.

    On the CPU an image depends on its prompt, its seed and the settings only, bit for bit.
    """

    def __init__(
        self,
        checkpoint: Model,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """
        Raises:
            ValueError: the checkpoint is no text-conditioned latent diffusion model, or its parts
                do not belong together.
        """
        unet, autoencoder, schedule = _parts(checkpoint)
        self.checkpoint = checkpoint
        unet.to(device, dtype)
        self.core = Core(
            unet,
            autoencoder,
            schedule,
            prediction=checkpoint.prediction,
            scale_factor=checkpoint.scale_factor,
            sampler=checkpoint.sampler,
            no_sampler=str(checkpoint.provenance.get("no_sampler", "")),
        )
        self.unet, self.autoencoder = unet, autoencoder
        self.encoders = checkpoint.text_encoders
        for encoder in self.encoders:
            encoder.model.to(device, dtype)
            encoder.model.eval().requires_grad_(False)
        # XL's base, with two encoders, saw zeros in place of a dropped prompt.
        self.zero_negative = bool(
            checkpoint.provenance.get("force_zeros_for_empty_prompt", len(self.encoders) == 2)
        )

    @property
    def latent_channels(self) -> int:
        return self.autoencoder.config.latent_channels

    def check_plain(self) -> None:
        """Raise ValueError if the denoiser reads more than latents: the image to inpaint."""
        channels = self.unet.config.in_channels
        if channels != self.latent_channels:
            raise ValueError(
                f"this denoiser reads {channels} channels, {self.latent_channels} of latents and "
                "an image to inpaint; use inpaint, with a mask of ones to make the whole image new"
            )

    @property
    def size_factor(self) -> int:
        """Heights and widths of images must be multiples of this."""
        return self.autoencoder.downsample_factor * self.unet.config.size_multiple

    def check_size(self, height: int, width: int, what: str = "the image") -> None:
        """Raise ValueError, with the nearest sizes, unless the networks can halve these sides."""
        factor = self.size_factor
        if height % factor == 0 and width % factor == 0 and height > 0 and width > 0:
            return
        below, above = (
            [max(rounded(side / factor), 1) * factor for side in (width, height)]
            for rounded in (math.floor, math.ceil)
        )
        near = " or ".join(dict.fromkeys(f"{w} x {h}" for w, h in (below, above)))
        raise ValueError(
            f"the sides of {what} must be positive multiples of {factor}, got {width} x {height} "
            f"(width x height); the nearest sizes are {near}"
        )

    def default_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """(height, width), what is None as the model was trained.

        Raises:
            ValueError: the size does not fit the networks, or the checkpoint does not tell one.
        """
        trained = self.checkpoint.image_size
        height = trained if height is None else height
        width = trained if width is None else width
        if height is None or width is None:
            raise ValueError(
                "the checkpoint does not say for which size it was trained; give height and width"
            )
        self.check_size(height, width)
        return height, width

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of an image."""
        factor = self.autoencoder.downsample_factor
        return self.latent_channels, height // factor, width // factor

    @torch.no_grad()
    def conditions(
        self,
        prompts: Sequence[str],
        size: tuple[int, int],
        text: TextSettings,
        *,
        guided: bool,
    ) -> tuple[list[Condition], list[Condition] | None]:
        """Conditions for prompts and, if guided, for the negative prompt beside each.

        Equal prompts share one object. prompts: one per sample. size: (height, width) of the image.

        Raises:
            ValueError: as `encode_prompt`.
        """
        made: dict[str, tuple[Condition, Condition | None]] = {}  # the negative one behind
        nothing: dict[int, Condition] = {}  # by the number of chunks

        def encode(prompt: str, chunks: int) -> EncodedPrompt:
            return encode_prompt(
                self.encoders,
                prompt,
                chunks=chunks,
                clip_skip=text.clip_skip,
                emphasis=text.emphasis,
            )

        zeros = text.negative is None and self.zero_negative
        negative = text.negative or ""
        for prompt in dict.fromkeys(prompts):
            pair = [prompt] if zeros or not guided else [prompt, negative]
            chunks = max(count_chunks(self.encoders, p, emphasis=text.emphasis) for p in pair)
            encoded = encode(prompt, chunks)
            if guided and chunks not in nothing:
                empty = encoded.zeros() if zeros else encode(negative, chunks)
                nothing[chunks] = self._condition(empty, size, text, text.negative_aesthetic_score)
            condition = self._condition(encoded, size, text, text.aesthetic_score)
            made[prompt] = (condition, nothing.get(chunks))
        unconditional = [other for prompt in prompts if (other := made[prompt][1]) is not None]
        return [made[prompt][0] for prompt in prompts], unconditional if guided else None

    def _condition(
        self, encoded: EncodedPrompt, size: tuple[int, int], text: TextSettings, score: float
    ) -> Condition:
        added = self.unet.config.added_condition_dim
        if added is None:
            return Condition(context=encoded.tokens)
        if encoded.pooled is None:
            raise ValueError(
                "the denoiser needs a pooled text vector, got none from the text encoders; "
                "give Stable Diffusion XL's second encoder with pooled=True"
            )
        numbers = (*(text.original_size or size), *text.crop)
        vector = size_vector(
            encoded.pooled,
            added,
            {6: (*numbers, *(text.target_size or size)), 5: (*numbers, score)},
        )
        return Condition(context=encoded.tokens, added=vector)

    def decode(self, z: Tensor, settings: SampleSettings) -> Tensor:
        """Latents to images on the CPU, (N, 3, H, W) in [-1, 1], a batch at a time."""
        parts = z.split(settings.batch)
        return torch.cat([self.core.decode(part, tile=settings.tile).cpu() for part in parts])

    def recipe(
        self, prompt: str, seed: int, text: TextSettings, settings: SampleSettings, **more: Any
    ) -> dict[str, Any]:
        """Everything that one image depends on; JSON-able. The first call hashes the weights."""
        kept = {key: value for key, value in to_dict(settings).items() if key != "batch"}
        return {
            "fastdiff": fastdiff.__version__,
            "torch": torch.__version__,
            "checkpoint": str(self.checkpoint.path),
            "weights": self.weights_hash,
            "layout": self.checkpoint.layout,
            "backend": selected_backend(),
            "device": self.core.device.type,
            "dtype": str(self.core.dtype).removeprefix("torch."),
            "prompt": prompt,
            "seed": seed,
            "text": to_dict(text),
            "settings": kept,
            "sampler": self._sampler_recipe(settings),
            **more,
        }

    @property
    def weights_hash(self) -> str:
        return self.checkpoint.weights_hash

    def _sampler_recipe(self, settings: SampleSettings) -> dict[str, Any] | None:
        """What CHECKPOINT means, where the settings ask for it and the files say."""
        if settings.sampler != CHECKPOINT or self.core.sampler is None:
            return None
        return to_dict(self.core.sampler)


def size_vector(pooled: Tensor, width: int, choices: dict[int, tuple[float, ...]]) -> Tensor:
    """XL's added condition: the pooled text, then each number as a timestep is embedded.

    pooled: (1, P). width: A, of the whole. choices: the numbers of XL's base (6) and of its refiner
    (5); which it is follows from A - P, with the original 256 channels per number and any other
    power of two. Returns (1, A). Podell et al. 2023, section 2.2.

    Raises:
        ValueError: neither fits.
    """
    room = width - pooled.shape[1]
    for count, numbers in choices.items():
        channels = room // count
        if channels > 0 and channels * count == room and channels & (channels - 1) == 0:
            given = torch.tensor(numbers, device=pooled.device, dtype=torch.float32)
            embedded = timestep_embedding(given, channels, "openai").to(pooled)
            return torch.cat([pooled, embedded.reshape(1, -1)], dim=1)
    raise ValueError(
        f"the denoiser's added condition is {width} wide, got {pooled.shape[1]} of pooled text and "
        f"{room} left for 6 numbers (XL's base) or 5 (its refiner); use the text encoders that it "
        "was trained with"
    )


def samples(prompt: str | Sequence[str], seeds: Sequence[int]) -> list[str]:
    """A prompt per seed.

    Raises:
        ValueError: seeds are no seeds, or there is another number of prompts.
    """
    check_seeds(seeds)
    prompts = [prompt] * len(seeds) if isinstance(prompt, str) else list(prompt)
    if len(prompts) != len(seeds):
        raise ValueError(
            f"expected a prompt per seed, or one for all, got {len(prompts)} prompts and "
            f"{len(seeds)} seeds"
        )
    return prompts


def _parts(checkpoint: Model) -> tuple[Any, Any, Any]:
    unet, autoencoder, schedule = checkpoint.denoiser, checkpoint.autoencoder, checkpoint.schedule
    for name, part in (("denoiser", unet), ("autoencoder", autoencoder), ("schedule", schedule)):
        if part is None:
            raise ValueError(
                f"expected a text-to-image checkpoint, got one without {name} "
                f"({checkpoint.path}); give the whole model"
            )
    assert unet is not None and autoencoder is not None  # noqa: PT018 (for the type checker)
    width, channels = unet.config.context_dim, autoencoder.config.latent_channels
    if width is None:
        raise ValueError(
            f"the denoiser of {checkpoint.path} reads no text; 'fastdiff sample' draws classes"
        )
    if unet.config.out_channels != channels:
        raise ValueError(
            f"the denoiser makes latents of {unet.config.out_channels} channels and the "
            f"autoencoder reads {channels}; give the autoencoder that it was trained with"
        )
    if not checkpoint.text_encoders:
        raise ValueError(
            f"the checkpoint {checkpoint.path} has no text encoder; give the whole model"
        )
    have = sum(encoder.model.config.hidden_size for encoder in checkpoint.text_encoders)  # type: ignore[union-attr,misc]
    if have != width:
        raise ValueError(
            f"the denoiser reads text vectors {width} wide and the text encoders make {have}; "
            "give the text encoders that it was trained with"
        )
    return unet, autoencoder, schedule
