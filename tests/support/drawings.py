"""Eight objects in the two styles that may be given away (tests/data/emoji), as if fetched."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastdiff.data import emoji
from tests.data.test_packages import tarball

FILES = Path(__file__).parents[1] / "data" / "emoji"


def read(name: str) -> Any:
    """One of the committed JSON files."""
    return json.loads((FILES / f"{name}.json").read_text())


def put_drawings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the packages into a cache in tmp_path, and return their folder."""
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path))
    folder = tmp_path / "data/emoji"
    folder.mkdir(parents=True)

    def put(package, data: bytes):
        (folder / package.file).write_bytes(data)
        integrity = base64.b64encode(hashlib.sha512(data).digest()).decode()
        return replace(package, integrity=integrity)

    styles = dict(emoji.STYLES)
    for style in ("fluent", "noto"):
        parts = read(style)
        data = tarball(icons=parts["icons"], chars=parts["chars"])
        styles[style] = put(styles[style], data)
    captions = put(emoji.CAPTIONS, tarball(en__data=read("data")))
    monkeypatch.setattr(emoji, "STYLES", styles)
    monkeypatch.setattr(emoji, "CAPTIONS", captions)
    return folder
