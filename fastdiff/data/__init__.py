"""Training images: digits, part of MNIST, captioned emoji and scenes, folders, shards."""

from __future__ import annotations

from fastdiff.data.augment import AugmentConfig, augment
from fastdiff.data.config import DataConfig
from fastdiff.data.dataset import ImageDataset, Skipped
from fastdiff.data.digits import digits_split, open_digits
from fastdiff.data.emoji import open_emoji
from fastdiff.data.folder import describe_folder, open_folder
from fastdiff.data.mnist import mnist_split, open_mnist
from fastdiff.data.order import DataOrder, derive_seed, generator
from fastdiff.data.scenes import open_scenes
from fastdiff.data.shards import open_shards
from fastdiff.files import one_line_errors

__all__ = [
    "AugmentConfig",
    "DataConfig",
    "DataOrder",
    "ImageDataset",
    "Skipped",
    "augment",
    "derive_seed",
    "describe_folder",
    "digits_split",
    "generator",
    "mnist_split",
    "open_dataset",
    "open_digits",
    "open_emoji",
    "open_folder",
    "open_mnist",
    "open_scenes",
    "open_shards",
]


@one_line_errors()
def open_dataset(config: DataConfig) -> ImageDataset:
    """Open the data set that `config` describes."""
    openers = {
        "digits": open_digits,
        "mnist-5k": open_mnist,
        "emoji": open_emoji,
        "scenes": open_scenes,
        "folder": open_folder,
        "shards": open_shards,
    }
    return openers[config.source](config)
