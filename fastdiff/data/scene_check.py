"""Reads a picture of a scene back: which figures it shows, where, and what of a caption is true.

Each pixel is a mixture of white and a colour of the palette; connected pixels with ink are a thing,
whose colour is that of most of them and whose figure is the one whose drawing, of the same area and
centre, covers most nearly the same pixels. The drawings are those of `fastdiff.data.drawing`, so a
score needs no trained network.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastdiff.data.drawing import BACKGROUND, COLOURS, FIGURES, coverage
from fastdiff.data.scenes import RADII, Scene, Thing, holds, is_in

MIN_SHARE = 0.75
"""Least intersection over union with a figure's drawing; below it, a thing is no figure."""
MIN_PIXELS = 0.002
"""Smallest thing, as a share of the image; what is smaller is a speck."""
_BETWEEN_SIZES = (RADII["small"][1] + RADII["large"][0]) / 2
_MAX_SIDE = 512


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What of a scene's caption a picture shows; None for what the caption does not say."""

    objects: bool
    """Every thing of the scene is there in its figure and colour."""
    count: bool
    """There are as many things as the caption says, and no others."""
    sizes: bool | None
    """The things have the sizes that the caption names."""
    place: bool | None
    """The thing is where the caption says."""
    relation: bool | None
    """The first thing is where the caption says, seen from the second."""

    @property
    def right(self) -> bool:
        """Everything that the caption says is shown, and nothing else."""
        said = (self.objects, self.count, self.sizes, self.place, self.relation)
        return all(part is not False for part in said)


def read_picture(image: np.ndarray) -> list[Thing]:
    """The things in a picture, from left to right; a thing that looks like no figure has figure "".

    image: (3, S, S) uint8.

    Raises:
        ValueError: the picture has another shape or dtype.
    """
    square = image.ndim == 3 and image.shape[0] == 3 and image.shape[1] == image.shape[2]
    if not square or image.dtype != np.uint8 or image.shape[1] > _MAX_SIDE:
        raise ValueError(
            f"expected a square uint8 picture (3, S, S) of at most {_MAX_SIDE} pixels, got "
            f"{image.dtype} {tuple(image.shape)}; convert it first"
        )
    ink, colours = _ink(image)
    names = list(COLOURS)
    things = []
    for part in _components(ink >= 0.5):
        if part.sum() >= max(4, MIN_PIXELS * part.size):
            colour = names[np.bincount(colours[part]).argmax()]
            things.append(_identify(ink, part, colour))
    return sorted(things, key=lambda thing: (thing.x, thing.y))


def check_scene(scene: Scene, image: np.ndarray) -> Verdict:
    """Compare a picture (3, S, S) uint8 with the caption of a scene.

    Raises:
        ValueError: as `read_picture`.
    """
    seen = read_picture(image)
    matched = _match(scene.things, seen)
    found = [thing for thing in matched if thing is not None]
    complete = len(found) == len(scene.things)
    sizes = place = relation = None
    if scene.sized:
        pairs = zip(scene.things, matched, strict=True)
        sizes = complete and all(t is not None and t.size == wanted.size for wanted, t in pairs)
    if scene.place is not None:
        half_a_pixel = 0.5 / image.shape[1]
        place = complete and bool(is_in(scene.place, found[0], half_a_pixel))
    if scene.relation is not None:
        relation = complete and holds(scene.relation, *found)
    return Verdict(
        objects=complete,
        count=len(seen) == len(scene.things),
        sizes=sizes,
        place=place,
        relation=relation,
    )


def _match(wanted: Sequence[Thing], seen: Sequence[Thing]) -> list[Thing | None]:
    """For each wanted thing one that was seen with its figure and colour, each at most once."""
    left = list(seen)
    matched: list[Thing | None] = []
    for thing in wanted:
        fits = [t for t in left if (t.figure, t.colour) == (thing.figure, thing.colour)]
        matched.append(fits[0] if fits else None)
        if fits:
            left.remove(fits[0])
    return matched


