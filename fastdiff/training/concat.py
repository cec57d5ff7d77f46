"""Pictures as conditions, concatenated to x (Rombach et al. 2022, section 3.3).

What the channels contain is in `fastdiff.models.concat`; sampling computes them there too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from fastdiff.data import augment, generator
from fastdiff.data.config import SKETCHED_SOURCES, DataConfig
from fastdiff.data.dataset import to_float
from fastdiff.data.scenes import open_sketches
from fastdiff.models.concat import erased, inpainting_channels, sketch_channels
from fastdiff.training.latents import Latents

ConcatKind = Literal["none", "inpainting", "sketch"]
SHAPES = 3
"""Most rectangles and strokes of a mask."""


@dataclass(frozen=True, kw_only=True)
class ConcatConfig:
    """A picture that the denoiser reads in further input channels."""

    kind: ConcatKind = "none"
    """inpainting: the image without a random part, and the mask of that part; sketch: the outlines
    of a scene."""

    dropout: float = 0.1
    """Fraction of the pictures that say nothing: masks that cover the whole image, blank sketches.
    """

    def __post_init__(self) -> None:
        if self.kind not in get_args(ConcatKind):
            raise ValueError(f"concat kind must be none, inpainting or sketch, got {self.kind!r}")
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"concat dropout must be in [0, 1], got {self.dropout}")


class Concat:
    """The concatenated channels of any step, as a function of (data, seed, step)."""

    def __init__(self, config: ConcatConfig, latents: Latents) -> None:
        """config: of a kind other than none."""
        self.config, self.latents, self.batches = config, latents, latents.batches
        self.sketches: Tensor | None = None
        if config.kind == "sketch":
            self.sketches = open_sketches(self.batches.config)

    def batch(self, step: int, rows: Tensor | None = None) -> Tensor:
        """The channels (N, K, h, w) that belong to x0 of a step; rows: only of these rows."""
        indices, views = self.latents.views_of(step, rows)
        size, seed = self.batches.order.batch_size, self.batches.seed
        mine = slice(None) if rows is None else rows
        source = generator(seed, "concat-dropout", step)
        dropped = torch.rand(size, generator=source)[mine] < self.config.dropout
        if self.sketches is not None:
            drawn = augment(
                to_float(self.sketches[indices]),
                indices,
                views,
                seed=seed,
                config=self.batches.config.augment,
            )
            return self._sketched(drawn, dropped)
        masks = random_masks(size, self._side, generator(seed, "masks", step))[mine]
        return self._erased(self.batches.augmented(indices, views), masks, dropped)

    def examples(self, places: Tensor) -> Tensor:
        """The channels (N, K, h, w) of images of the data for a preview, none of them dropped.

        places: (N,) int64, the images.
        """
        kept = torch.zeros(len(places), dtype=torch.bool)
        if self.sketches is not None:
            return self._sketched(to_float(self.sketches[places]), kept)
        source = generator(self.batches.seed, "masks of previews")
        masks = random_masks(len(places), self._side, source)
        images = self.batches.dataset.batch(places)[0].to(self.batches.device)
        return self._erased(images, masks, kept)

    @property
    def _side(self) -> int:
        return self.batches.config.image_size

    def _sketched(self, sketches: Tensor, dropped: Tensor) -> Tensor:
        """sketches: (N, 1, H, W) in [-1, 1]. dropped: (N,) bool."""
        blank = torch.where(dropped[:, None, None, None], 1.0, sketches)
        return sketch_channels(blank.to(self.batches.device), self.latents.factor)

    def _erased(self, images: Tensor, masks: Tensor, dropped: Tensor) -> Tensor:
        """images: (N, C, H, W) in [-1, 1]. masks: (N, 1, H, W). dropped: (N,) bool."""
        whole = torch.where(dropped[:, None, None, None], 1.0, masks).to(images)
        kept = self.latents.encode(erased(images, whole))
        return inpainting_channels(kept, whole, pixels=self.latents.autoencoder is None)


def random_masks(count: int, side: int, source: torch.Generator) -> Tensor:
    """Random masks of one to three rectangles and thick strokes, 1 where the image is to be
    replaced: (count, 1, side, side) fp32, on the CPU.

    Rectangles have half sides of 0.1 to 0.35 of the image's, strokes run between two random points
    with half a width of 0.07 to 0.17. Every mask covers a pixel.
    """
    u = torch.rand(count, SHAPES, 8, 1, 1, generator=source)
    centres = (torch.arange(side) + 0.5) / side
    y, x = centres[:, None], centres[None, :]
    least = 0.75 / side  # so that a shape between pixel centres covers one
    wide, high = ((0.1 + 0.25 * u[:, :, at]).clamp(min=least) for at in (2, 3))
    rectangle = ((x - u[:, :, 0]).abs() < wide) & ((y - u[:, :, 1]).abs() < high)
    stroke = _distance(x, y, u) < (0.07 + 0.1 * u[:, :, 4]).clamp(min=least)
    shape = torch.where(u[:, :, 5] < 0.5, rectangle, stroke)
    used = u[:, :, 6] < 0.5
    used[:, 0] = True
    return (shape & used).any(1, keepdim=True).float()


def _distance(x: Tensor, y: Tensor, u: Tensor) -> Tensor:
    """Distance of points to the segments from (u0, u1) to (u2, u3)."""
    from_x, from_y, to_x, to_y = (u[:, :, at] for at in range(4))
    along_x, along_y = to_x - from_x, to_y - from_y
    length = (along_x.square() + along_y.square()).clamp(min=1e-12)
    share = ((x - from_x) * along_x + (y - from_y) * along_y) / length
    share = share.clamp(0, 1)
    return torch.hypot(x - from_x - share * along_x, y - from_y - share * along_y)


def check_concat(concat: ConcatConfig, data: DataConfig, low_resolution: int) -> None:
    """Raise ValueError unless a run's concatenated picture and its data belong together."""
    if concat.kind == "none":
        return
    if low_resolution:
        raise ValueError(
            f"low_resolution {low_resolution} and concat kind {concat.kind!r} both add input "
            "channels; leave one of them out"
        )
    if concat.kind == "sketch" and data.source not in SKETCHED_SOURCES:
        raise ValueError(
            f"concat kind 'sketch' needs data with sketches, and source {data.source!r} has none; "
            f"use {' or '.join(SKETCHED_SOURCES)}"
        )
