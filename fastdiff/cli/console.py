"""Output of the commands: aligned columns, times, and assumptions about the model's files."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastdiff.checkpoint.model import Model

GAP = "  "
NO_BREAK = "\N{NO-BREAK SPACE}"
UNLIMITED = 1_000_000


def width() -> int:
    """Width of the terminal in columns; unlimited if the output goes to a file or a pipe."""
    if sys.stdout.isatty() or "COLUMNS" in os.environ:
        return shutil.get_terminal_size().columns
    return UNLIMITED


def print_numbers(rows: Sequence[Sequence[str]], *, left: bool = False) -> None:
    """Print right-aligned columns; the first row contains the headings.

    left: align the first column to the left. A table wider than the terminal is printed in blocks
    of columns, each of which repeats the first column.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    blocks: list[list[int]] = [[]]
    used = widths[0]
    for index in range(1, len(widths)):
        if blocks[-1] and used + len(GAP) + widths[index] > width():
            blocks.append([])
            used = widths[0]
        blocks[-1].append(index)
        used += len(GAP) + widths[index]
    for number, block in enumerate(blocks):
        if number:
            print()
        for row in rows:
            first = row[0].ljust(widths[0]) if left else row[0].rjust(widths[0])
            cells = [first, *(row[index].rjust(widths[index]) for index in block)]
            print(GAP.join(cells).rstrip())


def print_pairs(pairs: Sequence[tuple[str, str]], *, indent: int = 0) -> None:
    """Print ``name  text`` lines with the texts aligned and wrapped, but not at NO_BREAK."""
    if not pairs:
        return
    left = indent + max(len(name) for name, _ in pairs) + len(GAP)
    room = max(width() - left, 24)
    for name, text in pairs:
        wrapped = textwrap.wrap(text, room, break_on_hyphens=False) or [""]
        first, *more = (line.replace(NO_BREAK, " ") for line in wrapped)
        print(f"{' ' * indent}{name}".ljust(left) + first)
        for line in more:
            print(" " * left + line)


def seconds(value: float) -> str:
    """0.012 -> "12 ms", 3.456 -> "3.46 s", 83 -> "1 min 23 s"."""
    if value < 1:
        return f"{value * 1000:.0f} ms"
    if value < 60:
        return f"{value:.2f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s"


def backends_line(served: Mapping[str, set[str]]) -> str:
    """Which backend ran which ops, as ``reference: attention, geglu; triton: ...``."""
    names = sorted({name for backends in served.values() for name in backends})
    return "; ".join(
        f"{name}: {', '.join(op for op, backends in sorted(served.items()) if name in backends)}"
        for name in names
    )


def about_files(model: Model) -> list[tuple[str, str]]:
    """What was assumed about the model's files, and which parts of them are not supported."""
    lines = (line.partition(": ") for line in model.assumed_lines(flags=True))
    return [(title, text) for title, _, text in lines]
