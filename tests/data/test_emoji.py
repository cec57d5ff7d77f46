"""Captioned drawings: eight objects of the two sets whose licences allow it (tests/data/emoji)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdiff.cli import main
from fastdiff.data import DataConfig, emoji, open_dataset
from fastdiff.data.emoji import EmojiObject, caption, held_out_style, join, render
from tests.support.drawings import put_drawings, read

OBJECTS = ["swan", "grapes", "mango", "red apple", "anchor", "envelope", "key", "pill"]
CONFIG = DataConfig(source="emoji", channels=3, image_size=32)


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The eight objects in the cache, as if they had been fetched."""
    return put_drawings(tmp_path, monkeypatch)


def test_joined_are_objects_that_all_styles_have(fetched: Path) -> None:
    found = emoji.read_emoji()
    assert [item.label for item in found.objects] == OBJECTS  # no face, no orca
    assert found.objects[3].hexcode == "1F34E"
    assert "apple" in found.objects[3].tags
    swan = found.drawings["fluent"][0]
    assert 'viewBox="0 0 32 33"' in swan  # its own height


def test_a_missing_drawing_is_named() -> None:
    parts = read("noto")
    del parts["chars"]["1f511"]
    with pytest.raises(ValueError, match="'noto' has no drawing of 1F511"):
        join(read("data"), {"noto": (parts["icons"], parts["chars"])})


