"""Image input and output: files to pixels, tensors to bytes, PNGs with recipes, contact sheets."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import itertools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import (
    ExifTags,
    Image,
    ImageDraw,
    ImageFont,
    PngImagePlugin,
    UnidentifiedImageError,
)
from torch import Tensor

from fastdiff.colours import to_srgb
from fastdiff.files import atomic_file, numbered, one_line_errors
from fastdiff.memory import check_memory

RECIPE_KEY = "fastdiff"
"""Name of the PNG text chunk that contains the recipe."""
PARAMETERS_KEY = "parameters"
"""Name of the PNG text chunk in which web UIs say how a picture was made."""

MAX_LABEL = 120
"""Letters of a label on a sheet; a class may have a name of any length."""

MAX_SIDE = 65_535
"""Longest side that a picture may be resized to when it is read: JPEG's limit."""

LARGE, BYTES_PER_NUMBER = 2**24, 20
"""Free memory is checked before a picture with at least LARGE numbers is resized, which takes up to
BYTES_PER_NUMBER for each: the uint8 original and fp32 copies."""

FONTS = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc"),
    *("DroidSansFallbackFull.ttf", "Arial Unicode.ttf", "PingFang.ttc"),  # macOS
    *("arial.ttf", "msyh.ttc", "msgothic.ttc", "malgun.ttf", "seguisym.ttf"),  # Windows
)
"""File names of fonts that cover many scripts; each system has some of them."""

# Garbled files make Pillow's plugins raise OSError, ValueError, SyntaxError, struct.error (WebP),
# RuntimeError (AVIF), NotImplementedError (DDS), AttributeError (SPIDER) and more. One bad file
# must not end a run, whatever it raises.
UNREADABLE = Exception
_GREY = ("1", "L", "LA", "La", "F", "I", "I;16", "I;16L", "I;16B", "I;16N")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF Orientation -> the transposition that turns the image upright (Exif 2.32, 4.6.4 A)."""
_SIXTEEN_BIT = ("I", "I;16", "I;16L", "I;16B", "I;16N")

WHITE = (255, 255, 255)
BACKGROUND, FRAME, INK, FAINT = "#fafaf8", "#d8d8d2", "#26262a", "#77777f"
FONT_SIZES = (20, 14, 26, 12)
"""Of row labels, column labels and the sheet's caption, its title, and captions of images."""
CAPTION_LINES, LINE_HEIGHT = 3, 15


def to_uint8(images: Tensor) -> Tensor:
    """Convert images to bytes: -1 becomes 0, 1 becomes 255, values outside [-1, 1] are clipped.

    images: (..., H, W), floating point, in [-1, 1]. Returns the same shape, uint8, on the CPU.

    Raises:
        ValueError: a pixel is NaN or infinite, or the images are not floating point.
    """
    if not images.is_floating_point():
        raise ValueError(f"expected floating-point images in [-1, 1], got {images.dtype}")
    images = images.detach().float().cpu()
    if not images.isfinite().all():
        bad = int(images.isfinite().logical_not().sum())
        raise ValueError(
            f"expected finite pixels, got {bad} NaN or infinite values of {images.numel()}; "
            "sample in float32 or with less guidance"
        )
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_pil(image: Tensor) -> Image.Image:
    """Convert one image, (1 or 3, H, W) in [-1, 1], to a Pillow image, grey or RGB."""
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"expected an image (1 or 3, H, W), got shape {tuple(image.shape)}")
    pixels = to_uint8(image)
    if len(pixels) == 1:
        return Image.fromarray(pixels[0].numpy())
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


Source = str | os.PathLike[str] | bytes | Image.Image
"""An image file, the bytes of one, or a Pillow image."""


def reduced(images: Tensor, side: int) -> Tensor:
    """Small images for an upsampler to enlarge: means over areas, as the authors of IDDPM make
    them. images: (N, C, H, W). Returns (N, C, side, side)."""
    return F.interpolate(images, (side, side), mode="area")


def enlarged(images: Tensor, size: Sequence[int]) -> Tensor:
    """Small images (N, C, h, w) as an upsampler reads them: (N, C, *size), bilinear."""
    return F.interpolate(images, tuple(size), mode="bilinear")


