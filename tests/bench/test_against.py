"""Two checkouts measured in turns: the order alternates, the speed-up is right, limits apply."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.networks import against

WORKER = """
import json, pathlib, sys

here = pathlib.Path.cwd()
for number, line in enumerate(sys.stdin):
    name, *arguments = json.loads(line)
    with (here.parent / "order").open("a") as file:
        file.write(f"{here.name} {name} {' '.join(arguments)}\\n")
    seconds = {"this": [2.0, 3.0], "other": [3.0 + number, 6.0]}[here.name]
    print(json.dumps(seconds if name == "measure" else None), flush=True)
"""


@pytest.fixture
def other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The other checkout. Both log their commands to the file "order" in the parent folder."""
    for name in ("this", "other"):
        (tmp_path / name / "fastdiff" / "kernels").mkdir(parents=True)
        (tmp_path / name / "fastdiff" / "kernels" / "__init__.py").touch()
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr(against, "ROOT", tmp_path / "this")
    monkeypatch.setattr(against, "WORKER", tmp_path / "worker.py")
    return tmp_path / "other"


def test_the_speed_up_is_the_median_of_rounds_in_turns(other: Path) -> None:
    found = against.compared("unet", other, 3)  # the other takes 4, 5 and 6 s
    assert (found.seconds, found.other_seconds) == (2.0, 5.0)
    assert (found.speedup, found.cpu_speedup) == (2.5, 2.0)
    order = (other.parent / "order").read_text().splitlines()
    assert order[:2] == ["this open unet", "other open unet"]
    assert [line.split()[0] for line in order[2:]] == [
        *("other", "this"), *("this", "other"), *("other", "this")
    ]  # fmt: skip


def test_a_checkout_that_is_slower_than_allowed(
    other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(other), "--only", "decoder", "--rounds", "2", "--at-least"]
    assert against.main([*words, "1.9"]) == 0
    assert against.main([*words, "2.1"]) == 1
    printed = capsys.readouterr()
    assert "against: decoder runs at 2.000 of the other's speed, less than 2.1" in printed.err
    assert "2.250 |" in printed.out  # by wall time: the median of 4 / 2 and 5 / 2


def test_a_folder_without_a_checkout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        against.main([str(tmp_path)])
    assert "does not contain the package fastdiff" in capsys.readouterr().err
