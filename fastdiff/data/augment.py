"""Small random affine transforms, a pure function of (seed, epoch, index).

There is no state: image `index` looks the same in epoch `epoch` whatever was drawn before and
whatever its batch contains, so a resumed run sees the same pixels as an uninterrupted one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.kernels import philox4x32

_KEY_TAG = 0x41554731  # "AUG1": keeps these numbers distinct from the noise of the images' seeds
_UNIFORM_SCALE = 2.0**-32


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Ranges of the random affine transforms; all zero means no augmentation."""

    shift: float = 0.0
    """Largest shift along each axis, in pixels."""

    rotation: float = 0.0
    """Largest rotation in either direction, in degrees."""

    scale: float = 0.0
    """Largest relative change of size: 0.1 scales by 0.9 to 1.1, independently for each axis."""

    shear: float = 0.0
    """Largest horizontal shear in either direction, in degrees."""

    flip: bool = False
    """Flip half of the images horizontally."""

    probability: float = 1.0
    """Fraction of images that are transformed; the others are left unchanged."""

    fill: Literal["black", "border", "reflection"] = "black"
    """How pixels outside the image are filled."""

    def __post_init__(self) -> None:
        for name in ("shift", "rotation", "scale", "shear"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"augment {name} must be 0 or more, got {getattr(self, name)}")
        if self.scale >= 1:
            raise ValueError(f"augment scale must be below 1, got {self.scale}")
        if self.rotation > 180 or self.shear >= 90:
            raise ValueError(
                f"augment rotation must be at most 180 and shear below 90 degrees, "
                f"got {self.rotation} and {self.shear}"
            )
        if not 0 <= self.probability <= 1:
            raise ValueError(f"augment probability must be in [0, 1], got {self.probability}")
        if self.fill not in ("black", "border", "reflection"):
            raise ValueError(f"augment fill must be black, border or reflection, got {self.fill!r}")

    @property
    def enabled(self) -> bool:
        """Whether any image may change."""
        ranges = self.shift or self.rotation or self.scale or self.shear or self.flip
        return bool(ranges) and self.probability > 0


def augment(
    images: Tensor, indices: Tensor, epochs: Tensor, *, seed: int, config: AugmentConfig
) -> Tensor:
    """Rotate, scale, shear, shift and flip each image by its own random amounts.

    Args:
        images: (N, C, H, W), fp32 in [-1, 1].
        indices: (N,) int64, the index of each image in the data set.
        epochs: (N,) int64, the epoch in which each image is used.
        seed: the run's seed.
        config: the ranges.

    Returns:
        (N, C, H, W), fp32 in [-1, 1]; images that are not transformed keep their bits.
    """
    if not config.enabled or not len(images):
        return images
    height, width = images.shape[-2:]
    u = uniforms(indices, epochs, seed=seed).to(images.device)  # (N, 8)
    spread = 2 * u - 1
    angle = torch.deg2rad(spread[:, 0] * config.rotation)
    shear = torch.tan(torch.deg2rad(spread[:, 1] * config.shear))
    scale_x = 1 + spread[:, 2] * config.scale
    scale_y = 1 + spread[:, 3] * config.scale
    shift_x = spread[:, 4] * config.shift * 2 / width  # affine_grid's axes run from -1 to 1
    shift_y = spread[:, 5] * config.shift * 2 / height
    mirror = torch.where((u[:, 6] < 0.5) & config.flip, -1.0, 1.0)
    change = u[:, 7] < config.probability

    # theta maps output to input coordinates: rotate(shear(scale(position))) - shift
    cos, sin = torch.cos(angle), torch.sin(angle)
    aspect = height / width
    row_x = torch.stack(
        [cos / scale_x * mirror, (cos * shear - sin) / scale_y * aspect, -shift_x], dim=1
    )
    row_y = torch.stack(
        [sin / scale_x * mirror / aspect, (sin * shear + cos) / scale_y, -shift_y], dim=1
    )
    theta = torch.stack([row_x, row_y], dim=1).to(images.dtype)  # (N, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    padding = "zeros" if config.fill == "black" else config.fill
    # +1 moves black to zero, the value of the padding; bicubic keeps the strokes sharp
    moved = F.grid_sample(
        images + 1, grid, mode="bicubic", padding_mode=padding, align_corners=False
    )
    moved = (moved - 1).clamp(-1, 1)
    return torch.where(change[:, None, None, None], moved, images)


def uniforms(indices: Tensor, epochs: Tensor, *, seed: int) -> Tensor:
    """Eight uniform numbers in [0, 1) per (seed, epoch, index), from Philox4x32-10.

    Args:
        indices: (N,) int64.
        epochs: (N,) int64.
        seed: any 64-bit number.

    Returns:
        (N, 8) fp32.
    """
    mask = 0xFFFFFFFF
    zeros = torch.zeros_like(indices)
    # the upper half of the index shares a word with the block number, which limits it to 2^63
    counters = torch.stack(
        [
            torch.stack([indices & mask, (indices >> 32) * 2 + block, epochs & mask, zeros], dim=1)
            for block in (0, 1)
        ],
        dim=1,
    )  # (N, 2, 4)
    key = torch.tensor([seed & mask, ((seed >> 32) & mask) ^ _KEY_TAG])
    words = philox4x32(counters, key.expand(len(indices), 2, 2))  # (N, 2, 4)
    return ((words >> 8).float() * (_UNIFORM_SCALE * 256)).reshape(len(indices), 8)
