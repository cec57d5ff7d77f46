"""From classes and seeds to images: latent diffusion, or pixel diffusion without a decoder.

seeds -> noise -> table rows: Denoiser, sampler_step -> z / scale_factor -> decode -> images
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastdiff
from fastdiff.checkpoint.bundle import Bundle, ModelConfig
from fastdiff.checkpoint.config import from_dict, to_dict
from fastdiff.diffusion.guidance import GuidanceConfig
from fastdiff.diffusion.samplers import SAMPLERS, SPACINGS, SamplerTable, build_table
from fastdiff.diffusion.sampling import sample
from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.kernels.dispatch import selected_backend
from fastdiff.models.autoencoder import Autoencoder
from fastdiff.models.unet import UNet
from fastdiff.runtime import Denoiser, block_size, check_label, in_blocks, prepare

MAX_SEED = 2**63 - 1
NOT_IN_RECIPE = ("batch",)  # changes memory and time, not the image

Progress = Callable[[int, int], None]
"""Called as progress(done, total) after each network evaluation of a pass."""


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """How to get from noise to an image; the defaults suit the shipped digits."""

    sampler: str = "dpmpp-2m"
    """One of fastdiff.diffusion.samplers.SAMPLERS; 'fastdiff samplers' lists them."""
    steps: int = 50
    """Steps from noise to image."""
    eta: float | None = None
    """Noise added back per step, for samplers that have it; None: the sampler's own default."""
    guidance_scale: float = 1.5
    """1: the conditional model as it is, at half the cost; more: nearer to the class."""
    guidance_rescale: float = 0.0
    """phi of Lin et al. 2023 in [0, 1]: against the over-exposure of strong guidance."""
    guidance_interval: tuple[int, int] | None = None
    """Steps [first, stop) that are guided, from 0, the noisiest; None: all."""
    spacing: str = "trailing"
    """Where the steps lie: trailing, leading, linspace, simple, karras or exponential."""
    clamp: float | None = None
    """Bound on the estimate of x0; 1 for pixel models, None for latents."""
    tile: int | None = 96
    """Latents with a longer side are decoded in tiles of this side; None: never."""
    batch: int = 64
    """Images at once: bounds memory, has no influence on the images."""

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(
                f"unknown sampler {self.sampler!r}; expected one of {', '.join(SAMPLERS)}"
            )
        if self.spacing not in SPACINGS:
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


