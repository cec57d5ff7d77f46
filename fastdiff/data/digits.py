"""scikit-learn's handwritten digits: 1,797 real scans of 8x8 pixels in 17 grey levels.

From E. Alpaydin, C. Kaynak, "Optical recognition of handwritten digits", UCI, 1998 (test part).
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.data.config import DataConfig, Split
from fastdiff.data.dataset import ImageDataset
from fastdiff.data.order import derive_seed
from fastdiff.extras import import_extra

CLASSES = tuple(str(digit) for digit in range(10))
HELD_OUT = 360
SCAN_SIZE = 8
GREY_LEVELS = 17
_SPLIT_SEED = 0


def digits_split(split: Split, *, image_size: int = 32) -> tuple[Tensor, Tensor]:
    """One part of the digits, enlarged.

    Args:
        split: "train" (1,437 images) or "held-out" (360).
        image_size: side that the images are resized to (bicubic); 8 returns the original scans.

    Returns:
        Images (N, 1, image_size, image_size), fp32 in [-1, 1], and labels (N,) int64.
    """
    scans, labels = _scans()
    chosen = held_out_mask(labels, HELD_OUT, name="digits-split")
    chosen = chosen if split == "held-out" else ~chosen
    images = scans[chosen]
    if image_size != SCAN_SIZE:
        size = (image_size, image_size)
        images = F.interpolate(images, size, mode="bicubic", antialias=image_size < SCAN_SIZE)
    return images.clamp(-1, 1), labels[chosen]


def held_out_mask(labels: Tensor, count: int, *, name: str) -> Tensor:
    """Mask (N,) of `count` held-out images, with classes in proportion (largest remainder method).

    Within a class, images are ordered by a hash of the split's name and their index, so that the
    split does not depend on any library's random number generator.
    """
    counts = torch.bincount(labels)
    shares = counts.double() * count / len(labels)
    quotas = shares.floor().long()
    by_remainder = torch.argsort(shares - quotas, descending=True, stable=True)
    quotas[by_remainder[: count - int(quotas.sum())]] += 1
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for digit, quota in enumerate(quotas.tolist()):
        members = torch.nonzero(labels == digit).flatten().tolist()
        members.sort(key=lambda index: derive_seed(_SPLIT_SEED, name, index))
        mask[members[:quota]] = True
    return mask


def open_digits(config: DataConfig) -> ImageDataset:
    """The digits as a data set."""
    images, labels = digits_split(config.split, image_size=config.image_size)
    return ImageDataset(images, labels, CLASSES)


@functools.cache
def _scans() -> tuple[Tensor, Tensor]:
    raw = import_extra("sklearn.datasets", extra="train").load_digits()
    scans = torch.from_numpy(raw.images).float().unsqueeze(1)  # (1797, 1, 8, 8), 0 to 16
    return scans / ((GREY_LEVELS - 1) / 2) - 1, torch.from_numpy(raw.target).long()
