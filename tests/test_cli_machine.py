"""Folders that commands write to, and the reported numbers."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastdiff.cli.machine import check_room, output_folder, size


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1536, "1.5 KiB"),
        (40 * 2**10, "40 KiB"),
        (5 * 2**30, "5 GiB"),
        (3 * 2**50, "3,072 TiB"),
    ],
)
def test_sizes_have_a_unit_that_fits(count: int, expected: str) -> None:
    assert size(count) == expected


def test_a_small_disk_is_told_in_numbers_that_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=300 * 2**10))
    check_room(tmp_path, 75)
    with pytest.raises(
        ValueError, match=r"^100 images need at least 400 KiB, .* only 300 KiB free"
    ):
        check_room(tmp_path, 100)


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path) -> None:
    (tmp_path / ".7-seed0.png.a1b2c3d4.tmp.png").write_bytes(b"half")
    (tmp_path / ".mine").write_bytes(b"")
    with output_folder(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".mine"]
