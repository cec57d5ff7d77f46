"""Captioned drawings: 853 objects, each drawn by up to four artists, "a red apple, noto style".

The drawings are SVG files of npm packages, rendered by resvg on white; captions are the labels and
tags of Unicode's CLDR, which `emojibase-data` contains. ``fastdiff data emoji`` fetches and renders
them. The styles fluent (MIT) and noto (Apache-2.0) may be used for weights that are given away; the
licences of twemoji (CC-BY-4.0) and openmoji (CC-BY-SA-4.0) ask for more.

Held out are pairs of style and object: of each pair of styles, an eighth of the objects in one of
the two, so that the object is seen in the other and the style with other objects.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastdiff.data.config import EMOJI_STYLES, DataConfig, Split
from fastdiff.data.dataset import ImageDataset
from fastdiff.data.order import derive_seed
from fastdiff.data.packages import NpmPackage, cache_folder, fetch, missing, read_member
from fastdiff.extras import import_extra
from fastdiff.files import atomic_file

STYLES = {
    "fluent": NpmPackage(
        name="@iconify-json/fluent-emoji-flat",
        version="1.2.6",
        integrity="RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
        licence="MIT",
    ),
    "noto": NpmPackage(
        name="@iconify-json/noto",
        version="1.2.9",
        integrity="DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
        licence="Apache-2.0",
    ),
    "twemoji": NpmPackage(
        name="@iconify-json/twemoji",
        version="1.2.5",
        integrity="uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        licence="CC-BY-4.0",
    ),
    "openmoji": NpmPackage(
        name="@iconify-json/openmoji",
        version="1.2.29",
        integrity="vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ==",
        licence="CC-BY-SA-4.0",
    ),
}
CAPTIONS = NpmPackage(
    name="emojibase-data",
    version="17.0.0",
    integrity="Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
    licence="MIT",
)
SHIPPABLE = ("fluent", "noto")
"""Styles whose licences allow weights trained on them to be given away under Apache-2.0."""
OBJECT_GROUPS = (3, 4, 5, 6, 7)
"""Animals and nature, food, travel and places, activities, objects: no faces, people, symbols or
flags."""
NOT_IN_ALL = frozenset(
    ("1FACD", "1FABE", "1FADC", "1F6D8", "1FA8A", "1FA89", "1FA8E", "1FA8F")
)  # orca, leafless tree, root vegetable, landslide, trombone, harp, treasure chest, shovel
"""Objects of the five groups that one of the four styles lacks."""
MIN_SIZE, MAX_SIZE = 16, 512
RARE_TAG = 3
"""A tag is a caption if at most this many objects have it: "car", but not "food"."""
HELD_OUT_ONE_IN = 8
_VERSION = 1  # of the rendering; part of the cached file's name
_UNCOUNTED = frozenset(
    (
        *("american football", "bacon", "badminton", "baguette bread"),
        *("bowling", "bread", "broccoli", "building construction", "butter", "camping"),
        *("canned food", "construction", "cooked rice", "cooking", "coral", "cricket game"),
        *("curry rice", "dna", "dvd", "field hockey", "fire", "flatbread", "fog", "foggy"),
        *("fried shrimp", "garlic", "high voltage", "ice", "ice hockey", "lacrosse"),
        *("leafy green", "locked", "locked with key", "locked with pen", "luggage", "mate"),
        *("meat on bone", "money with wings", "mount fuji", "oden", "performing arts"),
        *("ping pong", "popcorn", "pouring liquid", "rock", "roll of paper", "rugby football"),
        *("sake", "salt", "shaved ice", "soap", "softball", "spaghetti", "Statue of Liberty"),
        *("sunrise over mountains", "sushi", "tennis", "Tokyo tower", "unlocked", "volleyball"),
        *("wood", "yarn"),
    )
)
_TIME = re.compile(r"\w+(?: o\W?clock|-thirty)")  # "one o'clock", with a typographic apostrophe
_PREPOSITION = re.compile(" (?:of|with|on|in|over|behind) ")
_SINGULAR_ENDINGS = ("ss", "us", "os")  # dress, cactus, rhinoceros


@dataclass(frozen=True)
class EmojiObject:
    """An object that all requested styles have drawn."""

    hexcode: str
    """Its code points, such as ``1F34E``."""
    label: str
    """Its CLDR name, such as ``red apple``."""
    tags: tuple[str, ...]
    """Other words for it, in alphabetical order."""

    def __str__(self) -> str:
        return self.label


@dataclass(frozen=True, kw_only=True)
class Emoji:
    """Objects and their drawings.

    Attributes:
        objects: in the order of Unicode's charts.
        drawings: style -> an SVG per object.
    """

    objects: tuple[EmojiObject, ...]
    drawings: Mapping[str, tuple[str, ...]]


def emoji_folder() -> Path:
    """The folder of the fetched packages and the rendered images."""
    return cache_folder() / "emoji"


def fetch_emoji(
    styles: Sequence[str] = SHIPPABLE, *, progress: Callable[[NpmPackage], None] | None = None
) -> Path:
    """Download the packages that are not in the cache; returns its folder.

    Raises:
        FileNotFoundError, ValueError: as `fastdiff.data.packages.fetch`.
    """
    fetch(_packages(styles), emoji_folder(), progress=progress)
    return emoji_folder()


def read_emoji(styles: Sequence[str] = SHIPPABLE) -> Emoji:
    """Objects that all four styles have drawn, with the drawings of `styles`.

    Which objects these are does not depend on `styles`, as the fetched captions list them, so that
    labels and split are the same for any choice of styles.

    Raises:
        FileNotFoundError: a package has not been fetched.
        ValueError: a tarball is not the pinned one.
    """
    folder = emoji_folder()
    if absent := missing(_packages(styles), folder):
        raise FileNotFoundError(
            f"{', '.join(map(str, absent))} not found in {folder}; fetch the drawings first: "
            f"fastdiff data emoji{_styles_flag(styles)}"
        )
    entries = read_member(folder, CAPTIONS, "en/data.json")
    sets = {
        style: (
            read_member(folder, STYLES[style], "icons.json"),
            read_member(folder, STYLES[style], "chars.json"),
        )
        for style in styles
    }
    return join(entries, sets)


def join(
    entries: Sequence[Mapping[str, Any]], sets: Mapping[str, tuple[Mapping[str, Any], Any]]
) -> Emoji:
    """Join captions and icon sets.

    entries: of emojibase-data's ``data.json``. sets: style -> (``icons.json``, ``chars.json``) of
    an Iconify package.
    """
    objects: list[EmojiObject] = []
    drawings: dict[str, list[str]] = {style: [] for style in sets}
    for entry in entries:
        if entry.get("group") not in OBJECT_GROUPS or entry["hexcode"] in NOT_IN_ALL:
            continue
        found = {style: _svg(entry["hexcode"], *parts) for style, parts in sets.items()}
        objects.append(
            EmojiObject(entry["hexcode"], entry["label"], tuple(sorted(entry.get("tags", ()))))
        )
        for style, svg in found.items():
            drawings[style].append(svg)
    return Emoji(
        objects=tuple(objects), drawings={style: tuple(svgs) for style, svgs in drawings.items()}
    )


def _svg(hexcode: str, icons: Mapping[str, Any], chars: Mapping[str, str]) -> str:
    """The drawing of a character, fitted into a square.

    Raises:
        ValueError: the set has no drawing of it.
    """
    code = hexcode.lower()
    name = chars.get(code) or chars.get("-".join(c for c in code.split("-") if c != "fe0f"))
    icon = icons["icons"].get(name) if name else None
    if icon is None:
        raise ValueError(f"the icon set {icons.get('prefix')!r} has no drawing of {hexcode}")
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="512" height="512" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
    )


def render(svg: str, size: int) -> np.ndarray:
    """A drawing on white: (3, size, size) uint8.

    Raises:
        ImportError: resvg-py is not installed.
    """
    resvg = import_extra("resvg_py", extra="emoji")
    png = resvg.svg_to_bytes(
        svg_string=svg, width=size, height=size, background="white", skip_system_fonts=True
    )
    with Image.open(io.BytesIO(bytes(png))) as image:
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def rendered(
    styles: Sequence[str],
    size: int,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Emoji, Tensor]:
    """All drawings of `styles`: (styles, objects, 3, size, size) uint8, from the cache if there.

    progress: called as progress(done, total) while images are rendered.

    Raises:
        FileNotFoundError, ValueError: as `read_emoji`; or size is not 16 to 512.
        ImportError: resvg-py is not installed, and the images are not in the cache.
    """
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise ValueError(f"emoji are rendered at {MIN_SIZE} to {MAX_SIZE} pixels, got {size}")
    emoji = read_emoji(styles)
    stacks = []
    total = len(emoji.objects) * len(styles)
    for number, style in enumerate(styles):
        path = emoji_folder() / _rendered_name(style, size)
        if not path.is_file():
            _render_all(emoji.drawings[style], size, path, progress, number, total)
        stacks.append(torch.from_numpy(np.load(path, mmap_mode="c")))
    shape = (len(emoji.objects), 3, size, size)
    for style, stack in zip(styles, stacks, strict=True):
        if tuple(stack.shape) != shape:
            path = emoji_folder() / _rendered_name(style, size)
            raise ValueError(
                f"{path}: expected images {shape}, got {tuple(stack.shape)}; delete the file"
            )
    return emoji, torch.stack(stacks)


def _render_all(
    svgs: Sequence[str],
    size: int,
    path: Path,
    progress: Callable[[int, int], None] | None,
    number: int,
    total: int,
) -> None:
    images = np.empty((len(svgs), 3, size, size), dtype=np.uint8)
    for index, svg in enumerate(svgs):
        images[index] = render(svg, size)
        if progress is not None:
            progress(number * len(svgs) + index + 1, total)
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, images)


def _rendered_name(style: str, size: int) -> str:
    """The cached file's name; it changes with the drawings and the way they are rendered."""
    facts = f"{_VERSION} {STYLES[style].integrity} {CAPTIONS.integrity} {size}"
    return f"{style}-{size}-{hashlib.sha256(facts.encode()).hexdigest()[:8]}.npy"


