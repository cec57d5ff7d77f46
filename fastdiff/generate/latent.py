"""From classes and seeds to images: latent diffusion, or pixel diffusion without a decoder.

seeds -> noise -> requests to the engine -> z / scale_factor -> decode -> images
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import fastdiff
from fastdiff.checkpoint.model import Model
from fastdiff.configs import from_dict, to_dict
from fastdiff.generate.core import Core, Progress, SampleSettings, check_seeds
from fastdiff.kernels.choose import selected_backend
from fastdiff.runtime.conditions import class_conditions

NOT_IN_RECIPE = ("batch",)  # changes memory and time, not the image


class LatentDiffusion:
    """A trained model that makes images; on pixels where it has no autoencoder.

    On the CPU an image depends on its class, its seed and the settings only, bit for bit: not on
    the number of images, its place among them, or ``settings.batch``.
    """

    def __init__(self, model: Model) -> None:
        """The modules are made ready for inference in place, with the denoiser's device and dtype.

        Raises:
            ValueError: the model has no denoiser, or does not say with what noise it was trained.
        """
        if model.denoiser is None:
            raise ValueError(
                f"{model.path} holds an autoencoder only, expected a denoiser too; "
                "train one with 'fastdiff train diffusion'"
            )
        if model.schedule is None:
            raise ValueError("sampling needs the noise schedule of the training, got None")
        self.model, self.name = model, model.name
        self.unet, self.autoencoder = model.denoiser, model.autoencoder
        self.core = Core(
            model.denoiser,
            model.autoencoder,
            model.schedule,
            prediction=model.prediction,
            scale_factor=model.scale_factor,
            sampler=model.sampler,
            no_sampler=str(model.provenance.get("no_sampler", "")),
        )
        self.table = self.core.table

    @property
    def weights_hash(self) -> str:
        return self.model.weights_hash

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of what is diffused: latents, or pixels."""
        size, ae = self.model.image_size, self.autoencoder
        if size is None:
            raise ValueError(
                f"{self.model.path} does not say for which size it was trained; load it with "
                "image_size="
            )
        if ae is None:
            assert self.model.image_channels is not None
            return self.model.image_channels, size, size
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
        check_classes(classes, seeds)
        table = self.table(settings)
        conditions, unconditional = class_conditions(
            self.unet.config, classes, guided=any(table.guided)
        )
        return self.core.denoise(
            table,
            self.core.noise(seeds, self.sample_shape),
            conditions,
            unconditional,
            seeds,
            settings=settings,
            progress=progress,
        )

    def decode(self, z: Tensor, *, tile: int | None = 96) -> Tensor:
        """Turn what was sampled into images; see `Core.decode`. z: (N, *sample_shape), scaled."""
        return self.core.decode(z, tile=tile)

    def recipe(self, label: int | None, seed: int, settings: SampleSettings) -> dict[str, Any]:
        """Everything that one image depends on; JSON-able. :func:`from_recipe` reads it."""
        kept = {k: v for k, v in to_dict(settings).items() if k not in NOT_IN_RECIPE}
        names = self.model.class_names
        return {
            "fastdiff": fastdiff.__version__,
            "torch": torch.__version__,
            "model": self.name,
            "weights": self.weights_hash,
            "backend": selected_backend(),
            "device": self.core.device.type,
            "dtype": str(self.core.dtype).removeprefix("torch."),
            "class": label,
            "class_name": names[label] if label is not None and names else None,
            "seed": seed,
            "settings": kept,
        }


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
    check_classes([label], [seed])
    if label is not None and type(label) is not int:
        raise ValueError(f"the recipe's class must be a whole number or null, got {label!r:.40}")
    return label, seed, from_dict(SampleSettings, recipe["settings"])


def check_classes(classes: Sequence[int | None], seeds: Sequence[int]) -> None:
    """Raise ValueError unless there is one whole number from 0 to 2**63 - 1 per class."""
    if len(classes) != len(seeds) or not seeds:
        raise ValueError(
            f"expected as many seeds as classes, at least one, got {len(seeds)} and {len(classes)}"
        )
    check_seeds(seeds)