def test_the_colours_are_those_of_the_drawing(fetched: Path) -> None:
    """The middle of Fluent's apple has the fill of its path; corners are white; nothing is cut."""
    pytest.importorskip("resvg_py")
    apple = render(emoji.read_emoji().drawings["fluent"][3], 64)
    assert apple.shape == (3, 64, 64)
    assert apple[:, 40, 32].tolist() == [0xF8, 0x31, 0x2F]
    assert apple[:, 12, 24].tolist() == [0x00, 0xD2, 0x6A]  # the leaf
    assert (apple[:, [0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()


def test_a_tall_drawing_is_fitted_and_not_stretched() -> None:
    """A square of 10 x 10 in a drawing of 10 x 20 stays a square, centred."""
    pytest.importorskip("resvg_py")
    icons = {
        "icons": {"x": {"body": '<path fill="#000" d="M0 5h10v10H0z"/>', "height": 20}},
        "width": 10,
        "height": 10,
    }
    svg = emoji._svg("1", icons, {"1": "x"})
    dark = render(svg, 40)[0] < 128
    rows, columns = np.nonzero(dark.any(1))[0], np.nonzero(dark.any(0))[0]
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (10, 29, 10, 29)


def test_the_splits_are_disjoint_and_complete(fetched: Path) -> None:
    pytest.importorskip("resvg_py")
    train, held = (open_dataset(replace(CONFIG, split=s)) for s in ("train", "held-out"))
    pairs = [
        (caption[0], int(label))
        for data in (train, held)
        for caption, label in zip(data.captions, data.labels, strict=True)
    ]
    assert [words[0] for words in held.captions] == ["a pill, fluent style", "a mango, noto style"]
    assert len(pairs) == len(set(pairs)) == 16
    assert emoji.split_sizes(emoji.read_emoji()) == {"train": len(train), "held-out": len(held)}
    assert train.classes == tuple(OBJECTS)
    number = OBJECTS.index("key")
    _, images = emoji.rendered(("fluent", "noto"), 32)
    for data in (train, held):
        for image, label, words in zip(data.images, data.labels, data.captions, strict=True):
            if label == number:
                style = "noto" if "noto" in words[0] else "fluent"
                assert words[0] == f"a key, {style} style"
                assert torch.equal(image, images[int(style == "noto"), number])


def test_held_out_are_pairs_never_objects() -> None:
    """An eighth of the objects in one style of a pair, half of them in each."""
    items = [EmojiObject(f"{code:X}", "x", ()) for code in range(8000)]
    held = [held_out_style(item, "fluent") for item in items]
    assert held == [held_out_style(item, "noto") for item in items]
    counts = {style: held.count(style) for style in ("fluent", "noto", None)}
    assert sum(counts.values()) == 8000
    for style in ("fluent", "noto"):
        assert abs(counts[style] - 500) < 4 * (8000 * 15 / 256) ** 0.5
    other = [held_out_style(item, "twemoji") for item in items]
    assert set(other) == {"twemoji", "openmoji", None}
    both = sum(a is not None and b is not None for a, b in zip(held, other, strict=True))
    assert abs(both - 125) < 4 * 125**0.5  # decided independently


def test_the_split_never_changes() -> None:
    """Every published number depends on it."""
    held = {"1F96D": "noto", "1F48A": "fluent", "1F4C1": "fluent", "1F514": "noto"}
    codes = [*held, "1F34E", "1F347", "1F511", "2693"]
    found = {code: held_out_style(EmojiObject(code, "", ()), "noto") for code in codes}
    assert {code: style for code, style in found.items() if style} == held


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("red apple", "a red apple"),
        ("anchor", "an anchor"),
        ("grapes", "grapes"),
        ("glass of milk", "a glass of milk"),
        ("nest with eggs", "a nest with eggs"),
        ("cactus", "a cactus"),
        ("rhinoceros", "a rhinoceros"),
        ("hourglass done", "an hourglass done"),
        ("unicorn", "a unicorn"),
        ("umbrella", "an umbrella"),
        ("x-ray", "an x-ray"),
        ("one o\u2019clock", "one o\u2019clock"),
        ("popcorn", "popcorn"),
    ],
)
def test_articles(label: str, words: str) -> None:
    assert caption(label) == words
    assert caption(label, "noto") == f"{words}, noto style"


def test_captions_begin_with_the_full_one(fetched: Path) -> None:
    pytest.importorskip("resvg_py")
    data = open_dataset(CONFIG)
    words = dict(zip([c[0] for c in data.captions], data.captions, strict=True))
    apple = words["a red apple, fluent style"]
    assert apple[:3] == ("a red apple, fluent style", "a red apple", "red apple, fluent style")
    assert "ripe, fluent style" in apple
    assert all("fluent" in c or c == "a red apple" for c in apple)


def test_images_are_rendered_once_and_the_cache_notices_new_drawings(
    fetched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("resvg_py")
    seen: list[tuple[int, int]] = []
    _, first = emoji.rendered(("noto",), 32, progress=lambda *at: seen.append(at))
    assert seen == [(number, 8) for number in range(1, 9)]
    monkeypatch.setattr(emoji, "render", None)
    assert torch.equal(emoji.rendered(("noto",), 32)[1], first)
    changed = replace(emoji.CAPTIONS, integrity="other")
    assert emoji._rendered_name("noto", 32) != emoji._rendered_name("noto", 33)
    monkeypatch.setattr(emoji, "CAPTIONS", changed)
    assert not (fetched / emoji._rendered_name("noto", 32)).exists()


def test_a_cached_file_of_another_shape_is_refused(fetched: Path) -> None:
    pytest.importorskip("resvg_py")
    np.save(fetched / emoji._rendered_name("noto", 32), np.zeros((5, 3, 32, 32), np.uint8))
    with pytest.raises(ValueError, match=r"expected images \(8, 3, 32, 32\).*delete the file"):
        emoji.rendered(("noto",), 32)


def test_the_error_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"fastdiff data emoji$"):
        open_dataset(CONFIG)
    with pytest.raises(FileNotFoundError, match=r"data emoji --styles noto twemoji$"):
        open_dataset(replace(CONFIG, styles=("noto", "twemoji")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 1}, "channels must be 3 for emoji, got 1"),
        ({"styles": ("noto", "noto")}, "styles must be different ones of fluent"),
        ({"styles": ()}, "got none"),
        ({"styles": ("apple",)}, "got apple"),
        ({"path": "x"}, "path must be empty with source 'emoji'"),
        ({"scenes": 0}, "scenes must be at least 1"),
    ],
)
def test_wrong_configs(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


def test_the_command_writes_a_sheet(
    fetched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("resvg_py")
    sheet = tmp_path / "sheet.png"
    code = main(["data", "emoji", "--size", "32", "--sheet", str(sheet), "--count", "4"])
    out = capsys.readouterr().out
    assert code == 0
    assert "8 in 2 styles" in out
    assert "fluent MIT, noto Apache-2.0" in out
    assert sheet.is_file()
    for words, message in (
        (["--size", "8"], "rendered at 16 to 512 pixels, got 8"),
        (["--count", "3"], "add --sheet"),
        (["--count", "0", "--sheet", "x.png"], "must be 1 to 1024, got 0"),
    ):
        assert main(["data", "emoji", *words]) == 2
        assert message in capsys.readouterr().err
