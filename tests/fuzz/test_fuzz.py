"""The campaign on a few files of every format, and its detection of planted failures."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fastdiff.files import MAX_MESSAGE
from tests.fuzz import property as campaign
from tests.fuzz.mutate import mutant
from tests.fuzz.property import EXTRA_BYTES, Campaign, cases
from tests.fuzz.targets import TARGETS, Target
from tests.support.imports import ROOT


@pytest.mark.slow
def test_mutated_files_of_every_format() -> None:
    """`python -m tests.fuzz --count 10000` is the same with more files."""
    command = [sys.executable, "-m", "tests.fuzz", "--count", "1500"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "1,500 files in" in done.stdout


def raising(error: Exception) -> Callable[[Path], object]:
    def open_(folder: Path) -> None:
        raise error

    return open_


def _run(command: str) -> Callable[[Path], object]:
    return lambda folder: os.system(command)


HARM: dict[str, tuple[Callable[[Path], object], str]] = {
    "another exception": (raising(KeyError("a")), "KeyError at test_fuzz.py"),
    "two lines": (
        lambda folder: raising(ValueError(f"{folder}\nb"))(folder),
        "not one printable line",
    ),
    "no file named": (raising(ValueError("a file is damaged")), "does not say which file"),
    "an escape": (lambda folder: raising(ValueError(f"{folder}\x1b[0m"))(folder), "not one print"),
    "a long message": (
        lambda folder: raising(ValueError(f"{folder}{'x' * MAX_MESSAGE}"))(folder),
        "a message of ",
    ),
    "a program": (_run("true"), "CodeRanError"),
    "a file elsewhere": (lambda folder: open("/proc/self/comm", "r+"), "CodeRanError"),  # noqa: SIM115
    "memory": (lambda folder: bytearray(EXTRA_BYTES + 2**26), "more than 1,073,741,824 bytes"),
    "a crash": (lambda folder: os.kill(os.getpid(), signal.SIGKILL), "the process died (-9)"),
    "a hang": (lambda folder: time.sleep(600), "hung for 3 s"),
    "slow": (lambda folder: [None for _ in range(10**7)], "of processor time"),
}


@pytest.mark.parametrize("harm", HARM)
def test_each_kind_of_harm_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    """Its second file fails; the others are still tried."""
    opens, what = HARM[harm]
    tried = multiprocessing.get_context("fork").Value("i", -1)  # the first is of the valid file

    def open_(folder: Path) -> object:
        tried.value += 1
        return opens(folder) if tried.value == 2 else None

    target = Target(lambda folder: (folder / "x.bin").write_bytes(b"abc"), open_)
    monkeypatch.setitem(TARGETS, harm, target)
    monkeypatch.setattr(campaign, "HANGS_AFTER", 3 if harm == "a hang" else 60)
    monkeypatch.setattr(campaign, "SECONDS", 0.1 if harm == "slow" else 5)
    made = Campaign(cases(4, [harm]), processes=1, root=tmp_path)
    made.run()
    assert [finding.case.number for finding in made.findings] == [1]
    assert what in made.findings[0].what
    assert (made.tried[harm], made.opened[harm]) == (4, 4 if harm == "slow" else 3)


@pytest.mark.parametrize("name", ["x.json", "x.png", "x.pt", "x.safetensors", "x.txt"])
def test_a_case_is_made_again_from_its_number(tmp_path: Path, name: str) -> None:
    ending = {"x.json": "bundle", "x.png": "recipe", "x.pt": "zip", "x.safetensors": "safetensors"}
    target = ending.get(name, "legacy")
    TARGETS[target].make(tmp_path)
    suffix = Path(name).suffix
    data = next(path for path in tmp_path.iterdir() if suffix in (path.suffix, ".txt"))
    first, again = (
        [mutant(name, data.read_bytes(), case.rng) for case in cases(20, [target])] for _ in "12"
    )
    assert first == again
    assert len(set(first)) > 10
    assert sum(made == data.read_bytes() for made in first) < 5
