"""Work that is killed and resumed until it is done."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from tests.endure.child import Blow, attempt, blows
from tests.endure.work import Work

AGAIN = 3
"""Every so many kills, what goes on is killed too."""


@dataclass
class Row:
    """Results of one kind of trial."""

    name: str
    trials: int = 0
    hits: dict[str, int] = field(default_factory=dict)
    """How -> processes that died of it."""
    findings: list[str] = field(default_factory=list)
    seconds: float = 0.0


def kill(
    name: str,
    work: Work,
    root: Path,
    *,
    count: int,
    begin: Callable[[Path], object] = lambda folder: None,
    seed: int = 0,
    hows: Collection[str] = ("call", "time", "write"),
    tell: Callable[[], None] = lambda: None,
) -> Row:
    """Kill the work `count` times, resume it, and compare with undisturbed work.

    Runs that finish before they are killed do not count.

    begin: prepares the folder. hows: the ways to kill it; where it has processes of its own, only
    "time", because the others are seen in its first process only.
    """
    row, since = Row(name), time.perf_counter()
    undisturbed = root / f"{name} undisturbed"
    undisturbed.mkdir(parents=True)
    begin(undisturbed)
    start = time.monotonic()
    ended = attempt(lambda: work.start(undisturbed), undisturbed)
    seconds = time.monotonic() - start
    assert ended.code == 0, ended.said
    largest = max(path.stat().st_size for path in undisturbed.rglob("*") if path.is_file())
    every = blows(calls=ended.calls, seconds=seconds, largest=largest, seed=seed)
    planned = (blow for blow in every if blow.how in hows)
    while (left := count - sum(row.hits.values())) > 0:
        folder = root / f"{name} {row.trials}"
        folder.mkdir()
        begin(folder)
        twice = left > 1 and row.trials % AGAIN == 0
        mine = list(itertools.islice(planned, 1 + twice))
        found = _one(work, folder, undisturbed, mine, row, tell)
        row.trials += 1
        if found:
            row.findings.append(f"{name}, killed at {mine}: {found}")
        else:
            shutil.rmtree(folder)
    row.seconds = time.perf_counter() - since
    return row


def _one(
    work: Work,
    folder: Path,
    undisturbed: Path,
    planned: list[Blow],
    row: Row,
    tell: Callable[[], None],
) -> str:
    """What is wrong after kills and resuming; empty if nothing is."""
    before = work.progress(folder)
    for blow in planned:
        ended = attempt(lambda: work.start(folder), folder, blow)
        if ended.killed:
            row.hits[blow.how] = row.hits.get(blow.how, 0) + 1
            tell()
        elif ended.code != 0:
            return f"exit code {ended.code}: {ended.said[-300:]}"
        if wrong := work.whole(folder):
            return f"right after the kill: {wrong}"
        now = work.progress(folder)
        if any(number < old for number, old in zip(now, before, strict=True)):
            return f"at {before} before the kill, at {now} after it"
        before = now
    ended = attempt(lambda: work.start(folder), folder)
    if ended.code != 0:
        return f"going on: exit code {ended.code}: {ended.said[-300:]}"
    return work.done(folder, undisturbed)
