"""Pixels, PNGs with their recipe, contact sheets."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from fastdiff import images as images_module
from fastdiff.images import (
    contact_sheet,
    fonts_for,
    image_size,
    read_image,
    read_mask,
    read_recipe,
    save_png,
    to_pil,
    to_uint8,
)

RECIPE = {"seed": 2**63 - 1, "class": "sept ✓", "guidance_scale": 2.5, "interval": None}


def ramp(channels: int = 1, height: int = 5, width: int = 7) -> torch.Tensor:
    """An image whose pixels all differ, so that a swapped axis or channel shows."""
    return torch.linspace(-1, 1, channels * height * width).reshape(channels, height, width)


def test_bytes_round_to_nearest_and_clip() -> None:
    values = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0])
    expected = [0, 0, 64, 128, 191, 255, 255]  # (x + 1) * 127.5 rounded half to even
    assert to_uint8(values.reshape(1, 7)).flatten().tolist() == expected


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_pixel_that_is_no_number_is_refused(bad: float) -> None:
    image = ramp()
    image[0, 2, 3] = bad
    with pytest.raises(ValueError, match="finite pixels, got 1 NaN or infinite values of 35"):
        to_uint8(image)


def test_bytes_are_not_taken_for_unit_images() -> None:
    with pytest.raises(ValueError, match=r"in \[-1, 1\], got torch.uint8"):
        to_uint8(torch.zeros(1, 2, 2, dtype=torch.uint8))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_keeps_every_pixel_and_the_recipe(tmp_path: Path, channels: int) -> None:
    image = ramp(channels)
    save_png(tmp_path / "a.png", image, RECIPE)
    with Image.open(tmp_path / "a.png") as picture:
        pixels = np.asarray(picture)
    expected = to_uint8(image).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(pixels.reshape(expected.shape), expected)
    assert read_recipe(tmp_path / "a.png") == RECIPE


def test_two_writes_of_one_image_are_the_same_file(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", ramp(), RECIPE)
    save_png(tmp_path / "b.png", ramp(), dict(reversed(RECIPE.items())))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_files_without_a_recipe_say_so(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", ramp(), RECIPE)
    whole = (tmp_path / "a.png").read_bytes()
    save_png(tmp_path / "bare.png", ramp())
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "list.png").write_bytes(whole)
    to_pil(ramp()).save(tmp_path / "photo.jpg")
    info = Image.open(tmp_path / "a.png")
    from PIL.PngImagePlugin import PngInfo

    for name, text in (("list.png", "[1]"), ("broken.png", "{")):
        chunk = PngInfo()
        chunk.add_text("fastdiff", text)
        info.save(tmp_path / name, pnginfo=chunk)
    info.close()
    for name, message in [
        ("bare.png", "contains no recipe"),
        ("cut.png", "damaged"),
        ("text.png", "not a PNG"),
        ("photo.jpg", "not a PNG"),
        ("list.png", "not an object"),
        ("broken.png", "not valid JSON"),
    ]:
        with pytest.raises(
            ValueError, match=rf"^[^\n]*{message}[^\n]*give a PNG written by[^\n]*$"
        ):
            read_recipe(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"no image at .*none\.png"):
        read_recipe(tmp_path / "none.png")


def test_a_contact_sheet_shows_each_image_enlarged_in_its_place() -> None:
    """Six flat images of different grey: the sheet must show them row by row, at least 72 wide."""
    greys = torch.linspace(-0.9, 0.9, 6)
    images = greys.reshape(6, 1, 1, 1).expand(6, 1, 8, 8)
    sheet = contact_sheet(images, ["zero", "one"], title="digits", resample="nearest")
    pixels = np.asarray(sheet.convert("L")).astype(int)
    centres = []
    for grey in to_uint8(greys.reshape(6, 1)).flatten().tolist():
        # Whole lines of one grey: letters' soft edges may hold a pixel of any grey.
        rows = np.flatnonzero((pixels == grey).sum(1) >= 70)
        columns = np.flatnonzero((pixels == grey).sum(0) >= 70)
        assert len(rows) == len(columns) == 72
        assert (pixels[np.ix_(rows, columns)] == grey).all()
        centres.append((int(rows[36]), int(columns[36])))
    top, bottom = centres[:3], centres[3:]
    assert len({y for y, _ in top}) == len({y for y, _ in bottom}) == 1
    assert top[0][0] < bottom[0][0]
    assert [x for _, x in top] == [x for _, x in bottom] == sorted(x for _, x in top)
    # The labels are drawn: there is ink left of the first image, on both rows.
    for y, x in (centres[0], centres[3]):
        assert (pixels[y - 15 : y + 15, : x - 50] < 100).any()


def test_labels_are_drawn_in_a_font_that_has_their_letters() -> None:
    pytest.importorskip("matplotlib", reason="DejaVu comes with it")
    (font, small), show = fonts_for("ünï tri, Ж, Ω", (20, 14))
    boxes = bytes(font.getmask("\uffff"))
    assert all(bytes(font.getmask(letter)) != boxes for letter in "ünïЖΩ")
    assert len({bytes(font.getmask(letter)) for letter in "ünïЖΩ"}) == 5
    assert (small.size, show("ünï tri")) == (14, "ünï tri")
    (plain,), _ = fonts_for("digits", (20,))
    assert plain.getname() == ImageFont.load_default(20).getname()


def test_letters_that_no_font_has_are_written_as_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images_module, "_font_files", lambda: ("nowhere.ttf",))
    _, show = fonts_for("cat 日", (20,))
    assert show("cat 日") == r"cat \u65e5"
    sheet = contact_sheet(ramp().expand(1, 1, 5, 7), ["日"], title="日")
    escaped = contact_sheet(ramp().expand(1, 1, 5, 7), [r"\u65e5"], title=r"\u65e5")
    assert sheet.tobytes() == escaped.tobytes()


def test_a_contact_sheet_refuses_labels_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="expected 3 row labels for 6 images, got 2"):
        contact_sheet(ramp().expand(6, 1, 5, 7), ["a", "b"], columns=2)
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet(torch.zeros(0, 1, 4, 4))


def test_a_png_of_absurd_size_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    save_png(path, torch.zeros(1, 8, 8), {"seed": 1})
    raw = bytearray(path.read_bytes())
    raw[16:24] = struct.pack(">II", 60_000, 60_000)  # IHDR: width and height
    raw[29:33] = struct.pack(">I", zlib.crc32(bytes(raw[12:29])))
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"bomb\.png is damaged .*3600000000 pixels"):
        read_recipe(path)


def test_pictures_of_any_kind_are_read_as_rgb(tmp_path: Path) -> None:
    grey = Image.fromarray(np.array([[0, 255], [51, 102], [0, 0]], dtype=np.uint8))
    expected = torch.tensor([[-1, 1], [-0.6, -0.2], [-1, -1]]).expand(3, 3, 2)
    clear = Image.new("RGBA", (2, 3), (0, 0, 0, 0))
    for name, picture, pixels in (
        ("grey.png", grey, expected),
        ("palette.png", grey.convert("P"), expected),
        ("rgb.png", grey.convert("RGB"), expected),
        ("clear.png", clear, torch.ones(3, 3, 2)),
    ):
        picture.save(tmp_path / name)
        torch.testing.assert_close(read_image(tmp_path / name), pixels)
    torch.testing.assert_close(read_mask(tmp_path / "rgb.png"), (expected[:1] + 1) / 2)


def test_pictures_are_cropped_around_the_centre(tmp_path: Path) -> None:
    wide = Image.new("RGB", (40, 20), "black")
    wide.paste("white", (6, 0, 34, 20))  # the filter reads a little beyond its box
    wide.save(tmp_path / "wide.png")
    assert bool((read_image(tmp_path / "wide.png", height=10, width=10) == 1).all())
    assert read_image(tmp_path / "wide.png", height=10).shape == (3, 10, 20)
    assert read_image(tmp_path / "wide.png", width=10).shape == (3, 5, 10)
    for height, width in ((7, 9), (33, 100), (1, 1), (41, 3)):  # no rounding leads outside
        size = (3, height, width)
        assert read_image(tmp_path / "wide.png", height=height, width=width).shape == size


def test_pictures_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no image at"):
        read_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("text")
    for path, message in ((tmp_path / "text.png", "not an image"), (tmp_path, "not a regular")):
        with pytest.raises(ValueError, match=f"cannot be read: {message}"):
            read_mask(path)


def test_the_size_of_a_file_is_that_of_its_pixels(tmp_path: Path) -> None:
    for orientation in (1, 3, 6, 8):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.new("RGB", (5, 9)).save(tmp_path / "x.png", exif=exif)
        assert image_size(tmp_path / "x.png") == tuple(read_image(tmp_path / "x.png").shape[1:])


@pytest.mark.parametrize("name", ["x.jpg", "x", "x.png.txt", ".png.d"])
def test_only_png_files_are_written(tmp_path: Path, name: str) -> None:
    """A PNG in a file that is called .jpg would open in some programs and not in others."""
    with pytest.raises(ValueError, match="images are saved as PNG, got ") as caught:
        save_png(tmp_path / name, torch.zeros(1, 2, 2))
    assert list(tmp_path.iterdir()) == []
    advised = str(caught.value).rpartition(" ")[2]
    save_png(tmp_path / advised, torch.zeros(1, 2, 2))
    save_png(tmp_path / "X.PNG", torch.zeros(1, 2, 2))
