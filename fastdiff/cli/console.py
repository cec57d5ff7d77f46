"""What the commands share on the screen: aligned columns, a progress bar, a clock per stage."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

GAP = "  "
NO_BREAK = "\N{NO-BREAK SPACE}"
UNLIMITED = 1_000_000


def width() -> int:
    """Columns of the terminal; no limit where the output goes to a file or a pipe."""
    if sys.stdout.isatty() or "COLUMNS" in os.environ:
        return shutil.get_terminal_size().columns
    return UNLIMITED


def print_numbers(rows: Sequence[Sequence[str]], *, left: bool = False) -> None:
    """Right-aligned columns under the headings of the first row; ``left``: but for the first.

    A table wider than the terminal is printed in blocks of columns, the first column in each.
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
    """``name  text`` lines, the texts aligned and wrapped to the terminal, not at NO_BREAK."""
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
    """Who ran which ops, as ``reference: attention, geglu; triton: ...``."""
    names = sorted({name for backends in served.values() for name in backends})
    return "; ".join(
        f"{name}: {', '.join(op for op, backends in sorted(served.items()) if name in backends)}"
        for name in names
    )


@dataclass
class Clock:
    """Wall time per stage, in the order the stages were first entered."""

    stages: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.stages[stage] = self.stages.get(stage, 0.0) + time.perf_counter() - start

    def report(self) -> str:
        return ", ".join(f"{stage} {seconds(value)}" for stage, value in self.stages.items())


@contextlib.contextmanager
def progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr that is told (done, total); nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, expand=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
