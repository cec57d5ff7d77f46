"""Pictures and masks of every kind: their pixels by hand, or an error that says what to do."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastdiff.generate.job import InpaintJob
from fastdiff.generate.pictures import check_same_size, read_mask_of, read_picture
from fastdiff.images import image_size, read_image, read_mask

Array = np.ndarray
RGB = np.random.default_rng(0).integers(0, 256, (6, 4, 3), np.uint8)
UPRIGHT: dict[int, Callable[[Array], Array]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}
"""Exif 2.32, 4.6.4 A: where row 0 and column 0 of the stored picture belong."""


def data_of(picture: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    if kind == "WEBP":
        options["lossless"] = True
    picture.save(file, kind, **options)
    return file.getvalue()


def levels(image: Tensor) -> Array:
    """(3, H, W) in [-1, 1] as (H, W, 3), 0 to 255."""
    return ((image.movedim(0, -1).double().numpy() + 1) * 127.5).round()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_orientations(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = data_of(Image.fromarray(RGB), kind, exif=exif)
    expected = UPRIGHT[orientation](RGB)
    assert np.array_equal(levels(read_image(data)), expected)
    assert image_size(data) == expected.shape[:2]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_read(kind: str) -> None:
    first, *others = (Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue"))
    data = data_of(first, kind, save_all=True, append_images=others)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert np.array_equal(levels(read_image(data)), np.tile([255, 0, 0], (4, 4, 1)))


def sixteen(*values: int) -> Image.Image:
    return Image.fromarray(np.array([values], np.uint16))


def palette(clear: int | None) -> Image.Image:
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putdata([0, 1])
    if clear is not None:
        picture.info["transparency"] = clear
    return picture


WHITE, RED, BLUE, BLACK = [255] * 3, [255, 0, 0], [0, 0, 255], [0] * 3
MODES: dict[str, tuple[Image.Image, list[list[int]]]] = {
    "1": (Image.frombytes("1", (2, 1), b"\x40"), [BLACK, WHITE]),
    "L": (Image.frombytes("L", (2, 1), b"\x00\x80"), [BLACK, [128] * 3]),
    "LA half transparent": (Image.frombytes("LA", (1, 1), b"\x00\x80"), [[127] * 3]),
    "P": (palette(None), [RED, BLUE]),
    "P with transparency": (palette(1), [RED, WHITE]),
    "RGBA transparent": (Image.new("RGBA", (1, 1), (9, 9, 9, 0)), [WHITE]),
    "CMYK": (Image.new("CMYK", (1, 1), (0, 255, 255, 0)), [RED]),
    "I;16": (sixteen(0, 257, 65535), [BLACK, [1] * 3, WHITE]),
    "I": (Image.fromarray(np.array([[0, 257, 65535]], np.int32)), [BLACK, [1] * 3, WHITE]),
}


@pytest.mark.parametrize("mode", MODES)
def test_modes(mode: str) -> None:
    picture, expected = MODES[mode]
    assert np.array_equal(levels(read_image(picture)), [expected])


def test_a_level_of_16_bits_may_stand_for_transparency() -> None:
    """PNG's tRNS chunk; 300 rounds to the same 8 bits as 257 and is opaque."""
    data = data_of(sixteen(257, 300, 0), "PNG", transparency=257)
    assert np.array_equal(levels(read_image(data)), [[WHITE, [1] * 3, BLACK]])


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (Image.new("F", (2, 2)), "floating-point values is unknown; save it with 8 or 16 bits"),
        (Image.fromarray(np.array([[70_000]], np.int32)), "got 70000 to 70000; save it with"),
        (Image.fromarray(np.array([[-1]], np.int32)), "of 16 bits, got -1 to -1"),
        (Image.new("RGB", (0, 3)), "the image has no pixels, got 0 x 3"),
    ],
)
def test_what_has_no_defined_colours_is_refused(picture: Image.Image, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_image(picture)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.9])
def test_truncated_files_are_refused(kind: str, share: float, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = data_of(Image.fromarray(noise), kind)
    path = tmp_path / "cut"
    path.write_bytes(data[: int(share * len(data))])
    for read in (read_image, read_mask):
        with pytest.raises(ValueError, match="cut cannot be read: "):
            read(path)


def test_postscript_is_never_run() -> None:
    with pytest.raises(ValueError, match="cannot be read: not an image"):
        read_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")


def test_a_picture_of_too_many_pixels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"cannot be read: .*576 pixels"):
        read_image(data_of(Image.new("RGB", (24, 24)), "PNG"))


