"""Rendered scenes: shapes, letters and digits with captions that say what is to be seen.

    "a large red circle in the upper left"       place
    "three small green stars"                    count
    "a blue letter A above a yellow square"      relation

Scene `number` of `seed` is a function of the two, so there is no end of them and nothing to store.
Captions are held out whole, by a hash of their words: one that was trained on is in no held-out
scene. `fastdiff.data.scene_check` reads a picture back and says what of the caption it shows.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from fastdiff.data.config import DataConfig, Split
from fastdiff.data.dataset import ImageDataset
from fastdiff.data.drawing import (
    BACKGROUND,
    COLOURS,
    DIGITS,
    FIGURES,
    LETTERS,
    SHAPES,
    coverage,
    edge_distance,
    half_width,
)
from fastdiff.data.order import derive_seed

RADII = {"small": (0.13, 0.15), "large": (0.21, 0.24)}
"""Half heights of a figure, as shares of the image's side."""
RELATIONS = ("left of", "right of", "above", "below")
PLACES = ("upper left", "upper right", "lower left", "lower right", "centre")
NUMBERS = ("one", "two", "three", "four")
HELD_OUT_ONE_IN = 8
MARGIN = 0.02
"""Least distance of a figure to the border, as a share of the side."""
GAP = 0.05
"""Least distance between two figures."""
_TRIES = 200
_OUTLINE = 0.6  # half the width of a sketch's lines, in pixels


