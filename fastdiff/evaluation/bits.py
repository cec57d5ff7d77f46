"""Negative log likelihood of held-out images, bounded from above, in bits per dimension (IDDPM)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastdiff.checkpoint.model import Model
from fastdiff.data.digits import CLASSES, GREY_LEVELS, SCAN_SIZE
from fastdiff.diffusion.bound import Bound, Variance, bound
from fastdiff.diffusion.levels import spaced_levels
from fastdiff.diffusion.plots import plot_bound
from fastdiff.diffusion.respacing import respacing_steps
from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.evaluation.classifier import reference_of
from fastdiff.files import write_text
from fastdiff.generate.job import SampleSettings
from fastdiff.generate.run import Progress
from fastdiff.kernels import SAMPLER_NOISE, philox_normal
from fastdiff.runtime.prepare import prepare

BATCH = 64
BITS, CURVE = "bits.json", "bits.png"
EIGHT_BITS = 2 / 255


@dataclass(frozen=True, kw_only=True)
class BitsPerDimension:
    """The bound on a set of images.

    Attributes:
        bound: its terms for each image.
        variance: which one the model's steps have.
        bin_width: distance between grey levels that the likelihood is of.
    """

    bound: Bound
    variance: Variance
    bin_width: float

    @property
    def mean(self) -> float:
        """Bits per dimension, the mean over images."""
        return float(self.bound.total.mean())

    @property
    def error(self) -> float:
        """Standard error of the mean over images."""
        total = self.bound.total
        return float(total.std() / math.sqrt(len(total))) if len(total) > 1 else math.nan

    @property
    def parts(self) -> dict[str, float]:
        """The prior term, the divergences, and the likelihood of the last step; they add up."""
        terms = self.bound.terms.mean(0)
        return {
            "prior": float(self.bound.prior.mean()),
            "divergences": float(terms[1:].sum()),
            "likelihood": float(terms[0]),
        }

    def to_json(self) -> dict[str, object]:
        """Contents of bits.json."""
        return {
            "bits_per_dimension": self.mean,
            "standard_error": self.error,
            "images": len(self.bound.prior),
            "variance": self.variance,
            "bin_width": self.bin_width,
            **self.parts,
            "timesteps": list(self.bound.timesteps),
            "terms": self.bound.terms.mean(0).tolist(),
        }


def digits_bits(
    model: Model,
    *,
    count: int | None = None,
    settings: SampleSettings | None = None,
    bin_width: float | None = None,
    first_seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> BitsPerDimension:
    """The bound on held-out digits (`reference_of`); the model is prepared for inference in place.

    count: how many of the 360, or of MNIST's 1,000; None: all. bin_width: None: 2 / 16 where the
    images are the scans themselves (8 x 8, 17 grey levels), else that of 8 bits. settings,
    first_seed, progress: as in `bits_per_dimension`.

    Raises:
        ValueError: a model that was not trained on digits, or of latents.
    """
    classes = None if model.denoiser is None else model.denoiser.config.num_classes
    if model.image_channels != 1 or classes not in (None, len(CLASSES)):
        raise ValueError(
            f"expected a model of grey digits, got {model.image_channels} channels and "
            f"{classes or 'no'} classes; evaluate a model trained on the digits"
        )
    reference = reference_of(model)
    images, labels = reference.held_out_images, reference.held_out_labels
    if bin_width is None:
        bin_width = 2 / (GREY_LEVELS - 1) if images.shape[-1] == SCAN_SIZE else EIGHT_BITS
    return bits_per_dimension(
        model,
        images[:count],
        labels[:count] if classes else None,
        settings=settings,
        bin_width=bin_width,
        first_seed=first_seed,
        device=device,
        progress=progress,
    )


def bits_per_dimension(
    model: Model,
    images: Tensor,
    labels: Tensor | None,
    *,
    bin_width: float,
    settings: SampleSettings | None = None,
    first_seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> BitsPerDimension:
    """The bound on -log2 p(image) per dimension, one network evaluation per image and timestep.

    Args:
        images: (N, C, H, W) in [-1, 1]. labels: (N,), for a model of classes.
        bin_width: distance between two grey levels.
        settings: with steps or spacing, the timesteps to visit; without both all of them. clamp
            bounds the estimate of x0 and is 1 if left out.
        first_seed: image i draws its noise from seed first_seed + i.
        progress: called with the timesteps done, and of how many, over all batches.

    The variance is the network's where it learned one, else the posterior's ("fixed_small").

    Raises:
        ValueError: a model of latents, whose bound says nothing about images, one of flow matching,
            or a spacing that is not one of whole timesteps.
    """
    if model.denoiser is None or model.schedule is None or model.autoencoder is not None:
        raise ValueError(
            f"bits per dimension are those of pixels, but {model.name} denoises latents or does "
            "not sample; train a model without autoencoder"
        )
    if model.prediction == "flow":
        raise ValueError(
            f"bits per dimension are a bound for models with betas, but {model.name} was trained "
            "by flow matching"
        )
    settings = settings or SampleSettings()
    schedule = NoiseSchedule(model.schedule)
    timesteps = _timesteps(schedule, settings)
    network = prepare(model.denoiser, device=device)
    variance: Variance = "learned" if network.config.learned_sigma else "fixed_small"
    parts: list[Bound] = []
    batches = range(0, len(images), BATCH)
    for number, start in enumerate(batches):
        x0 = images[start : start + BATCH].to(device)
        y = None if labels is None else labels[start : start + BATCH].to(device)
        seeds = torch.arange(len(x0), device=device) + first_seed + start

        def noise(index: int, seeds: Tensor = seeds) -> Tensor:
            return philox_normal(seeds, images.shape[1:], step=index, stream=SAMPLER_NOISE)

        def tell(done: int, total: int, number: int = number) -> None:
            if progress is not None:
                progress(number * total + done, len(batches) * total)

        parts.append(
            bound(
                lambda x, t, y=y: network(x, t, y=y),  # type: ignore[misc]
                schedule,
                x0,
                noise,
                prediction=model.prediction,
                variance=variance,
                bin_width=bin_width,
                timesteps=timesteps,
                clamp=1.0 if settings.clamp is None else settings.clamp,
                progress=tell,
            )
        )
    whole = Bound(
        timesteps=parts[0].timesteps,
        terms=torch.cat([part.terms for part in parts]),
        prior=torch.cat([part.prior for part in parts]),
    )
    return BitsPerDimension(bound=whole, variance=variance, bin_width=bin_width)


def write_bits(result: BitsPerDimension, folder: Path) -> Path:
    """Write bits.json and the curve of the terms, bits.png. Returns the path of bits.json."""
    path = folder / BITS
    write_text(path, json.dumps(result.to_json(), indent=2) + "\n")
    plot_bound([("", result.bound)], folder / CURVE)
    return path


def _timesteps(schedule: NoiseSchedule, settings: SampleSettings) -> Sequence[int] | None:
    if settings.steps is None and settings.spacing is None:
        return None
    spacing = settings.spacing or "trailing"
    steps = settings.steps or respacing_steps(spacing)
    if steps is None:
        raise ValueError(f"spacing {spacing!r} needs steps too; give both, or neither for all")
    levels = [level.t for level in spaced_levels(schedule, steps, spacing)]
    if any(t != int(t) for t in levels):
        raise ValueError(
            f"the bound visits whole timesteps, got spacing {spacing!r} with t = "
            f"{next(t for t in levels if t != int(t)):g}; use 'trailing' or a string like '25'"
        )
    return [int(t) for t in levels]
