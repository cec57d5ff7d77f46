"""Colours of pictures: ICC profiles against their closed form, and against Pillow's conversion."""

from __future__ import annotations

import asyncio
import io
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from fastdiff.colours import ColourProfileWarning, to_srgb
from fastdiff.images import read_grey, read_image, read_mask
from fastdiff.serve.limits import Limits
from fastdiff.serve.uploads import Uploads

Array = np.ndarray
SRGB = np.array(
    [
        [0.4360747, 0.3850649, 0.1430804],
        [0.2225045, 0.7168786, 0.0606169],
        [0.0139322, 0.0971045, 0.7141733],
    ]
)
"""Linear sRGB to XYZ of D50 (Lindbloom, Bradford-adapted)."""
ADOBE = np.array(
    [
        [0.6097559, 0.2052401, 0.1492240],
        [0.3111242, 0.6256560, 0.0632197],
        [0.0194811, 0.0608902, 0.7448387],
    ]
)
"""Linear Adobe RGB (1998) to XYZ of D50; its gamma is 563/256."""
GAMMA = 563 / 256


def s15(values: Array | list[float]) -> bytes:
    return b"".join(struct.pack(">i", round(float(v) * 65536)) for v in np.ravel(values))


def profile(space: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr") -> bytes:
    """An ICC profile of version 2.4 (ICC.1:2001-04, section 6)."""
    white = s15([0.9642, 1.0, 0.8249])
    text = b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78)
    tags = {
        b"desc": text,
        b"cprt": b"text" + bytes(4) + b"none\0",
        b"wtpt": b"XYZ " + bytes(4) + white,
        **tags,
    }
    pcs = b"Lab " if b"A2B0" in tags else b"XYZ "
    table, data, start = b"", b"", 132 + 12 * len(tags)
    for name, body in tags.items():
        table += name + struct.pack(">II", start + len(data), len(body))
        data += body + bytes(-len(body) % 4)
    head = bytes(4) + b"\x02\x40\0\0" + kind + space + pcs + struct.pack(">6H", 2026, 1, 1, 0, 0, 0)
    head = struct.pack(">I", start + len(data)) + head + b"acsp" + bytes(28) + white + bytes(48)
    return head + struct.pack(">I", len(tags)) + table + data


def matrix_profile(matrix: Array, gamma: float) -> bytes:
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))
    columns = {
        name + b"XYZ": b"XYZ " + bytes(4) + s15(matrix[:, at])
        for at, name in enumerate((b"r", b"g", b"b"))
    }
    return profile(b"RGB ", columns | {name + b"TRC": curve for name in (b"r", b"g", b"b")})


def grey_profile(gamma: float) -> bytes:
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))
    return profile(b"GRAY", {b"kTRC": curve})


def cmyk_profile(corners: Array) -> bytes:
    """A table of 2^4 corners. corners: (2, 2, 2, 2, 3) of Lab as ICC's 8 bits."""
    line = bytes(range(256))
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + s15(np.eye(3))
    lut += 4 * line + corners.astype(np.uint8).tobytes() + 3 * line
    return profile(b"CMYK", {b"A2B0": lut}, b"prtr")


