"""Decode an image file of any format to uint8 pixels of a fixed size."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastdiff.data.config import DataConfig
from fastdiff.images import open_flat, resize


def decode(source: Path | bytes, config: DataConfig) -> np.ndarray:
    """Read, orient, flatten, crop and resize one image.

    Animations are reduced to the first frame. The EXIF orientation is applied. Transparent pixels
    are composited onto `config.background`. 16-bit grey is rounded to 8 bits, CMYK and palettes
    become RGB. The largest centred square is resized with Pillow's antialiased bicubic filter.

    Args:
        source: a file, or its bytes.
        config: size, channels and background.

    Returns:
        (C, H, W) uint8.

    Raises:
        Exception: the file is damaged, of an unknown format, or suspiciously large; Pillow's
            plugins raise many types (`UNREADABLE`).
    """
    flat = open_flat(source, config.background).convert("L" if config.channels == 1 else "RGB")
    size = (config.image_size, config.image_size)
    square = resize(flat, *size)
    pixels = np.asarray(square, dtype=np.uint8).reshape(*size, config.channels)
    return pixels.transpose(2, 0, 1)
