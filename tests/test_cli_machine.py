"""Folders that commands write to, and the reported numbers."""

from __future__ import annotations

import json
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


@pytest.mark.parametrize(
    ("capability", "built", "wanted"),
    [
        ("9.0", "8.0;9.0a", None),
        ("9.0", "8.0;9.0", "sm90a"),  # the kernels for TMA and wgmma need the letter
        ("9.0", None, "sm90a"),
        ("8.9", "8.6;9.0a", None),
        ("8.9", "9.0a", "sm89"),
        ("8.6", "8.9", "sm86"),
        ("10.0", "10.0", None),
        ("10.0", "9.0a+PTX", "sm100"),
        ("7.5", None, None),
    ],
)
def test_doctor_says_what_a_gpu_could_have(
    capability: str, built: str | None, wanted: str | None
) -> None:
    from fastdiff.cli.doctor import _missing_cuda

    gpu = {"device": "cuda:0", "capability": capability}
    text = _missing_cuda(gpu, {"cuda_architectures": built})
    assert (text is None) == (wanted is None)
    if wanted is not None:
        assert f"names {wanted}," in text
        assert "FASTDIFF_BUILD_CUDA=1" in text


def test_doctor_says_how_it_was_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdiff.cli.doctor import _installed

    folder = tmp_path / "fastdiff-9.9+cu130.sm90a.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Name: fastdiff\nVersion: 9.9+cu130.sm90a\n")
    (folder / "WHEEL").write_text("Wheel-Version: 1.0\nTag: cp311-cp311-manylinux_2_34_x86_64\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    said = _installed()
    assert said == "a wheel for cp311-cp311-manylinux_2_34_x86_64; built for cu130.sm90a"
    url = {"url": "file:///somewhere", "dir_info": {"editable": True}}
    (folder / "direct_url.json").write_text(json.dumps(url))
    assert _installed() == "an editable checkout"