def read_image(source: Source, *, height: int | None = None, width: int | None = None) -> Tensor:
    """Read a picture of any kind as RGB: (3, H, W) fp32 in [-1, 1].

    The EXIF orientation is applied, the colours of an embedded ICC profile become sRGB, grey,
    palette and CMYK images become RGB, 16 bits 8, and transparent pixels are composited onto white.
    Of an animation the first frame is read.

    Args:
        source: an image file, the bytes of one, or a Pillow image.
        height, width: the picture is cropped around its centre and resized to this size. A side
            that is None follows from the other one and the picture's proportions.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file cannot be read, or a side is not within 1 and `MAX_SIDE`.
    """
    return _read(source, "RGB", height, width) * 2 - 1


def read_grey(source: Source, *, height: int | None = None, width: int | None = None) -> Tensor:
    """Read a picture of any kind as grey levels: (1, H, W) fp32 in [-1, 1], otherwise as
    :func:`read_image`."""
    return _read(source, "L", height, width) * 2 - 1


def read_mask(source: Source, *, height: int | None = None, width: int | None = None) -> Tensor:
    """Read a mask, white where the image is to be replaced: (1, H, W) fp32 in [0, 1].

    Arguments are those of `read_image`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: as for `read_image`, or the mask has transparent pixels, which some programs
            leave where the image is to be replaced, and others where it is to be kept.
    """
    return _read(source, "L", height, width, opaque=True)


@one_line_errors()
def image_size(source: Source) -> tuple[int, int]:
    """Height and width of an image file, its bytes or a Pillow image, upright; a file's pixels are
    not read.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file cannot be read.
    """
    if isinstance(source, Image.Image):
        return _upright_size(source)
    file = source if isinstance(source, bytes) else _existing(source)
    try:
        with Image.open(_stream(file), formats=_formats()) as image:
            return _upright_size(image)
    except UNREADABLE as error:
        raise ValueError(f"{_name(file)} cannot be read: {reason(error)}") from error


def _upright_size(image: Image.Image) -> tuple[int, int]:
    turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    turned = turned and image.format != "TIFF"  # Pillow turns these itself
    return image.size if turned else (image.height, image.width)


def _stream(source: Path | bytes) -> Path | io.BytesIO:
    return io.BytesIO(source) if isinstance(source, bytes) else source


def _name(source: Path | bytes | Image.Image) -> str:
    """What an error calls a picture."""
    if isinstance(source, Path):
        return str(source)
    return "the Pillow image" if isinstance(source, Image.Image) else "the picture"


def _existing(path: str | os.PathLike[str]) -> Path:
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"no image at {file}; give a PNG, JPEG or other picture")
    return file


@one_line_errors()
def _read(
    source: Source, mode: str, height: int | None, width: int | None, *, opaque: bool = False
) -> Tensor:
    """Convert an image to a Pillow mode: (C, H, W) fp32 in [0, 1]. opaque: no transparency."""
    for which, side in (("height", height), ("width", width)):
        if side is not None and not 1 <= side <= MAX_SIDE:
            raise ValueError(f"{which} must be 1 to {MAX_SIDE} pixels, got {side}")
    if not isinstance(source, str | os.PathLike | bytes | Image.Image):
        raise ValueError(f"expected an image file or a Pillow image, got {type(source).__name__}")
    what = source if isinstance(source, Image.Image | bytes) else _existing(source)
    name = _name(what)
    try:
        stored = _upright(what) if isinstance(what, Image.Image) else _opened(what)
        clear = opaque and _transparent(stored)
        picture = _flatten(stored, WHITE).convert(mode)
    except UNREADABLE as error:
        raise ValueError(f"{name} cannot be read: {reason(error)}") from error
    if clear:
        raise ValueError(
            f"{name} has transparent pixels, expected an opaque mask, white where the image is to "
            "be replaced and black elsewhere; flatten it onto black, or onto white if it is "
            "transparent where the image is to be replaced"
        )
    if not picture.width or not picture.height:
        raise ValueError(f"the image has no pixels, got {picture.width} x {picture.height}")
    if height is not None or width is not None:
        width = width or max(round(picture.width * (height or 1) / picture.height), 1)
        height = height or max(round(picture.height * width / picture.width), 1)
        numbers = width * height * len(mode)
        if numbers > LARGE:
            check_memory(
                BYTES_PER_NUMBER * numbers,
                f"a picture of {width} x {height}",
                way_out="use a smaller height or width",
            )
        picture = resize(picture, width, height)
    pixels = np.asarray(picture, dtype=np.float32).reshape(picture.height, picture.width, -1)
    return torch.tensor(pixels).permute(2, 0, 1) / 255