def _ink(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How much ink each pixel has, (S, S) fp64 in [0, 1], and the number of its colour.

    A pixel on an edge is a mixture of white and one colour, so it is compared with the whole line
    between the two: the grey rim of something black is not green.
    """
    pixels = image.astype(np.float64).transpose(1, 2, 0) - BACKGROUND
    lines = np.array(list(COLOURS.values()), dtype=np.float64) - BACKGROUND  # (colours, 3)
    share = np.clip(pixels @ lines.T / (lines**2).sum(1), 0, 1)  # (S, S, colours)
    errors = ((pixels[:, :, None] - share[..., None] * lines) ** 2).sum(-1)
    colour = errors.argmin(-1)
    return np.take_along_axis(share, colour[..., None], axis=-1)[..., 0], colour


def _components(mask: np.ndarray) -> list[np.ndarray]:
    """The 8-connected parts of a mask."""
    rows, columns = np.nonzero(mask)
    left = set(zip(rows.tolist(), columns.tolist(), strict=True))
    parts = []
    while left:
        queue = deque([left.pop()])
        part = np.zeros_like(mask)
        while queue:
            i, j = queue.popleft()
            part[i, j] = True
            for place in _around(i, j) & left:
                left.remove(place)
                queue.append(place)
        parts.append(part)
    return parts


def _around(i: int, j: int) -> set[tuple[int, int]]:
    return {(i + di, j + dj) for di in (-1, 0, 1) for dj in (-1, 0, 1)}


def _identify(ink: np.ndarray, part: np.ndarray, colour: str) -> Thing:
    """What a connected part is; of figure "" if it looks like none.

    Area and centre of mass, which soft edges give to a fraction of a pixel, say where each figure
    would have to be and how large.
    """
    size = len(part)
    rows, columns = (np.nonzero(part.any(axis))[0] for axis in (1, 0))
    window = (
        slice(max(rows[0] - 2, 0), rows[-1] + 3),
        slice(max(columns[0] - 2, 0), columns[-1] + 3),
    )
    seen = (ink * _grown(part))[window]
    area = seen.sum() / size**2
    axis = (np.arange(size) + 0.5) / size
    x = (seen.sum(0) @ axis[window[1]]) / seen.sum()
    y = (seen.sum(1) @ axis[window[0]]) / seen.sum()
    best, share = (
        Thing(figure="", colour=colour, size="", x=float(x), y=float(y), radius=0),
        MIN_SHARE,
    )
    for figure in FIGURES:
        own_area, own_x, own_y = _moments(figure)
        radius = float(np.sqrt(area / own_area))
        place = {"x": float(x - own_x * radius), "y": float(y - own_y * radius), "radius": radius}
        drawn = coverage(figure, size, window=window, **place)
        overlap = np.minimum(drawn, seen).sum() / np.maximum(drawn, seen).sum()
        if overlap > share:
            large = "small" if radius < _BETWEEN_SIZES else "large"
            best, share = Thing(figure=figure, colour=colour, size=large, **place), overlap
    return best


def _grown(part: np.ndarray) -> np.ndarray:
    """A mask and the pixels that touch it: its soft edge."""
    wide = np.pad(part, 1)
    rows, columns = part.shape
    shifted = [wide[i : i + rows, j : j + columns] for i in range(3) for j in range(3)]
    return np.logical_or.reduce(shifted)


@functools.cache
def _moments(figure: str) -> tuple[float, float, float]:
    """Area and centre of mass of a figure in its own units, measured on a fine drawing."""
    side, radius = 400, 0.4
    drawn = coverage(figure, side, x=0.5, y=0.5, radius=radius)
    axis = ((np.arange(side) + 0.5) / side - 0.5) / radius
    total = drawn.sum()
    area = total / (side * radius) ** 2
    return float(area), float(drawn.sum(0) @ axis / total), float(drawn.sum(1) @ axis / total)
