"""A few kills, pairs and full disks; and a planted flaw is found."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastdiff.files import atomic_file, atomic_folder, write_bytes
from tests.endure.child import Blow, attempt
from tests.endure.disks import Filling, can_mount, fill
from tests.endure.kills import kill
from tests.endure.pairs import both_sample, pair, undisturbed
from tests.endure.work import Work, difference, listing
from tests.support.imports import ROOT

CONTENT = bytes(range(256)) * 1000


@pytest.mark.slow
def test_a_few_of_everything(tmp_path: Path) -> None:
    """`python -m tests.endure` is the same with more of each."""
    disks = "1" if can_mount(tmp_path) else "0"
    counts = ["--kills", "8", "--pairs", "6", "--disks", disks]
    command = [sys.executable, "-m", "tests.endure", *counts]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "two savings" in done.stdout


def _whole(folder: Path) -> str:
    """Each file that has its name has its content."""
    bad = [name for name, data in listing(folder).items() if name == "a.bin" and data != CONTENT]
    return f"half of {bad}" if bad else ""


def _same(folder: Path, other: Path) -> str:
    return difference(listing(folder), listing(other))


def _carefully(folder: Path) -> None:
    with atomic_folder(folder / "b") as temporary:
        (temporary / "c.bin").write_bytes(CONTENT)
    write_bytes(folder / "a.bin", CONTENT)


def _in_place(folder: Path) -> None:
    (folder / "a.bin").write_bytes(CONTENT)


def _never_cleaned(folder: Path) -> None:
    with atomic_file(folder / "a.bin") as temporary:
        temporary.write_bytes(CONTENT)


def _not_gone_on_with(folder: Path) -> None:
    if not (folder / "started").exists():
        (folder / "started").touch()
        write_bytes(folder / "a.bin", CONTENT)


@pytest.mark.parametrize(
    ("start", "finding"),
    [
        (_in_place, "right after the kill: half of ['a.bin']"),
        (_never_cleaned, "left behind: .a.bin."),
        (_not_gone_on_with, "lost: a.bin"),
    ],
)
def test_flaws_are_found_by_kills(tmp_path: Path, start: object, finding: str) -> None:
    row = kill("x", Work(start, _whole, _same), tmp_path, count=30)  # type: ignore[arg-type]
    assert any(finding in found for found in row.findings), row.findings
    assert sum(row.hits.values()) == 30


def test_nothing_is_found_in_careful_work(tmp_path: Path) -> None:
    def start(folder: Path) -> None:
        from fastdiff.files import remove_leftovers

        remove_leftovers(folder)
        _carefully(folder)

    row = kill("x", Work(start, _whole, _same), tmp_path, count=30)
    assert row.findings == []
    assert {"call", "write"} <= row.hits.keys()


def test_progress_that_falls_is_found(tmp_path: Path) -> None:
    """What was there is deleted before the new is written: half of the kills at calls hit that."""

    def start(folder: Path) -> None:
        for _ in range(10):
            (folder / "steps").unlink(missing_ok=True)
            (folder / "steps").write_text("x" * 10)

    work = Work(
        start,
        _whole,
        lambda one, other: "",
        lambda folder: (len(listing(folder).get("steps", "")),),
    )
    row = kill("x", work, tmp_path, count=12, begin=start)
    assert any("at (10,) before the kill, at (0,) after it" in found for found in row.findings)


@pytest.mark.parametrize("how", ["time", "call", "write"])
def test_a_process_is_killed_when_it_is_due(tmp_path: Path, how: str) -> None:
    at = {"time": 0.2, "call": 3, "write": 1000}[how]

    def work() -> None:
        for number in range(5):
            (tmp_path / f"{number}").write_bytes(bytes(2000))
        time.sleep(60)

    ended = attempt(work, tmp_path, Blow(how, at))  # type: ignore[arg-type]
    assert ended.killed
    sizes = [path.stat().st_size for path in sorted(tmp_path.iterdir())]
    assert sizes == {"time": [2000] * len(sizes), "call": [2000] * 2, "write": [1000]}[how]


def test_two_that_write_over_each_other_are_found(tmp_path: Path) -> None:
    def start(content: bytes) -> Work:
        def write(folder: Path) -> None:
            name = "a" if not (folder / "a").exists() else "b"  # looked at first, written later
            time.sleep(0.5)
            (folder / name).write_bytes(content)

        return Work(write, _whole, _same)

    one, other = start(b"one"), start(b"other")
    alone = [undisturbed(work, tmp_path / f"{i}") for i, work in enumerate((one, other))]
    row = pair("x", one, other, tmp_path, count=3, judge=both_sample(*alone), apart=0.01)
    assert any("1 pictures lost" in found for found in row.findings)


def _says_full(start: object) -> Work:
    def work(folder: Path) -> int:
        try:
            start(folder)  # type: ignore[operator]
        except OSError as error:
            print(f"fastdiff: {error.strerror}")
            return 2
        return 0

    return Work(work, _whole, _same)


def test_flaws_are_found_by_full_disks(tmp_path: Path) -> None:
    if not can_mount(tmp_path):
        pytest.skip("this process may not mount a disk of its own")
    row = fill("in place", Filling(_says_full(_in_place)), tmp_path, count=2)
    assert "not clear: fastdiff: No space left on device" in row.findings[-1]
    row = fill("careful", Filling(_says_full(_carefully)), tmp_path, count=4)
    assert row.findings == []