def save_png(
    path: str | os.PathLike[str],
    image: Tensor | Image.Image,
    recipe: Mapping[str, Any] | None = None,
    *,
    parameters: str | None = None,
    new: bool = False,
) -> None:
    """Write a PNG atomically, with the recipe as JSON in its text chunk ``fastdiff``.

    Args:
        image: (1 or 3, H, W) in [-1, 1], or a Pillow image.
        parameters: what web UIs write into their text chunk of that name.
        new: never replace an existing file.

    Raises:
        ValueError: the image has another shape or is not finite, or the name does not end in .png.
        FileExistsError: with `new`, the file exists.
        OSError: the file cannot be written.
    """
    name = Path(path).name
    if not name.lower().endswith(".png"):
        raise ValueError(f"images are saved as PNG, got {name!r}; use the name {name}.png")
    picture = image if isinstance(image, Image.Image) else to_pil(image)
    info = png_info(recipe, parameters)
    with atomic_file(path, new=new) as temporary:
        picture.save(temporary, format="PNG", pnginfo=info)


def encoded(
    image: Tensor,
    kind: Literal["png", "webp", "jpeg"],
    recipe: Mapping[str, Any],
    *,
    parameters: str | None = None,
    quality: int = 90,
) -> bytes:
    """An image as the bytes of a file; a PNG is that of :func:`save_png`, with its recipe.

    image: (1 or 3, H, W) in [-1, 1]. quality: 1 to 100, of WebP and JPEG.

    Raises:
        ValueError: as for `to_pil`.
    """
    picture, file = to_pil(image), io.BytesIO()
    if kind == "png":
        picture.save(file, format="PNG", pnginfo=png_info(recipe, parameters))
    else:
        picture.save(file, format=kind.upper(), quality=quality)
    return file.getvalue()


def png_info(
    recipe: Mapping[str, Any] | None, parameters: str | None = None
) -> PngImagePlugin.PngInfo:
    """The text chunks of a PNG; arguments as for :func:`save_png`."""
    info = PngImagePlugin.PngInfo()
    if recipe is not None:
        info.add_text(RECIPE_KEY, json.dumps(dict(recipe), sort_keys=True))  # ASCII: fits tEXt
    if parameters is not None:
        info.add_text(PARAMETERS_KEY, parameters)  # beyond Latin-1 Pillow writes iTXt
    return info


def add_png(
    path: Path,
    image: Tensor | Image.Image,
    recipe: Mapping[str, Any],
    *,
    parameters: str | None = None,
) -> Path:
    """Write a PNG to the first free name of ``cat.png``, ``cat-2.png`` and so on.

    No file is overwritten. A picture whose recipe is already there is not written again. Returns
    the path of the picture; other arguments and errors are those of :func:`save_png`.
    """
    for place in numbered(path):
        with contextlib.suppress(FileExistsError):  # another process was faster: check its file
            if not os.path.lexists(place):
                save_png(place, image, recipe, parameters=parameters, new=True)
                return place
        if has_recipe(place, recipe):
            return place
    raise AssertionError("unreachable: `numbered` is endless")


def find_png(path: Path, recipe: Mapping[str, Any]) -> Path | None:
    """Find the picture of this recipe that :func:`add_png` would return, or None."""
    there = itertools.takewhile(os.path.lexists, numbered(path))
    return next((place for place in there if has_recipe(place, recipe)), None)


def has_recipe(path: Path, recipe: Mapping[str, Any]) -> bool:
    """Whether a file is a PNG with exactly this recipe."""
    try:
        return read_recipe(path) == json.loads(json.dumps(dict(recipe)))
    except (OSError, ValueError):
        return False