def open_emoji(config: DataConfig) -> ImageDataset:
    """The drawings of `config.styles` that are in its split, with captions.

    Labels are the objects, whatever the styles. Images are ordered by style, then by object.
    """
    emoji, images = rendered(config.styles, config.image_size)
    rare = _rare_tags(emoji.objects)
    chosen: list[Tensor] = []
    labels: list[int] = []
    captions: list[tuple[str, ...]] = []
    for style, stack in zip(config.styles, images, strict=True):
        for index, item in enumerate(emoji.objects):
            if (held_out_style(item, style) == style) != (config.split == "held-out"):
                continue
            chosen.append(stack[index])
            labels.append(index)
            captions.append(captions_of(item, style, rare=rare))
    pixels = torch.stack(chosen)
    return ImageDataset(
        pixels,
        torch.tensor(labels),
        tuple(item.label for item in emoji.objects),
        fingerprint=_fingerprint(pixels, captions),
        captions=tuple(captions),
    )


def held_out_style(item: EmojiObject, style: str) -> str | None:
    """Which of a style and its partner (fluent and noto, twemoji and openmoji) is held out.

    None for seven of eight objects. It is decided by a hash of the object's code points.
    """
    pair = SHIPPABLE if style in SHIPPABLE else tuple(s for s in EMOJI_STYLES if s not in SHIPPABLE)
    number = derive_seed(0, f"emoji-split/{pair[0]}/{item.hexcode}")
    if number % HELD_OUT_ONE_IN:
        return None
    return pair[number // HELD_OUT_ONE_IN % 2]


def caption(label: str, style: str = "") -> str:
    """ "a red apple, noto style"; without the style if it is empty."""
    words = label if _no_article(label) else f"{_article(label)} {label}"
    return f"{words}, {style} style" if style else words


def captions_of(item: EmojiObject, style: str, *, rare: Mapping[str, int]) -> tuple[str, ...]:
    """The captions of a drawing: the full one first, then without style or article, then by tags.

    rare: tags that few objects have.
    """
    words = [caption(item.label, style), caption(item.label), f"{item.label}, {style} style"]
    words += [f"{tag}, {style} style" for tag in item.tags if tag in rare and tag != item.label]
    return tuple(dict.fromkeys(words))


def _rare_tags(objects: Sequence[EmojiObject]) -> dict[str, int]:
    """Tags that at most RARE_TAG objects have, and that name no other object, with their number."""
    counts = Counter(tag for item in objects for tag in item.tags)
    labels = {item.label for item in objects}
    return {tag: count for tag, count in counts.items() if count <= RARE_TAG and tag not in labels}


def _no_article(label: str) -> bool:
    if label in _UNCOUNTED or label.startswith("globe showing") or _TIME.fullmatch(label):
        return True
    head = _PREPOSITION.split(label, maxsplit=1)[0]
    return head.endswith("s") and not head.endswith(_SINGULAR_ENDINGS)


def _article(label: str) -> str:
    if label.lower().startswith(("uni", "one", "euro", "ewe")):
        return "a"
    return "an" if label[0].lower() in "aeiou" or label.startswith(("hour", "x-")) else "a"


def _fingerprint(pixels: Tensor, captions: Sequence[tuple[str, ...]]) -> str:
    digest = hashlib.blake2b(pixels.numpy().data, digest_size=16)
    digest.update(repr(list(captions)).encode())
    return digest.hexdigest()


def _packages(styles: Sequence[str]) -> list[NpmPackage]:
    return [*(STYLES[style] for style in styles), CAPTIONS]


def _styles_flag(styles: Sequence[str]) -> str:
    return "" if tuple(styles) == SHIPPABLE else f" --styles {' '.join(styles)}"


def split_sizes(emoji: Emoji) -> dict[Split, int]:
    """Number of drawings in each split."""
    held = sum(held_out_style(item, s) == s for s in emoji.drawings for item in emoji.objects)
    return {"train": len(emoji.objects) * len(emoji.drawings) - held, "held-out": held}
