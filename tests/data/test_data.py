"""Reading images: unusual files in users' folders, the digits, shards, the order."""

from __future__ import annotations

import gzip
import io
import os
import struct
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.data import (
    DataConfig,
    DataOrder,
    describe_folder,
    digits_split,
    open_dataset,
    shards,
)


def folder_config(path: Path, **changes: object) -> DataConfig:
    defaults = {"source": "folder", "path": str(path), "image_size": 8, "channels": 3}
    return DataConfig(**{**defaults, **changes})  # type: ignore[arg-type]


def halves(left: int, right: int, size: int = 16) -> np.ndarray:
    """(size, size) uint8: one grey on the left, another on the right."""
    pixels = np.full((size, size), left, np.uint8)
    pixels[:, size // 2 :] = right
    return pixels


def png_bytes(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def corners(image: torch.Tensor) -> list[float]:
    """Mean over channels of the four corners: top left, top right, bottom left, bottom right."""
    grey = image.mean(0)
    return [float(grey[y, x]) for y in (0, -1) for x in (0, -1)]


def write_only(folder: Path, name: str, image: Image.Image, **options: object) -> torch.Tensor:
    """The one image of a fresh folder, read back through the data set."""
    folder.mkdir()
    image.save(folder / name, **options)
    return open_dataset(folder_config(folder))[0][0]


def test_palette_with_transparency_lies_on_the_background(tmp_path: Path) -> None:
    image = Image.fromarray(halves(0, 1), mode=None).convert("P")
    image.putdata(halves(0, 1).flatten().tolist())
    image.putpalette([0, 0, 0, 255, 0, 0])
    read = write_only(tmp_path / "p", "a.png", image, transparency=0)
    torch.testing.assert_close(read[:, 0, 0], torch.tensor([1.0, 1.0, 1.0]))
    torch.testing.assert_close(read[:, 0, -1], torch.tensor([1.0, -1.0, -1.0]))
    blue = open_dataset(folder_config(tmp_path / "p", background=(0, 0, 255)))[0][0]
    torch.testing.assert_close(blue[:, 0, 0], torch.tensor([-1.0, -1.0, 1.0]))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_half_transparent_pixels_are_mixed_with_white(tmp_path: Path, mode: str) -> None:
    image = Image.new(mode, (16, 16), (0, 0, 0, 51) if mode == "RGBA" else (0, 51))  # 20% black
    read = write_only(tmp_path / "t", "a.png", image)
    torch.testing.assert_close(read[:, 3, 3], torch.full((3,), 0.8 * 2 - 1), atol=0.01, rtol=0)


@pytest.mark.parametrize("dtype", [">u2", "<u2"])
def test_sixteen_bits_keep_their_range(tmp_path: Path, dtype: str) -> None:
    pixels = np.where(halves(0, 1) == 1, 65535, 32768).astype(np.uint16)
    if dtype == "<u2":
        read = write_only(tmp_path / "i", "a.png", Image.fromarray(pixels))
    else:
        image = Image.frombytes("I;16B", (16, 16), pixels.astype(dtype).tobytes())
        read = write_only(tmp_path / "i", "a.tif", image)
    assert corners(read)[0] == pytest.approx(0.0, abs=0.01)
    assert corners(read)[1] == pytest.approx(1.0, abs=0.01)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side: turn clockwise to show
    image = Image.fromarray(halves(0, 255))
    read = write_only(tmp_path / "e", "a.jpg", image, exif=exif, quality=95)
    # left half black, turned clockwise: the top half is black
    assert corners(read) == pytest.approx([-1, -1, 1, 1], abs=0.05)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_metadata_does_not_decide_whether_pixels_are_read(tmp_path: Path) -> None:
    """Orientation 6 next to an XResolution that is stored as text; and truncated EXIF."""
    entries = struct.pack("<HHIHxx", 0x0112, 3, 1, 6) + struct.pack("<HHI4s", 0x011A, 2, 3, b"72")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)
    image = Image.fromarray(halves(0, 255))
    read = write_only(tmp_path / "text", "a.jpg", image, exif=exif, quality=95)
    assert corners(read) == pytest.approx([-1, -1, 1, 1], abs=0.05)
    read = write_only(tmp_path / "cut", "a.jpg", image, exif=exif[:20], quality=95)
    assert corners(read) == pytest.approx([-1, 1, -1, 1], abs=0.05)


@pytest.mark.skipif(os.name == "nt", reason="names are not bytes there")
def test_a_class_name_that_is_not_utf8_is_refused_at_once(tmp_path: Path) -> None:
    """config.json could not contain it. File names can be anything."""
    folder = os.fsdecode(os.fsencode(tmp_path / "set") + b"/caf\xe9")
    os.makedirs(folder)
    Image.fromarray(halves(0, 255)).save(os.path.join(folder, "a.png"))
    with pytest.raises(
        ValueError, match=r"the class folder caf\\udce9 in .*set contains unprintable"
    ) as error:
        open_dataset(folder_config(tmp_path / "set"))
    os.rename(folder, tmp_path / "set" / "cafe")  # as the message says
    assert str(error.value).isprintable()
    broken = os.fsdecode(os.fsencode(tmp_path / "set" / "cafe") + b"/\xe9.png")
    Path(broken).write_bytes(b"no image")
    with pytest.warns(UserWarning, match=r"unreadable file in .*udce9.png \(not an image"):
        assert open_dataset(folder_config(tmp_path / "set")).classes == ("cafe",)


def test_a_folder_is_described_without_reading_all_of_it(tmp_path: Path) -> None:
    grey = Image.fromarray(halves(0, 255))
    palette = grey.convert("P")
    grey.save(write := tmp_path / "a.png")
    palette.save(tmp_path / "b.gif")
    (tmp_path / "c.png").write_bytes(b"no image")
    assert describe_folder(tmp_path) == (1, 0)
    for name in ("x", "y"):
        (tmp_path / "named" / name).mkdir(parents=True)
        grey.save(tmp_path / "named" / name / "a.png")
    assert describe_folder(tmp_path / "named") == (1, 2)
    coloured = Image.new("RGB", (4, 4), (255, 0, 0))
    coloured.convert("P").save(tmp_path / "named" / "y" / "b.png")
    assert describe_folder(tmp_path / "named") == (3, 2)
    with pytest.raises(FileNotFoundError, match="set path to a folder of images"):
        describe_folder(write)


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # magenta + yellow = red
    read = write_only(tmp_path / "c", "a.jpg", image, quality=95)
    assert read[0].mean() > 0.8
    assert read[1:].mean() < -0.8


def test_first_frame_of_an_animation_counts(tmp_path: Path) -> None:
    frames = [Image.new("L", (16, 16), level) for level in (0, 128, 255)]
    read = write_only(
        tmp_path / "g", "a.gif", frames[0], save_all=True, append_images=frames[1:], duration=50
    )
    torch.testing.assert_close(read, torch.full((3, 8, 8), -1.0))


def test_one_pixel_and_greyscale(tmp_path: Path) -> None:
    read = write_only(tmp_path / "one", "a.png", Image.new("L", (1, 1), 255))
    torch.testing.assert_close(read, torch.ones(3, 8, 8))


def test_the_centre_is_cropped_and_resized_with_antialias(tmp_path: Path) -> None:
    stripes = np.zeros((64, 192), np.uint8)
    stripes[:, ::2] = 255  # one-pixel stripes must average to grey, not alias to black or white
    stripes[:, :64] = 0
    stripes[:, 128:] = 0
    read = write_only(tmp_path / "wide", "a.png", Image.fromarray(stripes))
    assert read[:, :, 1:-1].abs().max() < 0.05


def test_unreadable_files_are_named_counted_and_skipped(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
    good = png_bytes(halves(0, 255))
    (tmp_path / "cat/good.png").write_bytes(good)
    (tmp_path / "cat/truncated.png").write_bytes(good[: len(good) // 2])
    (tmp_path / "cat/zero.jpg").write_bytes(b"")
    (tmp_path / "dog/words.png").write_text("not an image")
    (tmp_path / "dog/b.png").write_bytes(good)
    (tmp_path / "dog/notes.txt").write_text("no image by its name either: not counted")
    with pytest.warns(UserWarning, match=r"skipped 3 unreadable files") as caught:
        data = open_dataset(folder_config(tmp_path))
    assert len(caught) == 1, "one summary, not a warning per file"
    assert [item.name for item in data.skipped] == [
        "cat/truncated.png",
        "cat/zero.jpg",
        "dog/words.png",
    ]
    assert all(item.name in str(caught[0].message) for item in data.skipped)
    assert (len(data), data.classes, data.labels.tolist()) == (2, ("cat", "dog"), [0, 1])


def test_decompression_bombs_are_unreadable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    (tmp_path / "bomb.png").write_bytes(png_bytes(halves(0, 255)))  # 256 pixels > 2 * 40
    (tmp_path / "small.png").write_bytes(png_bytes(halves(0, 255, size=4)))
    with pytest.warns(UserWarning, match="bomb.png"):
        data = open_dataset(folder_config(tmp_path))
    assert len(data) == 1


def test_empty_folder_missing_folder_and_mixture_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no images in"):
        open_dataset(folder_config(tmp_path))
    with pytest.raises(FileNotFoundError, match="no folder at"):
        open_dataset(folder_config(tmp_path / "nowhere"))
    (tmp_path / "bad.png").write_text("x")
    with (
        pytest.warns(UserWarning, match="bad.png"),
        pytest.raises(ValueError, match="all 1 files are unreadable"),
    ):
        open_dataset(folder_config(tmp_path))
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/a.png").write_bytes(png_bytes(halves(0, 255)))
    with pytest.raises(ValueError, match="both images"):
        open_dataset(folder_config(tmp_path))


def test_folder_order_does_not_depend_on_the_file_system(tmp_path: Path) -> None:
    names = [f"{kind}/{number:02d}.png" for kind in ("a", "b") for number in range(5)]
    for level, name in reversed(list(enumerate(names))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png_bytes(np.full((8, 8), level * 20, np.uint8)))
    data = open_dataset(folder_config(tmp_path, channels=1))
    assert data.images[:, 0, 0, 0].tolist() == [level * 20 for level in range(10)]
    assert data.labels.tolist() == [0] * 5 + [1] * 5
    images, labels = data.batch(torch.tensor([9, 0]))
    torch.testing.assert_close(images[0], torch.full((1, 8, 8), 180 / 127.5 - 1))
    assert labels.tolist() == [1, 0]


def test_shards_are_read_with_their_classes(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    for shard in range(2):
        with tarfile.open(tmp_path / f"part-{shard}.tar", "w") as tar:
            for number in range(3):
                level, label = 100 * shard + number * 10, 8 + number
                broken = (shard, number) == (1, 1)
                png = b"junk" if broken else png_bytes(np.full((8, 8), level, np.uint8))
                for ending, content in (("png", png), ("cls", str(label).encode())):
                    info = tarfile.TarInfo(f"image{number}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    config = DataConfig(
        source="shards", path=str(tmp_path / "part-*.tar"), image_size=8, channels=1
    )
    with pytest.warns(UserWarning, match=r"part-1\.tar:image1"):
        data = open_dataset(config)
    assert data.images[:, 0, 0, 0].tolist() == [0, 10, 20, 100, 120]
    assert data.classes == ("8", "9", "10")
    assert data.labels.tolist() == [0, 1, 2, 0, 2]


def test_a_shell_command_is_no_shard(tmp_path: Path) -> None:
    witness = tmp_path / "ran"
    with pytest.raises(FileNotFoundError):
        open_dataset(DataConfig(source="shards", path=f"pipe:touch {witness}", channels=1))
    assert not witness.exists()


def test_digits_split_is_stratified_and_complete() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    raw = datasets.load_digits()
    scans = {split: digits_split(split, image_size=8) for split in ("train", "held-out")}
    assert [len(scans[split][1]) for split in scans] == [1437, 360]
    joined = torch.cat([images for images, _ in scans.values()]).flatten(1)
    original = torch.from_numpy(raw.images).float().flatten(1) / 8 - 1
    order = np.lexsort(joined.numpy().T)
    expected = np.lexsort(original.numpy().T)
    np.testing.assert_array_equal(joined[order], original[expected])  # nothing lost, nothing twice
    counts = np.bincount(raw.target)
    held = np.bincount(scans["held-out"][1])
    assert np.abs(held - counts * 360 / 1797).max() < 1


def test_digits_are_enlarged_with_pillows_bicubic_kernel() -> None:
    pytest.importorskip("sklearn")
    small, _ = digits_split("held-out", image_size=8)
    large, _ = digits_split("held-out")
    assert large.shape == (360, 1, 32, 32)
    # Keys' cubic with a = -0.75, at the four phases of a 4x enlargement, written out by hand
    a = -0.75
    weights = torch.zeros(32, 8, dtype=torch.float64)
    for out in range(32):
        position = (out + 0.5) / 4 - 0.5
        base = int(np.floor(position))
        for tap in range(base - 1, base + 3):
            d = abs(position - tap)
            if d <= 1:
                w = (a + 2) * d**3 - (a + 3) * d**2 + 1
            else:
                w = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            weights[out, min(max(tap, 0), 7)] += w
    expected = (weights @ small.double() @ weights.T).clamp(-1, 1)
    torch.testing.assert_close(large.double(), expected, atol=2e-6, rtol=0)


def test_every_epoch_is_a_permutation_and_a_step_number_is_enough() -> None:
    order = DataOrder(10, 4, seed=3)
    seen = [order.batch(step) for step in range(15)]  # 60 images: six epochs
    indices = torch.cat([batch for batch, _ in seen]).reshape(6, 10)
    assert (indices.sort(dim=1).values == torch.arange(10)).all()
    assert torch.cat([epochs for _, epochs in seen]).tolist() == [n // 10 for n in range(60)]
    assert len({tuple(row.tolist()) for row in indices}) == 6, "epochs repeat their order"
    fresh = DataOrder(10, 4, seed=3)  # a resumed run asks for step 7 first
    assert torch.equal(fresh.batch(7)[0], seen[7][0])
    assert not torch.equal(
        DataOrder(10, 40, seed=4).batch(0)[0], DataOrder(10, 40, seed=3).batch(0)[0]
    )


def test_config_mistakes_say_what_to_do() -> None:
    for changes, message in (
        ({"source": "folder"}, "needs a path"),
        ({"path": "x"}, "must be empty"),
        ({"channels": 3}, "must be 1"),
        ({"channels": 2}, "1 \\(grey\\) or 3"),
        ({"image_size": 0}, "at least 1"),
        ({"background": (0, 0, 300)}, "0 to 255"),
    ):
        with pytest.raises(ValueError, match=message):
            DataConfig(**changes)  # type: ignore[arg-type]


def test_nothing_warns_on_a_clean_folder(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png_bytes(halves(0, 255)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_dataset(folder_config(tmp_path)).skipped == []


def test_a_truncated_shard_keeps_what_can_be_read(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    with tarfile.open(tmp_path / "whole.tar", "w") as tar:
        for number in range(4):
            png = png_bytes(np.full((8, 8), number * 50, np.uint8))
            info = tarfile.TarInfo(f"image{number}.png")
            info.size = len(png)
            tar.addfile(info, io.BytesIO(png))
    whole = (tmp_path / "whole.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: 2 * 1024 + 520])  # a member is 512 + 512 bytes
    with pytest.warns(UserWarning, match=r"skipped 1 unreadable file .*cut\.tar"):
        data = open_dataset(
            DataConfig(source="shards", path=str(tmp_path / "cut.tar"), image_size=8, channels=1)
        )
    assert data.images[:, 0, 0, 0].tolist() == [0, 50]
    assert data.classes == ()


def shard_config(path: Path) -> DataConfig:
    return DataConfig(source="shards", path=str(path), image_size=8, channels=1)


def tar_of(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_a_compressed_bomb_in_a_shard_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("webdataset")
    monkeypatch.setattr(shards, "MAX_MEMBER_BYTES", 2**20)
    good = png_bytes(halves(0, 255))
    plain = tar_of(tmp_path / "a.tar", [("one.png", b"\0" * 2**21), ("two.png", good)])
    (tmp_path / "bomb.tar.gz").write_bytes(gzip.compress(plain.read_bytes()))
    with pytest.warns(UserWarning, match=r"skipped 1 .*bomb\.tar\.gz:one \(larger than 1 MiB\)"):
        data = open_dataset(shard_config(tmp_path / "bomb.tar.gz"))
    assert len(data) == 1


def test_names_in_a_shard_lead_nowhere(tmp_path: Path) -> None:
    """Members are read, never unpacked: paths, links and webdataset's own keys are only names."""
    pytest.importorskip("webdataset")
    good = png_bytes(halves(0, 255))
    names = ["../../evil.png", "/tmp/evil.png", "a.__key__", "a.__url__", "pipe:touch x.png"]
    path = tar_of(tmp_path / "a.tar", [(name, good) for name in names])
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.warns(UserWarning, match="duplicate"):
        data = open_dataset(shard_config(path))
    assert len(data) == 3
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.tar"]


def test_a_folder_that_matches_as_a_shard_is_named_as_what_it_is(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    (tmp_path / "a.tar").mkdir()
    tar_of(tmp_path / "b.tar", [("x.png", png_bytes(halves(0, 255)))])
    with pytest.warns(UserWarning, match=r"a\.tar .*Is a directory"):
        assert len(open_dataset(shard_config(tmp_path / "*.tar"))) == 1


def test_whatever_a_plugin_raises_the_file_is_skipped_and_nothing_waits(tmp_path: Path) -> None:
    good = png_bytes(halves(0, 255))
    (tmp_path / "good.png").write_bytes(good)
    file = io.BytesIO()
    Image.fromarray(halves(0, 255)).convert("RGB").save(file, "DDS")
    raw = bytearray(file.getvalue())
    raw[80:84] = struct.pack("<I", 0)  # pixel format flags: NotImplementedError in Pillow
    (tmp_path / "a.dds").write_bytes(raw)
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for a writer
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "endless.png").symlink_to("/dev/zero")
    # PostScript is a program that Pillow would give to Ghostscript, whatever the file is called
    Image.fromarray(halves(0, 255)).save(tmp_path / "program.eps")
    (tmp_path / "program.eps").rename(tmp_path / "program.png")
    with pytest.warns(UserWarning, match="skipped 5 unreadable files"):
        data = open_dataset(folder_config(tmp_path))
    reasons = {item.name: item.reason for item in data.skipped}
    assert reasons["pipe.png"] == reasons["endless.png"] == "not a regular file"
    assert reasons["program.png"] == "not an image"
    assert len(data) == 1


def test_a_full_disk_for_the_decoded_images_says_where_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(png_bytes(halves(0, 255)))
    full = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115
    monkeypatch.setattr("tempfile.TemporaryFile", lambda: full)
    with pytest.raises(OSError, match=r"decoded images of .*No space left.*set TMPDIR"):
        open_dataset(folder_config(tmp_path))


def test_the_fingerprint_names_pixels_classes_and_order(tmp_path: Path) -> None:
    def fingerprint(name: str, files: dict[str, np.ndarray]) -> str:
        for file, pixels in files.items():
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_bytes(png_bytes(pixels))
        return open_dataset(folder_config(tmp_path / name)).fingerprint

    one, other = halves(0, 255), halves(255, 0)
    first = fingerprint("1", {"a/1.png": one, "b/2.png": other})
    assert first == fingerprint("2", {"a/x.png": one, "b/y.png": other})
    assert first != fingerprint("3", {"a/1.png": other, "b/2.png": one})
    assert first != fingerprint("4", {"a/1.png": one, "c/2.png": other})
    assert first != fingerprint("5", {"a/1.png": one, "b/2.png": other, "b/3.png": one})