def encoded(linear: Array) -> Array:
    """sRGB's transfer function (IEC 61966-2-1)."""
    linear = linear.clip(0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def adobe_as_srgb(pixels: Array) -> Array:
    linear = (pixels.astype(np.float64) / 255) ** GAMMA
    return 255 * encoded(linear @ ADOBE.T @ np.linalg.inv(SRGB).T)


def in_gamut(seed: int = 0) -> Array:
    """Muted colours, which sRGB has as well: (16, 16, 3)."""
    return np.random.default_rng(seed).integers(90, 170, (16, 16, 3), np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_adobe_rgb_becomes_srgb(kind: str, tmp_path: Path) -> None:
    """Against the closed form, to a level of 255; without a profile nothing changes."""
    pixels = in_gamut()
    options = {"lossless": True} if kind == "WEBP" else {}
    path = tmp_path / "photo"
    Image.fromarray(pixels).save(path, kind, icc_profile=matrix_profile(ADOBE, GAMMA), **options)
    found = (read_image(path).movedim(0, -1).double().numpy() + 1) * 127.5
    expected = adobe_as_srgb(pixels)
    assert np.abs(expected - pixels).max() > 5, "the test would not notice"
    assert np.abs(found - expected).max() <= 1
    Image.fromarray(pixels).save(path, kind, **options)
    assert np.allclose((read_image(path).movedim(0, -1).numpy() + 1) * 127.5, pixels, atol=1e-4)


def test_a_profile_with_red_and_green_exchanged_exchanges_them() -> None:
    pixels = in_gamut(1)
    gamma = encoded((pixels / 255) ** 2.2) * 255  # the profile's curve, as sRGB's
    found = to_srgb(Image.fromarray(pixels), matrix_profile(SRGB[:, [1, 0, 2]], 2.2))
    assert np.abs(np.asarray(found) - gamma[..., [1, 0, 2]]).max() <= 1.5


def test_srgb_is_left_alone() -> None:
    """lcms would move some colours by a level."""
    pixels = np.random.default_rng(2).integers(0, 256, (64, 64, 3), np.uint8)
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(np.asarray(to_srgb(Image.fromarray(pixels), own)), pixels)


def test_grey_stays_grey() -> None:
    levels = np.arange(256, dtype=np.uint8)[None]
    expected = encoded(levels / 255.0) * 255  # gamma 1: linear light
    found = to_srgb(Image.fromarray(levels), grey_profile(1.0))
    assert found.mode == "L"
    assert np.abs(np.asarray(found) - expected).max() <= 1
    layer = Image.fromarray(np.stack([levels, levels[:, ::-1]], -1), "LA")
    both = np.asarray(to_srgb(layer, grey_profile(1.0)))
    assert np.array_equal(both[..., 0], np.asarray(found))
    assert np.array_equal(both[..., 1], levels[:, ::-1])


def test_cmyk_follows_its_profile(tmp_path: Path) -> None:
    """No ink is white, black ink black, and cyan what the profile says, here the Lab of green."""
    corners = np.zeros((2, 2, 2, 2, 3))
    corners[..., 1:] = 128  # a = b = 0
    corners[0, 0, 0, 0, 0] = 255  # L of white
    corners[1, 0, 0, 0] = (0.4623 * 255, 128 - 51.7, 128 + 49.9)  # sRGB (0, 128, 0), Lindbloom
    inks = np.zeros((1, 3, 4), np.uint8)
    inks[0, 1, 0] = inks[0, 2, 3] = 255
    path = tmp_path / "print.tif"
    Image.fromarray(inks, "CMYK").save(path, icc_profile=cmyk_profile(corners))
    found = (read_image(path)[:, 0].T.numpy() + 1) * 127.5
    assert np.abs(found - [[255, 255, 255], [0, 128, 0], [0, 0, 0]]).max() <= 3
    Image.fromarray(inks, "CMYK").save(path)
    assert np.allclose(read_image(path)[:, 0].T, [[1, 1, 1], [-1, 1, 1], [-1, -1, -1]])


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK"])
def test_against_pillows_own_conversion(mode: str, tmp_path: Path) -> None:
    pixels = Image.fromarray(in_gamut(3)).convert(mode)
    data = grey_profile(1.4) if mode == "L" else matrix_profile(ADOBE, GAMMA)
    if mode == "CMYK":
        data = cmyk_profile(np.random.default_rng(4).integers(60, 200, (2, 2, 2, 2, 3)))
    path = tmp_path / "photo.tif"
    pixels.save(path, icc_profile=data)
    flat = pixels.convert("RGB") if mode in ("P", "RGBA") else pixels
    given, own = ImageCms.ImageCmsProfile(io.BytesIO(data)), ImageCms.createProfile("sRGB")
    expected = ImageCms.profileToProfile(flat, given, own, outputMode="RGB")
    found = (read_image(path).movedim(0, -1).numpy() + 1) * 127.5
    assert np.abs(found - np.asarray(expected)).max() <= (1 if mode == "L" else 1e-4)


@pytest.mark.parametrize(
    "data",
    [
        b"x",
        matrix_profile(ADOBE, GAMMA)[:200],
        grey_profile(1.0),
        cmyk_profile(np.zeros((2,) * 4 + (3,))),
    ],
)
def test_a_profile_that_does_not_fit_is_named(data: bytes) -> None:
    pixels = in_gamut(5)
    with pytest.warns(ColourProfileWarning, match="read as sRGB, convert the picture"):
        found = to_srgb(Image.fromarray(pixels), data)
    assert np.array_equal(np.asarray(found), pixels)


def test_transparency_is_kept_and_masks_and_grey_models_read_the_same_colours(
    tmp_path: Path,
) -> None:
    pixels = np.dstack([in_gamut(6), np.full((16, 16), 255, np.uint8)])
    pixels[:8, :, 3] = 0
    path = tmp_path / "layer.png"
    Image.fromarray(pixels).save(path, icc_profile=matrix_profile(ADOBE, GAMMA))
    found = (read_image(path).movedim(0, -1).numpy() + 1) * 127.5
    assert (found[:8] == 255).all()
    assert np.abs(found[8:] - adobe_as_srgb(pixels[8:, :, :3])).max() <= 1
    Image.fromarray(pixels[..., :3]).save(path, icc_profile=matrix_profile(ADOBE, GAMMA))
    grey = adobe_as_srgb(pixels[..., :3]) @ [0.299, 0.587, 0.114]
    assert np.abs((read_grey(path)[0].numpy() + 1) * 127.5 - grey).max() <= 1.5
    assert np.abs(read_mask(path)[0].numpy() * 255 - grey).max() <= 1.5


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "1", "P", "CMYK", "I;16"])
def test_uploads_are_read_as_files_are(mode: str, tmp_path: Path) -> None:
    """The server's decoder, in its own process, gives the pixels of `read_image`."""
    kind = "JPEG" if mode == "CMYK" else "PNG"
    if mode == "I;16":
        picture = Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257)
    else:
        picture = Image.fromarray(in_gamut(7)).convert(mode)
    data = matrix_profile(ADOBE, GAMMA)
    if mode in ("L", "LA", "1", "I;16"):
        data = grey_profile(1.0)
    if mode == "CMYK":
        data = cmyk_profile(np.random.default_rng(8).integers(60, 200, (2, 2, 2, 2, 3)))
    file = io.BytesIO()
    picture.save(file, kind, icc_profile=data)
    (tmp_path / "x").write_bytes(file.getvalue())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = read_image(tmp_path / "x")
    found = read_image(asyncio.run(Uploads(Limits()).decode(file.getvalue(), "image")))
    assert np.array_equal(found.numpy(), expected.numpy())
    bare = io.BytesIO()
    picture.save(bare, kind)
    changed = read_image(bare.getvalue())
    assert mode in ("1",) or not np.array_equal(found.numpy(), changed.numpy())