@one_line_errors()
def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the recipe that :func:`save_png` wrote.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a PNG, is damaged, or contains no recipe.
    """
    way_out = "give a PNG written by fastdiff that was not edited or re-saved by another program"
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            picture.load()  # text chunks may follow the pixels
            text = getattr(picture, "text", {}).get(RECIPE_KEY)
    except FileNotFoundError:
        raise FileNotFoundError(f"no image at {path}; {way_out}") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not a PNG; {way_out}") from None
    # what Pillow raises for damaged files; the last one is for sizes that would not fit into memory
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is damaged ({error}); {way_out}") from error
    if text is None:
        raise ValueError(f"{path} contains no recipe; {way_out}")
    try:
        recipe = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the recipe in {path} is not valid JSON ({error}); {way_out}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"the recipe in {path} is not an object, got {text!r:.60}; {way_out}")
    return recipe


def has_own_recipe(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a PNG with a recipe of ours, whole or not."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            picture.load()
            return RECIPE_KEY in getattr(picture, "text", {})
    except UNREADABLE:
        return False


def read_parameters(path: str | os.PathLike[str]) -> str | None:
    """What a web UI wrote into a picture: the text chunk of a PNG, the EXIF comment of others.

    None: the picture has none, or it cannot be read.
    """
    try:
        with Image.open(path, formats=_formats()) as picture:
            picture.load()  # text chunks may follow the pixels
            text = getattr(picture, "text", {}).get(PARAMETERS_KEY)
            if text is None:
                exif = picture.getexif().get_ifd(ExifTags.IFD.Exif)
                text = _comment(exif.get(ExifTags.Base.UserComment))
    except UNREADABLE:
        return None
    return text


def _comment(value: Any) -> str | None:
    """EXIF's UserComment (Exif 2.32, 4.6.5 C): eight bytes say how the rest is to be read."""
    if not isinstance(value, bytes):
        return None
    encodings = {b"UNICODE\0": "utf-16-be", b"ASCII\0\0\0": "ascii"}
    encoding = encodings.get(value[:8])
    return None if encoding is None else value[8:].decode(encoding, "replace").strip("\0")


