"""One image file of any kind -> uint8 pixels of one size."""

from __future__ import annotations

import functools
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fastdiff.data.config import DataConfig

# Garbled files make Pillow's plugins raise OSError, ValueError, SyntaxError, struct.error (WebP),
# RuntimeError (AVIF), NotImplementedError (DDS), AttributeError (SPIDER) and more: whatever it is,
# one bad file must not end a run.
UNREADABLE = Exception
_SIXTEEN_BIT = ("I", "I;16", "I;16L", "I;16B", "I;16N")


def decode(source: Path | bytes, config: DataConfig) -> np.ndarray:
    """Read, turn upright, flatten, resize and crop one image.

    The first frame of an animation counts. EXIF orientation is applied. Transparent pixels lie on
    `config.background`. 16-bit grey is rounded to 8 bits, CMYK and palettes become RGB. The largest
    centred square is resized with Pillow's antialiased bicubic filter.

    Args:
        source: a file, or its bytes.
        config: size, channels and background.

    Returns:
        (C, H, W) uint8.

    Raises:
        any of `UNREADABLE`: the file is damaged, of an unknown kind, or too large to be true.
    """
    flat = open_flat(source, config.background).convert("L" if config.channels == 1 else "RGB")
    size = (config.image_size, config.image_size)
    square = resize(flat, *size)
    pixels = np.asarray(square, dtype=np.uint8).reshape(*size, config.channels)
    return pixels.transpose(2, 0, 1)


def open_flat(source: Path | bytes, background: tuple[int, int, int]) -> Image.Image:
    """The first frame of an image file, upright, 8 bits per channel, without transparency.

    Raises:
        any of `UNREADABLE`: as `decode`.
    """
    if isinstance(source, Path) and source.exists() and not source.is_file():
        raise ValueError("not a regular file")  # opening a named pipe would wait for ever
    stream = io.BytesIO(source) if isinstance(source, bytes) else source
    with Image.open(stream, formats=_formats()) as image:
        image.seek(0)
        image.load()
        return _flatten(ImageOps.exif_transpose(image), background)


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """The largest centred part of those proportions, with Pillow's antialiased bicubic filter."""
    # not more than the image by a rounding: Pillow would refuse that
    across = min(image.width, image.height * width / height)
    down = min(image.height, image.width * height / width)
    left, top = (image.width - across) / 2, (image.height - down) / 2
    box = (left, top, left + across, top + down)
    return image.resize((width, height), Image.Resampling.BICUBIC, box=box)


@functools.cache
def _formats() -> tuple[str, ...]:
    """All that Pillow reads but PostScript: a program, which Pillow hands to Ghostscript to run."""
    Image.init()
    return tuple(name for name in Image.ID if name != "EPS")


def reason(error: BaseException) -> str:
    """An unreadable file's error in a few words."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    text = str(error).splitlines()
    return text[0] if text else type(error).__name__


def _flatten(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """8 bits per channel, no palette, no transparency."""
    if image.mode in _SIXTEEN_BIT:
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError(f"integer values outside 16 bits: {values.min()} to {values.max()}")
        return Image.fromarray(((values * 255 + 0x7FFF) // 0xFFFF).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point images have no known range")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, (*background, 255)), layer)
    return image.convert("RGB") if image.mode not in ("L", "RGB") else image
