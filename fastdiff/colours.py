"""Colours of pictures: those of an embedded ICC profile as sRGB (ICC.1:2022, section 8).

This module imports nothing but Pillow, because the server's decoder runs it by itself.
"""

from __future__ import annotations

import functools
import io
import warnings

from PIL import Image, ImageCms

GRID = range(0, 256, 51)
"""Levels per channel at which a profile is compared with sRGB."""
TOLERANCE = 1
"""Levels of 255 by which a profile's colours may differ from sRGB and still be left alone."""
_SPACES = {"L": "GRAY", "LA": "GRAY", "RGB": "RGB", "RGBA": "RGB", "CMYK": "CMYK"}


class ColourProfileWarning(UserWarning):
    """A picture's colour profile cannot be used, so its colours are read as sRGB."""


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert the colours of a picture from those of its profile to sRGB, with perceptual intent.

    Colours that are sRGB's to one level of 255 are left alone. Grey pictures stay grey, CMYK
    becomes RGB, transparency is kept. A profile that is damaged, or made for other channels, is
    ignored with a `ColourProfileWarning`, as browsers ignore it.

    Args:
        image: in Pillow's mode L, LA, RGB, RGBA or CMYK.
        profile: the ICC profile, as in ``image.info["icc_profile"]``; None or empty: sRGB.
    """
    if not profile:
        return image
    space = _SPACES[image.mode]
    try:
        transform = _transform(bytes(profile), space)
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError) as error:
        warnings.warn(
            f"the colour profile of a picture cannot be used ({error}); its colours are read as "
            "sRGB, convert the picture to sRGB if they look wrong",
            ColourProfileWarning,
            stacklevel=2,
        )
        return image
    if transform is None:
        return image
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    colours = transform.apply(image.convert(_MODES[space]))
    colours.info.pop("icc_profile", None)
    if space == "GRAY":
        colours = colours.getchannel("G")
    if alpha is not None:
        colours.putalpha(alpha)
    return colours


_MODES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}


@functools.lru_cache(maxsize=8)
def _transform(profile: bytes, space: str) -> ImageCms.ImageCmsTransform | None:
    """The transform from a profile to sRGB; None if it changes no colour by more than TOLERANCE."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    found = source.profile.xcolor_space.strip()
    if found != space:
        raise ValueError(f"expected one for {space}, got one for {found}")
    mode = _MODES[space]
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    # lcms interpolates grey between 33 levels otherwise: 9 of 255 off near black in linear light
    flags = ImageCms.Flags.NOOPTIMIZE if space == "GRAY" else ImageCms.Flags.NONE
    transform = ImageCms.ImageCmsTransform(source, own, mode, "RGB", flags=flags)
    if space == "CMYK":
        return transform
    probe = _probe(mode)
    before, after = probe.convert("RGB").tobytes(), transform.apply(probe).tobytes()
    same = all(abs(a - b) <= TOLERANCE for a, b in zip(before, after, strict=True))
    return None if same else transform


def _probe(mode: str) -> Image.Image:
    """A picture of many colours: all levels of grey, or a grid of colours."""
    if mode == "L":
        return Image.frombytes("L", (256, 1), bytes(range(256)))
    colours = bytes(level for r in GRID for g in GRID for b in GRID for level in (r, g, b))
    return Image.frombytes("RGB", (len(colours) // 3, 1), colours)
