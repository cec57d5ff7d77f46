"""Two processes in one folder at the same time."""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.endure.child import Child, Ended, attempt
from tests.endure.kills import Row
from tests.endure.work import Work, listing

STOPPED = ("another process is training", "already holds a run")
"""What the second of two trainings says."""


def pair(
    name: str,
    first: Work,
    second: Work,
    root: Path,
    *,
    count: int,
    judge: Callable[[Ended, Ended, Path], str],
    apart: float = 0.3,
    seed: int = 0,
    tell: Callable[[], None] = lambda: None,
) -> Row:
    """Start two works in one folder, up to `apart` seconds one after the other, `count` times."""
    row, rng, since = Row(name), random.Random(seed), time.perf_counter()
    for _ in range(count):
        folder = root / f"{name} {row.trials}"
        folder.mkdir(parents=True)
        one = Child(lambda folder=folder: first.start(folder), folder)
        time.sleep(rng.uniform(0, apart))
        other = Child(lambda folder=folder: second.start(folder), folder)
        found = judge(one.wait(), other.wait(), folder)
        row.trials += 1
        tell()
        if found:
            row.findings.append(f"{name}, trial {row.trials - 1}: {found}")
        else:
            shutil.rmtree(folder)
    row.seconds = time.perf_counter() - since
    return row


def one_trains(work: Work, undisturbed: Path) -> Callable[[Ended, Ended, Path], str]:
    """One of two trainings runs as if it were alone, the other stops with one line."""

    def judge(one: Ended, other: Ended, folder: Path) -> str:
        good = [ended for ended in (one, other) if ended.code == 0]
        bad = [ended for ended in (one, other) if ended.code != 0]
        if not good:
            return f"neither is done: {one.said[-200:]} / {other.said[-200:]}"
        if any(not any(words in ended.said for words in STOPPED) for ended in bad):
            return f"stopped otherwise: {bad[0].said[-300:]}"
        return work.done(folder, undisturbed)

    return judge


def both_sample(*undisturbed: Path) -> Callable[[Ended, Ended, Path], str]:
    """Both succeed; each image of either exists once, and nothing else does."""
    expected = Counter(data for folder in undisturbed for data in listing(folder).values())

    def judge(one: Ended, other: Ended, folder: Path) -> str:
        for ended in (one, other):
            if ended.code != 0:
                return f"exit code {ended.code}: {ended.said[-300:]}"
        found = listing(folder)
        if hidden := [name for name in found if name.startswith(".")]:
            return f"left behind: {', '.join(hidden)}"
        more, lost = Counter(found.values()) - expected, expected - Counter(found.values())
        if more or lost:
            return f"{lost.total()} pictures lost, {more.total()} too many: {sorted(found)}"
        return ""

    return judge


def both_make_the_job(work: Work, undisturbed: Path) -> Callable[[Ended, Ended, Path], str]:
    """Both succeed; the shards are those of one that was alone."""

    def judge(one: Ended, other: Ended, folder: Path) -> str:
        for ended in (one, other):
            if ended.code != 0:
                return f"exit code {ended.code}: {ended.said[-300:]}"
        return work.done(folder, undisturbed)

    return judge


def one_is_saved(*undisturbed: Path) -> Callable[[Ended, Ended, Path], str]:
    """Both succeed; the folder is entirely from one of them."""

    def judge(one: Ended, other: Ended, folder: Path) -> str:
        for ended in (one, other):
            if ended.code != 0:
                return f"exit code {ended.code}: {ended.said[-300:]}"
        found = listing(folder)
        return "" if any(found == listing(place) for place in undisturbed) else f"{sorted(found)}"

    return judge


def undisturbed(work: Work, folder: Path) -> Path:
    """Do a work alone; returns the folder."""
    folder.mkdir(parents=True)
    ended = attempt(lambda: work.start(folder), folder)
    assert ended.code == 0, ended.said
    return folder
