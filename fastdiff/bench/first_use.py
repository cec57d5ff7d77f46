"""What Triton compiles before the first evaluation of a network.

    python -m fastdiff.bench.counts compile
    python -m fastdiff.bench.counts compile --docs

Every kernel that launches.py records is compiled for an H200 as its first launch would compile it,
into an empty cache. Launches of one kernel that differ in nothing that Triton specializes for share
a binary.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fastdiff.bench import backward, counted, launches
from fastdiff.bench.compile import compiled_for, source_of
from fastdiff.bench.launches import Count
from fastdiff.bench.predict import H200
from fastdiff.bench.shapes import GPU_JOBS
from fastdiff.kernels.triton import Launch

SECTION = "compile"
WORK: dict[str, Callable[[], Count]] = {
    **{name: lambda name=name: launches.native(GPU_JOBS[name]) for name in GPU_JOBS},  # type: ignore[misc]
    "SD 1.5 U-Net, training step": backward.native,
}
"""Name -> the count of an evaluation, or of a training step."""


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """The binaries of one network."""

    binaries: int
    bytes: int
    """Of their machine code."""
    seconds: float
    """Of one core."""
    slowest: str
    """The kernel whose binary took longest."""
    slowest_s: float


def key_of(launch: Launch) -> tuple[Any, ...]:
    """What distinguishes binaries."""
    parts = source_of(launch)
    return (launch.kernel.__name__, repr(parts), launch.num_warps, launch.num_stages)


def compile_all(recorded: list[Launch], tell: Callable[[str], None]) -> Compiled:
    """Compile each binary once.

    recorded: at least one launch.
    tell: called with a line per binary.
    """
    distinct = {key_of(launch): launch for launch in recorded}
    size, times = 0, []
    with _empty_cache():
        for number, launch in enumerate(distinct.values(), 1):
            start = time.perf_counter()
            binary = compiled_for(launch, H200.architecture)
            times.append((time.perf_counter() - start, launch.kernel.__name__))
            size += len(binary.asm["cubin"])
            tell(f"{number} of {len(distinct)}: {times[-1][1]}, {times[-1][0]:.1f} s")
    slowest_s, slowest = max(times)
    return Compiled(
        binaries=len(distinct),
        bytes=size,
        seconds=sum(seconds for seconds, _ in times),
        slowest=slowest,
        slowest_s=slowest_s,
    )


@contextmanager
def _empty_cache() -> Iterator[None]:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        before = knobs.cache.dir
        knobs.cache.dir = os.fspath(folder)
        try:
            yield
        finally:
            knobs.cache.dir = before


HEAD = ("work", "binaries", "MB", "seconds", "slowest kernel", "its seconds")


def rows() -> list[tuple[str, ...]]:
    """One row per network that was compiled, after the header."""
    found: list[tuple[str, ...]] = [HEAD]
    known = counted.recorded(SECTION)
    for name in WORK:
        if each := known.get(name):
            found.append((name, *cells(Compiled(**each))))
    return found


def cells(of: Compiled) -> tuple[str, ...]:
    """Cells of a row, after the name."""
    return (
        *(f"{of.binaries}", f"{of.bytes / 1e6:.2f}", f"{of.seconds:.0f}"),
        *(f"`{of.slowest.strip('_')}`", f"{of.slowest_s:.1f}"),
    )
