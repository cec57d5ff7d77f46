"""The commands of docs/guides/jobs.md run, in their order, and do what the page says."""

from __future__ import annotations

import json
import re
import shlex
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from fastdiff.cli import main
from tests.support.imports import ROOT

PAGE = ROOT / "docs/guides/jobs.md"
pytestmark = pytest.mark.slow


def test_the_commands_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)  # for the job and its shares as for two workers
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    for kind, text in blocks:
        if kind == "python":
            exec(compile(text, PAGE.name, "exec"), {"__name__": "page"})
        elif kind == "yaml":
            name = text.partition("\n")[0].removeprefix("# ")
            (tmp_path / name).write_text(text)
        elif kind == "sh":
            for line in text.splitlines():
                assert main(shlex.split(line, comments=True)[1:]) == 0, line
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        "job", "ddim", "small", "two", "shares", "python",
    }  # fmt: skip
    with tarfile.open(out / "job/000001.tar") as archive:
        names = archive.getnames()
        content = archive.extractfile("000000037.json")
        assert content is not None
        recipe = json.load(content)
    assert names == [f"{n:09d}.{ending}" for n in range(20, 40) for ending in ("png", "json")]
    assert (recipe["job"]["label"], recipe["job"]["seed"], recipe["job"]["settings"]["steps"]) == (
        7, 37, 4,
    )  # fmt: skip
    assert pq.read_metadata(out / "ddim/000001.parquet").num_rows == 20
    shares = {path.name: path.read_bytes() for path in (out / "shares").glob("0*/*")}
    assert len(shares) == 40
    assert shares == {path.name: path.read_bytes() for path in (out / "two").glob("0*/*")}
    assert len([*(out / "python").glob("000001/*.png")]) == 20