class LatentDiffusion:
    """A trained model that makes images; on pixels where it has no autoencoder.

    On the CPU an image depends on its class, its seed and the settings only, bit for bit: not on
    the number of images, its place among them, or ``settings.batch``.
    """

    def __init__(
        self,
        config: ModelConfig,
        unet: UNet,
        autoencoder: Autoencoder | None = None,
        *,
        weights_hash: str = "",
        name: str = "",
    ) -> None:
        """The modules are made ready for inference in place, with the unet's device and dtype."""
        if config.schedule is None:
            raise ValueError("sampling needs the noise schedule of the training, got None")
        weight = next(unet.parameters())
        self.config, self.weights_hash, self.name = config, weights_hash, name
        self.device, self.dtype = weight.device, weight.dtype
        self.unet = prepare(unet, device=self.device, dtype=self.dtype)
        self.autoencoder = autoencoder
        if autoencoder is not None:
            prepare(autoencoder, device=self.device, dtype=self.dtype)
        self.schedule = NoiseSchedule(config.schedule)

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> LatentDiffusion:
        """Raises ValueError if the bundle holds an autoencoder only."""
        if bundle.unet is None:
            raise ValueError(
                f"{bundle.folder} holds an autoencoder only, expected a denoiser (unet) too; "
                "train one with 'fastdiff train diffusion'"
            )
        return cls(
            bundle.config,
            bundle.unet,
            bundle.autoencoder,
            weights_hash=bundle.weights_hash,
            name=bundle.name,
        )

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of what is diffused: latents, or pixels."""
        size, ae = self.config.image_size, self.autoencoder
        if ae is None:
            return self.config.image_channels, size, size
        side = size // ae.downsample_factor
        return ae.config.latent_channels, side, side

    @torch.no_grad()
    def __call__(
        self,
        classes: Sequence[int | None],
        seeds: Sequence[int],
        settings: SampleSettings | None = None,
        *,
        progress: Progress | None = None,
    ) -> Tensor:
        """Make one image per (class, seed).

        classes: class indices, or None for no class. seeds: as many, from 0 to 2**63 - 1.
        progress: called as progress(done, total) after each network evaluation, over all passes.

        Returns (N, image_channels, H, W) fp32 on the CPU, in [-1, 1].

        Raises:
            ValueError: classes, seeds or settings that do not fit the model, or a result that is
                not finite.
        """
        settings = settings or SampleSettings()
        z = self.latents(classes, seeds, settings, progress=progress)
        parts = z.split(settings.batch)
        return torch.cat([self.decode(part, tile=settings.tile).cpu() for part in parts])

    @torch.no_grad()
    def latents(
        self,
        classes: Sequence[int | None],
        seeds: Sequence[int],
        settings: SampleSettings | None = None,
        *,
        progress: Progress | None = None,
    ) -> Tensor:
        """The same before decoding: (N, *sample_shape) fp32, on the model's device."""
        settings = settings or SampleSettings()
        check_seeds(classes, seeds)
        config = self.unet.config
        for label in classes:
            check_label(label, config.num_classes, config.null_class)
        table = self.table(settings)
        guided = any(table.guided)
        total = math.ceil(len(seeds) / settings.batch) * len(table)
        done = 0

        def on_step(*_: Any) -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, total)

        passes = []
        for start in range(0, len(seeds), settings.batch):
            chosen = slice(start, start + settings.batch)
            denoiser = Denoiser(
                self.unet,
                table.timesteps,
                classes[chosen],
                guided=guided,
                block=block_size(*self.sample_shape[1:], self.device),
            )

            def predict(x: Tensor, t: float, guided: bool, call: Denoiser = denoiser) -> Tensor:
                prediction = call(x, t, guided)
                on_step()
                return prediction

            passes.append(
                sample(
                    predict,
                    table,
                    self.sample_shape,
                    torch.tensor(seeds[chosen], dtype=torch.int64, device=self.device),
                    guidance_rescale=settings.guidance_rescale,
                )
            )
        return torch.cat(passes)

    @torch.no_grad()
    def decode(self, z: Tensor, *, tile: int | None = 96) -> Tensor:
        """Turn what was sampled into images.

        z: (N, *sample_shape), scaled. tile: latents with a longer side are decoded in tiles of it.

        Returns (N, image_channels, H, W) fp32 in [-1, 1], on z's device.

        Raises:
            ValueError: the decoder's result is not finite.
        """
        if self.autoencoder is None:
            return z.float().clamp(-1, 1)
        decoder = self.autoencoder

        def run(piece: Tensor) -> Tensor:
            if tile is not None and max(piece.shape[2:]) > tile:
                return decoder.decode_tiled(piece, tile, tile // 4)
            return decoder.decode(piece)

        block = block_size(z.shape[2], z.shape[3], z.device)
        images = in_blocks(run, block, (z / self.config.scale_factor).to(self.dtype)).float()
        if not images.isfinite().all():
            raise ValueError(
                f"the decoder returned NaN or infinity in {self.dtype}, expected finite pixels; "
                "decode in float32"
            )
        return images.clamp(-1, 1)

    def recipe(self, label: int | None, seed: int, settings: SampleSettings) -> dict[str, Any]:
        """Everything that one image depends on; JSON-able. :func:`from_recipe` reads it."""
        kept = {k: v for k, v in to_dict(settings).items() if k not in NOT_IN_RECIPE}
        names = self.config.class_names
        return {
            "fastdiff": fastdiff.__version__,
            "torch": torch.__version__,
            "model": self.name,
            "weights": self.weights_hash,
            "backend": selected_backend(),
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "class": label,
            "class_name": names[label] if label is not None and names else None,
            "seed": seed,
            "settings": kept,
        }

    def table(self, settings: SampleSettings) -> SamplerTable:
        """The sampler's rows for this model."""
        options: dict[str, Any] = {} if settings.eta is None else {"eta": settings.eta}
        if settings.sampler == "ddpm" and self.unet.config.learned_sigma:
            options["variance"] = "learned"
        return build_table(
            settings.sampler,
            self.schedule,
            settings.steps,
            prediction=self.config.prediction,
            spacing=settings.spacing,  # type: ignore[arg-type]
            clamp=settings.clamp,
            guidance_scale=settings.guidance_scale,
            guidance_interval=settings.guidance_interval,
            **options,
        )


def from_recipe(
    recipe: Mapping[str, Any], *, weights_hash: str | None = None
) -> tuple[int | None, int, SampleSettings]:
    """Read a recipe back: (class, seed, settings).

    weights_hash: of the model at hand; None skips the comparison.

    Raises:
        ValueError: a field is missing, unknown or wrong, or the image was made by other weights.
    """
    for key in ("seed", "class", "settings", "weights"):
        if key not in recipe:
            raise ValueError(
                f"the recipe lacks {key!r}; give an image written by 'fastdiff sample'"
            )
    if weights_hash is not None and recipe["weights"] != weights_hash:
        raise ValueError(
            f"the image was made by weights {str(recipe['weights'])[:12]} "
            f"(model {recipe.get('model')!r}), got {weights_hash[:12]}; give that model"
        )
    label, seed = recipe["class"], recipe["seed"]
    check_seeds([label], [seed])
    if label is not None and type(label) is not int:
        raise ValueError(f"the recipe's class must be a whole number or null, got {label!r:.40}")
    return label, seed, from_dict(SampleSettings, recipe["settings"])


def check_seeds(classes: Sequence[int | None], seeds: Sequence[int]) -> None:
    """Raise ValueError unless there is one whole number from 0 to 2**63 - 1 per class."""
    if len(classes) != len(seeds) or not seeds:
        raise ValueError(
            f"expected as many seeds as classes, at least one, got {len(seeds)} and {len(classes)}"
        )
    for seed in seeds:
        if type(seed) is not int or not 0 <= seed <= MAX_SEED:
            raise ValueError(f"a seed must be a whole number from 0 to 2**63 - 1, got {seed!r:.40}")
