"""Figures as signed distances: shapes, letters and digits, drawn with soft edges.

A figure lives in the square [-1, 1] x [-1, 1], y down. Its signed distance is negative inside, so
that coverage of a pixel, outline and layout all come from one number per pixel; no font and no
drawing library decides the pixels, which are the same everywhere.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np

Points = Sequence[tuple[float, float]]

COLOURS = {
    "red": (220, 35, 35),
    "orange": (245, 140, 20),
    "yellow": (245, 215, 40),
    "green": (40, 165, 60),
    "blue": (40, 85, 220),
    "purple": (140, 50, 170),
    "black": (25, 25, 25),
}
BACKGROUND = (255, 255, 255)
STROKE = 0.2
"""Half the width of a letter's lines, in units of its half height."""
GLYPH_WIDTH = 0.62
"""Half the width of a letter, in the same units."""


def _regular(corners: int, *, turn: float = 0.0, inner: float = 1.0) -> Points:
    """A regular polygon with a corner at the top, or a star if `inner` radius is below 1."""
    points = []
    count = corners if inner == 1 else 2 * corners
    for number in range(count):
        angle = 2 * math.pi * number / count + turn
        radius = 1.0 if inner == 1 or number % 2 == 0 else inner
        points.append((radius * math.sin(angle), -radius * math.cos(angle)))
    return tuple(points)


_A = 0.36  # half the width of a cross's arms
POLYGONS: dict[str, Points] = {
    "square": ((-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)),
    "triangle": ((0.0, -1.0), (1.0, 0.9), (-1.0, 0.9)),
    "diamond": ((0.0, -1.0), (0.72, 0.0), (0.0, 1.0), (-0.72, 0.0)),
    "star": _regular(5, inner=0.42),
    "cross": tuple(
        (x, y)
        for x, y in (
            *((-_A, -1.0), (_A, -1.0), (_A, -_A), (1.0, -_A), (1.0, _A), (_A, _A)),
            *((_A, 1.0), (-_A, 1.0), (-_A, _A), (-1.0, _A), (-1.0, -_A), (-_A, -_A)),
        )
    ),
}
SHAPES = ("circle", "ring", *POLYGONS)
# Lines of each letter on a grid of 5 columns (0 to 4) and 7 rows (0 to 6), as "column row" pairs.
_LINES = {
    "A": "06 20 46/14 34",
    "C": "41 30 10 01 05 16 36 45",
    "E": "40 00 06 46/03 33",
    "F": "40 00 06/03 33",
    "H": "00 06/40 46/03 43",
    "J": "40 45 36 16 05",
    "K": "00 06/40 03 46",
    "L": "00 06 46",
    "M": "06 00 23 40 46",
    "N": "06 00 46 40",
    "P": "06 00 30 41 42 33 03",
    "T": "00 40/20 26",
    "U": "00 05 16 36 45 40",
    "V": "00 26 40",
    "X": "00 46/40 06",
    "Y": "00 23 40/23 26",
    "0": "10 30 41 45 36 16 05 01 10",
    "1": "11 20 26/16 36",
    "2": "01 10 30 41 42 06 46",
    "3": "01 10 30 41 42 33 13/33 44 45 36 16 05",
    "4": "36 30 04 44",
    "5": "40 00 03 33 44 45 36 06",
    "6": "40 10 02 05 16 36 45 44 33 03",
    "7": "00 40 16",
    "8": "10 30 41 42 33 13 02 01 10/13 04 05 16 36 45 44 33",
    "9": "06 36 44 41 30 10 01 02 13 43",
}
LETTERS = tuple(name for name in _LINES if name.isalpha())
DIGITS = tuple(name for name in _LINES if name.isdigit())
FIGURES = (*SHAPES, *LETTERS, *DIGITS)


def distance(figure: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance of points to a figure's edge, negative inside; x, y in its own units."""
    if figure == "circle":
        return np.hypot(x, y) - 1
    if figure == "ring":
        return np.abs(np.hypot(x, y) - 0.76) - 0.24
    if figure in POLYGONS:
        return _polygon(POLYGONS[figure], x, y)
    pieces = [_segment(a, b, x, y) for a, b in _glyph(figure)]
    return np.minimum.reduce(pieces) - STROKE


Window = tuple[slice, slice]
WHOLE: Window = (slice(None), slice(None))


def coverage(
    figure: str, size: int, *, x: float, y: float, radius: float, window: Window = WHOLE
) -> np.ndarray:
    """How much of each pixel a figure covers: (size, size) fp64 in [0, 1].

    x, y, radius: centre and half height as shares of the image's side. window: only these rows and
    columns.
    """
    away = edge_distance(figure, size, x=x, y=y, radius=radius, window=window)
    return np.clip(0.5 - away, 0, 1)


def edge_distance(
    figure: str, size: int, *, x: float, y: float, radius: float, window: Window = WHOLE
) -> np.ndarray:
    """Signed distance of each pixel's centre to the figure's edge, in pixels: (size, size) fp64."""
    axis = (np.arange(size) + 0.5) / size
    rows, columns = window
    across, down = np.meshgrid((axis[columns] - x) / radius, (axis[rows] - y) / radius)
    return distance(figure, across, down) * radius * size


def half_width(figure: str) -> float:
    """Half the width of a figure, in units of its radius."""
    if figure in POLYGONS:
        return max(abs(x) for x, _ in POLYGONS[figure])
    return 1.0 if figure in SHAPES else max(abs(a[0]) for a, _ in _glyph(figure)) + STROKE


@functools.cache
def _glyph(name: str) -> tuple[tuple[tuple[float, float], tuple[float, float]], ...]:
    """The segments of a letter or digit, as pairs of points."""
    inside = 1 - STROKE
    segments = []
    for line in _LINES[name].split("/"):
        points = [
            ((int(at[0]) / 2 - 1) * (GLYPH_WIDTH - STROKE), (int(at[1]) / 3 - 1) * inside)
            for at in line.split()
        ]
        segments += list(itertools.pairwise(points))
    return tuple(segments)


def _segment(
    a: tuple[float, float], b: tuple[float, float], x: np.ndarray, y: np.ndarray
) -> np.ndarray:
    """Distance to the segment from a to b."""
    dx, dy = b[0] - a[0], b[1] - a[1]
    along = np.clip(((x - a[0]) * dx + (y - a[1]) * dy) / (dx * dx + dy * dy), 0, 1)
    return np.hypot(x - a[0] - along * dx, y - a[1] - along * dy)


def _polygon(points: Points, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to a polygon; inside by the even-odd rule."""
    nearest = np.full(x.shape, np.inf)
    inside = np.zeros(x.shape, dtype=bool)
    for a, b in zip(points, (*points[1:], points[0]), strict=True):
        nearest = np.minimum(nearest, _segment(a, b, x, y))
        crosses = (a[1] > y) != (b[1] > y)
        if a[1] != b[1]:
            at = (b[0] - a[0]) * (y - a[1]) / (b[1] - a[1]) + a[0]
            inside ^= crosses & (x < at)
    return np.where(inside, -nearest, nearest)