def test_a_tensor_without_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has no pixels, got shape \(3, 0, 8\)"):
        read_picture(torch.zeros(3, 0, 8), 3, None, None)


IMAGE = torch.zeros(3, 2, 2)
CORNER = torch.tensor([[1.0, 0], [0, 0]])
MASKS: dict[str, tuple[Any, Tensor]] = {
    "0 and 1": (CORNER, CORNER),
    "bool": (CORNER.bool(), CORNER),
    "uint8 of 0 and 1": (CORNER.byte(), CORNER),
    "int64 of 0 and 1": (CORNER.long(), CORNER),
    "fp16": (CORNER.half(), CORNER),
    "soft edges": (torch.tensor([[0.5, 0.49], [0, 0.2]]), CORNER),
    "all ones": (torch.ones(2, 2), torch.ones(2, 2)),
    "(1, 1, H, W)": (CORNER[None, None], CORNER),
    "inverted": (1 - CORNER, 1 - CORNER),
}
FAULTS: dict[str, tuple[Any, str]] = {
    "all zeros": (torch.zeros(2, 2), "the mask is all zeros, expected 1 .* invert it"),
    "too faint": (CORNER * 0.25, "no value of 0.5 or more, got at most 0.25"),
    "bytes": (CORNER.byte() * 255, r"must lie in \[0, 1\], got 0 to 255; .*read_mask"),
    "an image's range": (CORNER * 2 - 1, r"must lie in \[0, 1\], got -1 to 1"),
    "NaN": (CORNER * float("nan"), r"must lie in \[0, 1\], got nan to nan"),
    "three channels": (CORNER.expand(3, 2, 2), r"must be \(1, 2, 2\), .*got \(3, 2, 2\); resize"),
    "another size": (torch.ones(4, 4), r"must be \(1, 2, 2\), the size of the image, got \(4, 4\)"),
    "complex": (CORNER.to(torch.complex64), "must be bool, integers or floating point"),
}


@pytest.mark.parametrize("case", MASKS)
def test_masks(case: str) -> None:
    given, expected = MASKS[case]
    found = read_mask_of(InpaintJob(image=IMAGE, mask=given, prompt="a"), IMAGE)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected[None])


@pytest.mark.parametrize("case", FAULTS)
def test_masks_that_are_none(case: str) -> None:
    given, message = FAULTS[case]
    with pytest.raises(ValueError, match=message):
        read_mask_of(InpaintJob(image=IMAGE, mask=given, prompt="a"), IMAGE)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16"])
def test_mask_files(mode: str, tmp_path: Path) -> None:
    white = Image.fromarray((CORNER.numpy() * 255).astype(np.uint8))
    if mode == "I;16":
        white = Image.fromarray((CORNER.numpy() * 65535).astype(np.uint16))
    path = tmp_path / "mask.png"
    (white if mode == "I;16" else white.convert(mode)).save(path)
    job = InpaintJob(image=IMAGE, mask=path, prompt="a")
    assert torch.equal(read_mask_of(job, IMAGE), CORNER[None])


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P"])
def test_a_mask_with_transparent_pixels_is_refused(mode: str, tmp_path: Path) -> None:
    """Half of all programs leave the hole transparent, the others paint it on a clear layer."""
    clear = Image.new("LA", (2, 2), (255, 0)).convert("RGBA")
    path = tmp_path / "mask.png"
    if mode == "P":
        Image.new("P", (2, 2)).save(path, transparency=0)
    else:
        clear.convert(mode).save(path)
    with pytest.raises(ValueError, match=r"mask\.png has transparent pixels, .*flatten it onto"):
        read_mask(path)
    flat = Image.alpha_composite(Image.new("RGBA", (2, 2), "black"), clear).convert("L")
    assert not read_mask(flat).any(), "the advice works"


def test_a_mask_is_not_cropped_against_its_image(tmp_path: Path) -> None:
    """height and width crop each around its centre, so another shape would move the mask."""
    image, mask = tmp_path / "image.png", tmp_path / "mask.png"
    Image.new("RGB", (8, 4)).save(image)
    Image.new("L", (4, 4), 255).save(mask)
    message = r"must have the size of the image, 8 x 4, got 4 x 4 \(width x height\)"
    job = InpaintJob(image=image, mask=mask, prompt="a", height=4, width=4)
    with pytest.raises(ValueError, match=message):
        read_mask_of(job, torch.zeros(3, 4, 4))
    for one, other in ((image.read_bytes(), mask), (Image.open(image), Image.open(mask))):
        with pytest.raises(ValueError, match=message):
            check_same_size(one, other)
    check_same_size(image, torch.ones(9, 9))
