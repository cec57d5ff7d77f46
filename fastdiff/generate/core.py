"""What every pipeline does: images to latents, along a sampler's table, latents to images.

images -> encode -> z * scale_factor;  x -> requests to the engine -> z
z / scale_factor -> decode -> images, or a cheap preview of them
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.checkpoint.scheduler import SamplerSettings
from fastdiff.diffusion.guidance import GuidanceConfig
from fastdiff.diffusion.predictions import Prediction
from fastdiff.diffusion.samplers import SAMPLERS, SPACINGS, SamplerTable, build_table
from fastdiff.diffusion.sampling import OnStep
from fastdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig
from fastdiff.kernels import INITIAL_NOISE, philox_normal
from fastdiff.models.autoencoder import Autoencoder
from fastdiff.models.network import Network
from fastdiff.runtime.blocks import block_size, in_blocks
from fastdiff.runtime.conditions import Condition
from fastdiff.runtime.engine import Progress, Request, run
from fastdiff.runtime.prepare import prepare

MAX_SEED = 2**63 - 1
DEFAULT_SAMPLER = "dpmpp-2m"
CHECKPOINT = "checkpoint"
"""As a sampler: what the model's files say (diffusers' scheduler_config.json)."""
PREVIEW_LATENTS = 4
"""Latents of 8x8 that are decoded once to learn what a preview looks like."""


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """How to get from noise to an image; the defaults suit the shipped digits."""

    sampler: str = DEFAULT_SAMPLER
    """One of those that 'fastdiff samplers' lists; or checkpoint: as the model's files say."""
    steps: int = 50
    """Steps from noise to image."""
    eta: float | None = None
    """Noise added back per step, for samplers that have it; None: the sampler's own default."""
    guidance_scale: float = 1.5
    """1: the conditional model as it is, at half the cost; more: nearer to the condition."""
    guidance_rescale: float = 0.0
    """phi of Lin et al. 2023 in [0, 1]: against the over-exposure of strong guidance."""
    guidance_interval: tuple[int, int] | None = None
    """Steps [first, stop) that are guided, from 0, the noisiest; None: all."""
    spacing: str | None = None
    """Where the steps lie: trailing, leading, linspace, simple, karras or exponential; None: with
    sampler checkpoint as the files say, else trailing."""
    clamp: float | None = None
    """Bound on the estimate of x0, 1 for pixel models; None: with sampler checkpoint as the files
    say, else none."""
    tile: int | None = 96
    """Latents with a longer side are decoded in tiles of this side; None: never."""
    batch: int = 64
    """Images at a time: bounds memory, has no influence on the images."""

    def __post_init__(self) -> None:
        if self.sampler not in (*SAMPLERS, CHECKPOINT):
            known = ", ".join((*SAMPLERS, CHECKPOINT))
            raise ValueError(f"unknown sampler {self.sampler!r}; expected one of {known}")
        if self.spacing is not None and self.spacing not in SPACINGS:
            raise ValueError(
                f"unknown spacing {self.spacing!r}; expected one of {', '.join(SPACINGS)}"
            )
        for name, least in (("steps", 1), ("batch", 1), ("tile", 8)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.eta is not None and not (math.isfinite(self.eta) and self.eta >= 0):
            raise ValueError(f"eta must be a number >= 0, got {self.eta}; 0 adds no noise")
        if self.clamp is not None and not self.clamp > 0:
            raise ValueError(f"clamp must be positive, got {self.clamp}; 1 fits images")
        GuidanceConfig(
            scale=self.guidance_scale,
            rescale=self.guidance_rescale,
            interval=self.guidance_interval,
        )


class Core:
    """The networks of a diffusion model, made ready for inference.

    On the CPU a sample depends on its condition, its seed and the settings only, bit for bit: not
    on the number of samples, its place among them, or the batch.
    """

    def __init__(
        self,
        unet: Network,
        autoencoder: Autoencoder | None,
        schedule: ScheduleConfig,
        *,
        prediction: Prediction = "eps",
        scale_factor: float = 1.0,
        sampler: SamplerSettings | None = None,
        no_sampler: str = "",
    ) -> None:
        """sampler: what CHECKPOINT means; where it is None, DEFAULT_SAMPLER, and `no_sampler` is
        the warning then. The modules are prepared in place, on the unet's device, in its dtype.

        Beside a unet in fp16 the autoencoder computes in fp32: Stable Diffusion 1's and XL's
        overflow in fp16.
        """
        weight = next(unet.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.sample_dtype = torch.promote_types(self.dtype, torch.float32)
        self.unet = prepare(unet, device=self.device, dtype=self.dtype)
        self.autoencoder = autoencoder
        self.autoencoder_dtype = torch.float32 if self.dtype == torch.float16 else self.dtype
        if autoencoder is not None:
            prepare(autoencoder, device=self.device, dtype=self.autoencoder_dtype)
        self.schedule = NoiseSchedule(schedule)
        self.prediction, self.scale_factor = prediction, scale_factor
        self.sampler, self.no_sampler = sampler, no_sampler

    def table(
        self,
        settings: SampleSettings,
        *,
        start: int = 0,
        stop: int | None = None,
        files: Core | None = None,
    ) -> SamplerTable:
        """The sampler's rows for this model, of the steps [start, stop).

        files: the model whose files say what CHECKPOINT means, if it is not this one.
        """
        name, options = (files or self).sampling(settings)
        if name == "ddpm" and self.unet.config.learned_sigma:
            options["variance"] = "learned"
        return build_table(
            name,
            self.schedule,
            settings.steps,
            prediction=self.prediction,
            start=start,
            stop=stop,
            guidance_scale=settings.guidance_scale,
            guidance_rescale=settings.guidance_rescale,
            guidance_interval=settings.guidance_interval,
            **options,
        )

    def sampling(self, settings: SampleSettings) -> tuple[str, dict[str, Any]]:
        """A sampler's name and its options for `build_table`; what is left open, from the files."""
        name, options = settings.sampler, dict[str, Any]()
        if name == CHECKPOINT and self.sampler is not None:
            name, options = (
                self.sampler.sampler,
                self.sampler.arguments(self.schedule, settings.steps),
            )
        elif name == CHECKPOINT:
            name = DEFAULT_SAMPLER
            if self.no_sampler:
                warnings.warn(f"{self.no_sampler}; {name} is used instead", stacklevel=1)
        if settings.spacing is not None:
            options |= {"spacing": settings.spacing, "steps_offset": 0}
        for option in ("eta", "clamp"):
            if (value := getattr(settings, option)) is not None:
                options[option] = value
        return name, options

    def noise(self, seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Noise N(0, 1), a function of each sample's seed alone: (N, *shape)."""
        given = torch.tensor(list(seeds), dtype=torch.int64, device=self.device)
        noise = philox_normal(given, tuple(shape), step=0, stream=INITIAL_NOISE)
        return noise.to(self.sample_dtype)

    @torch.no_grad()
    def denoise(
        self,
        table: SamplerTable,
        x: Tensor,
        conditions: Sequence[Condition],
        unconditional: Sequence[Condition] | None,
        seeds: Sequence[int],
        *,
        settings: SampleSettings,
        extra: Tensor | None = None,
        hold: tuple[Tensor, Tensor, Tensor] | None = None,
        on_step: OnStep | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Run a table from x, for `settings.batch` samples at a time.

        x: (N, C, h, w) in `sample_dtype`, at the level of the table's first row. conditions,
        unconditional: one per sample. extra: (N, C', h, w), channels that the network reads behind
        x. hold: mask, known and noise, (N, ...) each; see `Request`. on_step, progress: see `run`.

        Returns (N, C, h, w).

        Raises:
            ValueError: the network's output is not finite.
        """
        mask, known, noise = hold or (None, None, None)

        def part(whole: Tensor | None, i: int) -> Tensor | None:
            return None if whole is None else whole[i]

        requests = [
            Request(
                table=table,
                x=x[i],
                seed=seed,
                condition=conditions[i],
                unconditional=None if unconditional is None else unconditional[i],
                extra=part(extra, i),
                mask=part(mask, i),
                known=part(known, i),
                noise=part(noise, i),
                tag=i,
            )
            for i, seed in enumerate(seeds)
        ]
        out = torch.empty_like(x)
        results = run(self.unet, requests, slots=settings.batch, on_step=on_step, progress=progress)
        for result in results:
            out[result.request.tag] = result.x
        return out

    @torch.no_grad()
    def encode(self, images: Tensor, *, tile: int | None = None) -> Tensor:
        """Images to the latents that are diffused: the mode of their distribution, scaled.

        images: (N, image_channels, H, W) in [-1, 1]. tile: as in `decode`.

        Returns (N, C, h, w) in `sample_dtype`, on the model's device.

        Raises:
            ValueError: images that the autoencoder does not take.
        """
        images = images.to(self.device)
        if self.autoencoder is None:
            return images.to(self.sample_dtype)
        encoder, factor = self.autoencoder, self.autoencoder.downsample_factor
        height, width = (side // factor for side in images.shape[2:])

        def run(piece: Tensor) -> Tensor:
            if tile is not None and max(height, width) > tile:
                return encoder.encode_tiled(piece, tile, tile // 4)
            return encoder.encode_latent(piece)

        block = block_size(max(height, 1), max(width, 1), self.device)
        z = in_blocks(run, block, images.to(self.autoencoder_dtype))
        return z.to(self.sample_dtype) * self.scale_factor

    @torch.no_grad()
    def decode(self, z: Tensor, *, tile: int | None = None) -> Tensor:
        """Turn what was sampled into images.

        z: (N, C, h, w), scaled. tile: latents with a longer side are decoded in tiles of it.

        Returns (N, image_channels, H, W) in `sample_dtype`, in [-1, 1], on z's device.

        Raises:
            ValueError: the decoder's result is not finite.
        """
        if self.autoencoder is None:
            return z.to(self.sample_dtype).clamp(-1, 1)
        decoder = self.autoencoder

        def run(piece: Tensor) -> Tensor:
            if tile is not None and max(piece.shape[2:]) > tile:
                return decoder.decode_tiled(piece, tile, tile // 4)
            return decoder.decode(piece)

        block = block_size(z.shape[2], z.shape[3], z.device)
        images = in_blocks(run, block, (z / self.scale_factor).to(self.autoencoder_dtype))
        if not images.isfinite().all():
            raise ValueError(
                f"the decoder returned NaN or infinity in {self.autoencoder_dtype}, expected "
                "finite pixels; decode in float32"
            )
        return images.to(self.sample_dtype).clamp(-1, 1)

    @torch.no_grad()
    def preview(self, z: Tensor) -> Tensor:
        """A cheap look at latents: a linear map of their channels to colours, pixel by pixel.

        z: (N, C, h, w), such as `Step.denoised`. Returns (N, image_channels, h, w) in [-1, 1].

        The map is fitted once to what the decoder makes of smooth random latents.
        """
        if self.autoencoder is None:
            return z.clamp(-1, 1)
        channels = z.movedim(1, -1)
        colours = F.pad(channels, (0, 1), value=1.0) @ self._preview_map.to(z)
        return colours.movedim(-1, 1).clamp(-1, 1)

    @cached_property
    def _preview_map(self) -> Tensor:
        """(C + 1, image_channels): least squares of mean colours on latents and 1."""
        assert self.autoencoder is not None
        channels = self.autoencoder.config.latent_channels
        coarse = self.noise(range(PREVIEW_LATENTS), (channels, 4, 4))
        z = 1.5 * F.interpolate(coarse, scale_factor=2, mode="bilinear")  # of deviation about 1
        images = F.avg_pool2d(self.decode(z), self.autoencoder.downsample_factor)
        known = F.pad(z.movedim(1, -1).flatten(0, 2), (0, 1), value=1.0)
        colours = images.movedim(1, -1).flatten(0, 2)
        return torch.linalg.lstsq(known.double().cpu(), colours.double().cpu()).solution


def stage_seeds(seeds: Sequence[int], stage: str) -> list[int]:
    """Seeds for a second pass, such as "upscale": no number of the first pass's noise recurs."""
    digests = (hashlib.blake2b(f"{stage} {seed}".encode(), digest_size=8) for seed in seeds)
    return [int.from_bytes(digest.digest(), "little") & MAX_SEED for digest in digests]


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise ValueError unless all are whole numbers from 0 to 2**63 - 1, at least one."""
    if not seeds:
        raise ValueError("expected at least one seed, got none; each seed is an image")
    for seed in seeds:
        if type(seed) is not int or not 0 <= seed <= MAX_SEED:
            raise ValueError(f"a seed must be a whole number from 0 to 2**63 - 1, got {seed!r:.40}")
