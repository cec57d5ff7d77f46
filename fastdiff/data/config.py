"""Typed description of a data set."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fastdiff.data.augment import AugmentConfig

Source = Literal["digits", "folder", "shards"]
Split = Literal["train", "held-out"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Images, their size and their augmentation."""

    source: Source = "digits"
    """digits: scikit-learn's handwritten digits; folder: image files, one sub-folder per class;
    shards: webdataset .tar files."""

    path: str = ""
    """A folder of images, a shard, or a pattern such as data/train-*.tar."""

    image_size: int = 32
    """Side of the square images in pixels: the shorter side is resized to it, the rest is cropped.
    """

    channels: int = 1
    """1: grey, 3: RGB."""

    split: Split = "train"
    """Which part of the digits to use; folders and shards are always used in full."""

    background: tuple[int, int, int] = (255, 255, 255)
    """RGB colour, 0 to 255, behind transparent pixels."""

    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Random changes to each image, drawn again every epoch."""

    def __post_init__(self) -> None:
        if self.source not in ("digits", "folder", "shards"):
            raise ValueError(f"data source must be digits, folder or shards, got {self.source!r}")
        if self.channels not in (1, 3):
            raise ValueError(f"data channels must be 1 (grey) or 3 (RGB), got {self.channels}")
        if self.image_size < 1:
            raise ValueError(f"image_size must be at least 1 pixel, got {self.image_size}")
        if self.split not in ("train", "held-out"):
            raise ValueError(f"split must be train or held-out, got {self.split!r}")
        if len(self.background) != 3 or any(not 0 <= level <= 255 for level in self.background):
            raise ValueError(
                f"background must be three numbers from 0 to 255, got {self.background}"
            )
        if self.source == "digits" and self.path:
            raise ValueError(
                f"path must be empty with source 'digits', got {self.path!r}; "
                "use source='folder' or source='shards'"
            )
        if self.source == "digits" and self.channels != 1:
            raise ValueError(f"channels must be 1 for the grey digits, got {self.channels}")
        if self.source != "digits" and not self.path:
            raise ValueError(f"source {self.source!r} needs a path; set path to your images")
