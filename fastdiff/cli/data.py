"""``fastdiff data``: fetch and render the captioned data sets, and look at them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fastdiff.cli.console import print_pairs
from fastdiff.cli.parsing import OptionalInt, OptionalPath, parse

Style = Literal["fluent", "noto", "twemoji", "openmoji"]
DEFAULT_SIZE, DEFAULT_COUNT = 64, 48
MAX_COUNT = 1024
_CELL, COLUMNS = 96, 8


@dataclass(frozen=True, kw_only=True)
class Data:
    """Fetch and render a captioned data set, and write a sheet of it.

    emoji: 853 objects in up to four styles. Their packages are downloaded with your npm, at pinned
    versions whose hashes are checked, and rendered into the user's cache (FASTDIFF_CACHE, else
    ~/.cache/fastdiff); what is there already is kept. scenes: shapes, letters and digits, rendered
    when they are needed; nothing is downloaded or stored.

    Examples:
      fastdiff data emoji
      fastdiff data emoji --styles fluent noto twemoji openmoji --size 128 --sheet out/emoji.png
      fastdiff data scenes --count 24 --sheet out/scenes.png
    """

    source: Annotated[
        Literal["emoji", "scenes"], tyro.conf.Positional, tyro.conf.arg(metavar="emoji|scenes")
    ]
    """The data set."""
    size: OptionalInt = None
    """Side of the images in pixels, 16 to 512; 64 if it is not given."""
    styles: tuple[Style, ...] = ("fluent", "noto")
    """Styles of emoji. Weights trained on fluent (MIT) and noto (Apache-2.0) may be given away;
    twemoji is CC-BY-4.0, openmoji CC-BY-SA-4.0."""
    split: Literal["train", "held-out"] = "train"
    """The part that the sheet shows."""
    sheet: OptionalPath = None
    """A PNG with --count images, evenly spread over the data set, and their captions."""
    count: OptionalInt = None
    """Images on the sheet, 1 to 1024; 48 if it is not given."""


def main(words: Sequence[str]) -> int:
    options = parse(Data, words, prog="fastdiff data")
    return 0 if options is None else run(options)


def run(options: Data) -> int:
    from fastdiff.data import DataConfig

    count = DEFAULT_COUNT if options.count is None else options.count
    if not 1 <= count <= MAX_COUNT:
        raise ValueError(f"--count must be 1 to {MAX_COUNT}, got {count}")
    if options.count is not None and options.sheet is None:
        raise ValueError("--count is the number of images on a sheet; add --sheet FILE.png")
    config = DataConfig(
        source=options.source,
        image_size=DEFAULT_SIZE if options.size is None else options.size,
        channels=3,
        split=options.split,
        styles=options.styles,
        scenes=count,
    )
    pairs = _prepare_emoji(config) if options.source == "emoji" else []
    if options.sheet is not None:
        _write_sheet(config, count, options.sheet)
        pairs.append(("sheet", str(options.sheet)))
    if options.source == "scenes" and not pairs:
        raise ValueError("scenes need no preparation; add --sheet FILE.png to look at some")
    print_pairs(pairs)
    return 0


def _prepare_emoji(config: Any) -> list[tuple[str, str]]:
    """Fetch and render; facts to print."""
    from fastdiff.data import emoji

    with _bar("fetching", len(config.styles) + 1) as show:
        done = iter(range(1, len(config.styles) + 2))
        emoji.fetch_emoji(config.styles, progress=lambda _: show(next(done), None))
    with _bar("rendering", 1) as show:
        found, images = emoji.rendered(config.styles, config.image_size, progress=show)
    sizes = emoji.split_sizes(found)
    licences = [f"{style} {emoji.STYLES[style].licence}" for style in config.styles]
    return [
        ("folder", str(emoji.emoji_folder())),
        ("objects", f"{len(found.objects)} in {len(config.styles)} styles"),
        ("images", f"{config.image_size} x {config.image_size}, {images.numel() / 2**20:.0f} MiB"),
        ("training", f"{sizes['train']:,}"),
        ("held out", f"{sizes['held-out']:,}"),
        ("licences", ", ".join(licences)),
    ]


def _write_sheet(config: Any, count: int, path: Path) -> None:
    import torch

    from fastdiff.data import open_dataset
    from fastdiff.images import contact_sheet, save_png

    dataset = open_dataset(config)
    chosen = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long()
    captions = [dataset.captions[index][0] for index in chosen.tolist()]
    columns = min(COLUMNS, len(chosen))
    images = dataset.batch(chosen)[0]
    sheet = contact_sheet(
        images, columns=columns, captions=captions, cell=_CELL, resample="nearest"
    )
    save_png(path, sheet)


@contextlib.contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[int, int | None], None]]:
    """A progress bar on stderr, if that is a terminal: show(done, total or None)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(bar_width=24), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as b:
        task = b.add_task(what, total=total)
        yield lambda done, of: b.update(task, completed=done, total=of or total)