@dataclass(frozen=True, kw_only=True)
class Thing:
    """A figure of a scene."""

    figure: str
    """Of `FIGURES`."""
    colour: str
    """Of `COLOURS`."""
    size: str
    """small or large."""
    x: float
    """Horizontal place of its centre, 0 (left) to 1."""
    y: float
    """Vertical place of its centre, 0 (top) to 1."""
    radius: float
    """Half its height, as a share of the image's side."""

    @property
    def noun(self) -> str:
        """circle, letter A, digit 7."""
        if self.figure in SHAPES:
            return self.figure
        return f"{'letter' if self.figure in LETTERS else 'digit'} {self.figure}"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What is drawn, and which of it the caption says."""

    things: tuple[Thing, ...]
    relation: str | None = None
    """Where the first of two things is, seen from the second."""
    place: str | None = None
    """Where the only thing is."""
    sized: bool = False
    """Whether the caption names sizes."""

    @property
    def caption(self) -> str:
        """The scene in words."""
        first = self.things[0]
        if self.relation is not None:
            return f"{self._one(first)} {self.relation} {self._one(self.things[1])}"
        if len(self.things) > 1:
            noun = first.noun.replace("letter ", "letters ").replace("digit ", "digits ")
            plural = noun if noun != first.noun else f"{noun}{'es' if noun == 'cross' else 's'}"
            return f"{NUMBERS[len(self.things) - 1]} {self._words(first, plural)}"
        where = "" if self.place is None else f" in the {self.place}"
        return f"{self._one(first)}{where}"

    def _one(self, thing: Thing) -> str:
        words = self._words(thing, thing.noun)
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"

    def _words(self, thing: Thing, noun: str) -> str:
        return f"{thing.size} {thing.colour} {noun}" if self.sized else f"{thing.colour} {noun}"


def make_scene(seed: int, number: int, *, split: Split = "train") -> Scene:
    """Scene `number` of `seed`, whose caption is of the split."""
    for attempt in range(_TRIES):
        source = random.Random(derive_seed(seed, f"scene/{split}", number, attempt))
        scene = _draw(source)
        if scene is not None and caption_split(scene.caption) == split:
            return scene
    raise AssertionError(f"no scene in {_TRIES} tries")


def caption_split(caption: str) -> Split:
    """Whether a caption is held out; one in eight is."""
    held = derive_seed(0, f"scenes-split/{caption}") % HELD_OUT_ONE_IN == 0
    return "held-out" if held else "train"


def render_scene(scene: Scene, size: int) -> np.ndarray:
    """The picture: (3, size, size) uint8."""
    image = np.broadcast_to(np.array(BACKGROUND, dtype=np.float64)[:, None, None], (3, size, size))
    for thing in scene.things:
        share = coverage(thing.figure, size, x=thing.x, y=thing.y, radius=thing.radius)
        colour = np.array(COLOURS[thing.colour], dtype=np.float64)[:, None, None]
        image = image + share * (colour - image)
    return np.rint(image).astype(np.uint8)


def layout_mask(scene: Scene, size: int) -> np.ndarray:
    """Which figure covers each pixel: (size, size) uint8, 0 or 1 + its place in `FIGURES`."""
    mask = np.zeros((size, size), dtype=np.uint8)
    for thing in scene.things:
        share = coverage(thing.figure, size, x=thing.x, y=thing.y, radius=thing.radius)
        mask[share > 0.5] = 1 + FIGURES.index(thing.figure)
    return mask


def sketch(scene: Scene, size: int) -> np.ndarray:
    """The outlines, black on white: (size, size) uint8."""
    ink = np.zeros((size, size))
    for thing in scene.things:
        away = edge_distance(thing.figure, size, x=thing.x, y=thing.y, radius=thing.radius)
        ink = np.maximum(ink, np.clip(0.5 + _OUTLINE - np.abs(away), 0, 1))
    return np.rint(255 * (1 - ink)).astype(np.uint8)


def scenes(count: int, *, seed: int = 0, split: Split = "train") -> Iterator[Scene]:
    """Scenes 0 to count - 1 of a seed."""
    for number in range(count):
        yield make_scene(seed, number, split=split)


def open_scenes(config: DataConfig) -> ImageDataset:
    """`config.scenes` scenes as a data set; their only class names are the captions."""
    made = list(scenes(config.scenes, split=config.split))
    images = np.stack([render_scene(scene, config.image_size) for scene in made])
    captions = tuple((scene.caption,) for scene in made)
    digest = hashlib.blake2b(images.data, digest_size=16)
    digest.update(repr(captions).encode())
    return ImageDataset(
        torch.from_numpy(images),
        torch.zeros(len(made), dtype=torch.int64),
        fingerprint=digest.hexdigest(),
        captions=captions,
    )


def open_sketches(config: DataConfig) -> torch.Tensor:
    """The sketches of `open_scenes(config)`, in its order: (N, 1, H, W) uint8."""
    made = scenes(config.scenes, split=config.split)
    drawn = np.stack([sketch(scene, config.image_size) for scene in made])
    return torch.from_numpy(drawn)[:, None]


def _draw(source: random.Random) -> Scene | None:
    """A random scene; None if its things found no place."""
    kind = source.choice(("single", "place", "count", "relation", "relation", "relation"))
    sized = source.random() < 0.5
    if kind == "count":
        figure, colour = _figure(source), source.choice(tuple(COLOURS))
        things = [_thing(source, figure, colour, "small") for _ in range(source.randint(2, 4))]
        return _placed(source, things, sized=sized)
    things = [
        _thing(source, _figure(source), source.choice(tuple(COLOURS)), source.choice(tuple(RADII)))
        for _ in range(2 if kind == "relation" else 1)
    ]
    if kind == "relation":
        if (things[0].figure, things[0].colour) == (things[1].figure, things[1].colour):
            return None  # no caption could tell them apart
        return _placed(source, things, sized=sized, relation=source.choice(RELATIONS))
    place = source.choice(PLACES) if kind == "place" else None
    return _placed(source, things, sized=sized, place=place)


def _figure(source: random.Random) -> str:
    """Shapes as often as letters and digits together."""
    kinds = (SHAPES, SHAPES, LETTERS, DIGITS)
    return source.choice(source.choice(kinds))


def _thing(source: random.Random, figure: str, colour: str, size: str) -> Thing:
    low, high = RADII[size]
    return Thing(
        figure=figure,
        colour=colour,
        size=size,
        x=0.5,
        y=0.5,
        radius=round(source.uniform(low, high), 4),
    )


def _placed(
    source: random.Random,
    things: list[Thing],
    *,
    sized: bool,
    relation: str | None = None,
    place: str | None = None,
) -> Scene | None:
    """The scene with places for all things, as relation and place say."""
    for _ in range(_TRIES):
        tried = []
        for thing in things:
            low = thing.radius + MARGIN
            x, y = (round(source.uniform(low, 1 - low), 4) for _ in range(2))
            tried.append(replace(thing, x=x, y=y))
        fits = not any(
            _overlap(one, other) for i, one in enumerate(tried) for other in tried[i + 1 :]
        )
        related = relation is None or holds(relation, *tried)
        if fits and related and (place is None or is_in(place, tried[0])):
            return Scene(things=tuple(tried), relation=relation, place=place, sized=sized)
    return None


def _overlap(one: Thing, other: Thing) -> bool:
    """Whether the boxes of two things are nearer than GAP."""
    wide = half_width(one.figure) * one.radius + half_width(other.figure) * other.radius + GAP
    high = one.radius + other.radius + GAP
    return abs(one.x - other.x) < wide and abs(one.y - other.y) < high


def holds(relation: str, one: Thing, other: Thing) -> bool:
    """Whether `one` is left of, right of, above or below `other`: more so than along the other
    axis."""
    right, down = one.x - other.x, one.y - other.y
    along, across = (right, down) if relation in ("left of", "right of") else (down, right)
    return abs(along) > abs(across) and (along > 0) == (relation in ("right of", "below"))


def is_in(place: str, thing: Thing, slack: float = 0.0) -> bool:
    """Whether a thing's centre is in a quarter of the image, or near its centre.

    slack: by how much the thing's position may be wrong, as a share of the image's side.
    """
    if place == "centre":
        return max(abs(thing.x - 0.5), abs(thing.y - 0.5)) < 0.1 + slack
    down, right = place.split()
    least, most = 0.55 - slack, 0.45 + slack
    return (thing.y < most if down == "upper" else thing.y > least) and (
        thing.x < most if right == "left" else thing.x > least
    )