def contact_sheet(
    images: Tensor,
    row_labels: Sequence[str] | None = None,
    *,
    columns: int | None = None,
    column_labels: Sequence[str] | None = None,
    captions: Sequence[str] | None = None,
    title: str | None = None,
    caption: str | None = None,
    cell: int = 72,
    resample: Literal["nearest", "bicubic"] = "bicubic",
) -> Image.Image:
    """Lay images out in a labelled grid, row by row.

    Args:
        images: (N, 1 or 3, H, W) in [-1, 1].
        row_labels: one per row, written on the left; the last row may be short.
        columns: images per row. By default it follows from row_labels; without them the grid is
            about square.
        captions: one per image, written below it in up to CAPTION_LINES lines.
        caption: written below all images.
        cell: least edge of an image on the sheet, in pixels; images are enlarged by an integer
            factor to reach it.

    Raises:
        ValueError: there are no images, or the labels or captions do not fit the grid.
    """
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"expected images (N, C, H, W), at least one, got {tuple(images.shape)}")
    count = len(images)
    if columns is None:
        rows = len(row_labels) if row_labels else round(math.sqrt(count))
        columns = math.ceil(count / max(rows, 1))
    rows = math.ceil(count / columns)
    for name, labels, expected in (
        ("row labels", row_labels, rows),
        ("column labels", column_labels, columns),
        ("captions", captions, count),
    ):
        if labels is not None and len(labels) != expected:
            raise ValueError(f"expected {expected} {name} for {count} images, got {len(labels)}")
    factor = max(1, math.ceil(cell / max(images.shape[2:])))
    height, width = (edge * factor for edge in images.shape[2:])
    gap, margin = max(4, height // 16), max(16, height // 4)
    texts = [title or "", caption or "", *(row_labels or ()), *(column_labels or ())]
    (font, small, large, tiny), show = fonts_for("".join([*texts, *(captions or ())]), FONT_SIZES)
    title, caption = title and show(title), caption and show(caption)
    row_labels, column_labels = (
        labels and [show(label) for label in labels] for labels in (row_labels, column_labels)
    )
    below = [_wrapped(show(text), tiny, width + gap - 4) for text in captions or ()]
    room = max((line.count("\n") + 1 for line in below), default=0) * LINE_HEIGHT
    pitch = height + gap + room

    left = margin + max(
        (math.ceil(font.getlength(t)) + margin // 2 for t in row_labels or ()), default=0
    )
    top = margin + (44 if title else 0) + (26 if column_labels else 0)
    right = left + columns * width + (columns - 1) * gap
    bottom = top + rows * pitch - gap
    lines = [(title, large), (caption, small)]
    needed = max((math.ceil(f.getlength(t)) + 2 * margin for t, f in lines if t), default=0)
    size = (max(right + margin, needed), bottom + margin + (22 if caption else 0))
    sheet = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((margin, margin), title, fill=INK, font=large)
    if caption:
        draw.text((margin, bottom + margin // 2 + 4), caption, fill=FAINT, font=small)
    for column, label in enumerate(column_labels or ()):
        centre = left + column * (width + gap) + width // 2
        draw.text((centre, top - 8), label, fill=FAINT, font=small, anchor="ms")
    for row, label in enumerate(row_labels or ()):
        middle = top + row * pitch + height // 2
        draw.text((margin, middle), label, fill=INK, font=font, anchor="lm")
    method = Image.Resampling.NEAREST if resample == "nearest" else Image.Resampling.BICUBIC
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        x, y = left + column * (width + gap), top + row * pitch
        sheet.paste(to_pil(image).resize((width, height), method), (x, y))
        draw.rectangle((x - 1, y - 1, x + width, y + height), outline=FRAME)
        if below:
            draw.multiline_text((x, y + height + 3), below[index], fill=INK, font=tiny, spacing=2)
    return sheet


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Text in at most CAPTION_LINES lines of so many pixels; what does not fit is cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > CAPTION_LINES:
        lines = [*lines[: CAPTION_LINES - 1], " ".join(lines[CAPTION_LINES - 1 :])]
    return "\n".join(_cut(line, font, width) for line in lines)


def _cut(line: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    while font.getlength(line) > width and len(line) > 1:
        line = line.rstrip("…")[:-1] + "…"
    return line


def fonts_for(
    text: str, sizes: Sequence[int]
) -> tuple[list[ImageFont.FreeTypeFont], Callable[[str], str]]:
    """Choose a font that covers `text`, in some sizes, and make a function that prepares labels.

    The font is Pillow's own if it has all letters; otherwise the installed one of `FONTS` that has
    the most. The function replaces letters that the font lacks by escapes such as ``\\u65e5``,
    because a row of identical boxes would tell the reader nothing.
    """
    best = ImageFont.load_default(20)
    assert isinstance(best, ImageFont.FreeTypeFont), "Pillow is built without FreeType"
    missing = _without_glyph(best, text)
    for name in _font_files():
        if not missing:
            break
        try:
            font = ImageFont.truetype(name, 20)
        except OSError:
            continue
        if len(left := _without_glyph(font, text)) < len(missing):
            best, missing = font, left

    def show(text: str) -> str:
        line = " ".join(text.split())
        line = line if len(line) <= MAX_LABEL else line[: MAX_LABEL - 1] + "…"
        return "".join(
            c.encode("unicode_escape", "surrogatepass").decode() if c in missing else c
            for c in line
        )

    return [best.font_variant(size=size) for size in sizes], show


@functools.cache
def _font_files() -> tuple[str, ...]:
    """Candidates for `ImageFont.truetype`: matplotlib's font if installed, then system fonts."""
    found = importlib.util.find_spec("matplotlib")
    folder = Path(found.origin).parent / "mpl-data/fonts/ttf" if found and found.origin else None
    return (*([str(folder / "DejaVuSans.ttf")] if folder else []), *FONTS)


def _without_glyph(font: ImageFont.FreeTypeFont, text: str) -> set[str]:
    """The letters that the font lacks: those drawn like a character that does not exist."""

    def drawn(letter: str) -> tuple[tuple[float, ...], bytes]:
        return font.getbbox(letter), bytes(font.getmask(letter))

    nothing = drawn("\uffff")
    return {c for c in set(text) if not c.isspace() and drawn(c) == nothing}


def open_flat(source: Path | bytes, background: tuple[int, int, int]) -> Image.Image:
    """Read the first frame of an image file, upright, 8 bits per channel, without transparency.

    Raises:
        Exception: the file cannot be read; Pillow's plugins raise many types (`UNREADABLE`).
    """
    return _flatten(_opened(source), background)


def _opened(source: Path | bytes) -> Image.Image:
    """The first frame of an image file, upright."""
    if isinstance(source, Path) and source.exists() and not source.is_file():
        raise ValueError("not a regular file")  # opening a named pipe would block forever
    with Image.open(_stream(source), formats=_formats()) as image:
        image.seek(0)
        image.load()
        return _upright(image)


def _transparent(image: Image.Image) -> bool:
    """Whether a pixel of an image is not opaque."""
    if image.mode in _SIXTEEN_BIT:
        image = _eight_bits(image)
    if not image.has_transparency_data:
        return False
    alpha = image.convert("LA" if image.mode in _GREY else "RGBA").getchannel("A")
    return alpha.getextrema()[0] != 255


def _upright(image: Image.Image) -> Image.Image:
    """Turn an image according to its EXIF or XMP orientation; ignore all other metadata.

    (`ImageOps.exif_transpose` also rewrites the metadata, and fails on a single damaged tag.)
    """
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except UNREADABLE:
        orientation = None
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def in_colour(path: Path) -> bool:
    """Whether a file contains an image that is not grey; False if it cannot be read."""
    try:
        with Image.open(path, formats=_formats()) as image:
            if image.mode == "P":
                levels = image.getpalette("RGB") or []
                return levels[0::3] != levels[1::3] or levels[1::3] != levels[2::3]
            return image.mode not in _GREY
    except UNREADABLE:
        return False


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """Crop to the target's proportions around the centre and resize (antialiased bicubic)."""
    # min: rounding must not make the crop larger than the image, which Pillow would reject
    across = min(image.width, image.height * width / height)
    down = min(image.height, image.width * height / width)
    left, top = (image.width - across) / 2, (image.height - down) / 2
    box = (left, top, left + across, top + down)
    return image.resize((width, height), Image.Resampling.BICUBIC, box=box)


@functools.cache
def _formats() -> tuple[str, ...]:
    """All formats that Pillow reads except PostScript, a program that Ghostscript would execute."""
    Image.init()
    return tuple(name for name in Image.ID if name != "EPS")


def reason(error: BaseException) -> str:
    """Describe in a few words why a file cannot be read."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    text = str(error).splitlines()
    return text[0] if text else type(error).__name__


def _flatten(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Convert to 8 bits per channel in sRGB, without palette or transparency."""
    profile = image.info.get("icc_profile")
    if image.mode in _SIXTEEN_BIT:
        image = _eight_bits(image)
    if image.mode == "F":
        raise ValueError(
            "the range of its floating-point values is unknown; save it with 8 or 16 bits"
        )
    if image.has_transparency_data:
        layer = to_srgb(image.convert("LA" if image.mode in _GREY else "RGBA"), profile)
        below = Image.new("RGBA", layer.size, (*background, 255))
        return Image.alpha_composite(below, layer.convert("RGBA"))
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    flat = to_srgb(image, profile)
    return flat.convert("RGB") if flat.mode == "CMYK" else flat


def _eight_bits(image: Image.Image) -> Image.Image:
    """Round grey levels of 16 bits to 8; mode LA if one of them stands for transparency."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError(
            f"expected integer values of 16 bits, got {values.min()} to {values.max()}; save it "
            "with 8 or 16 bits"
        )
    levels = Image.fromarray(((values * 255 + 0x7FFF) // 0xFFFF).astype(np.uint8))
    if isinstance(clear := image.info.get("transparency"), int):  # PNG's tRNS
        levels.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return levels
