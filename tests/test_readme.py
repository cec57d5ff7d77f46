"""The code and commands in the README work unchanged."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastdiff.images import read_recipe
from fastdiff.kernels import compiled

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()


def test_the_lines_of_python_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    assert len([line for line in block.splitlines() if line]) == 5
    assert read_recipe(tmp_path / "three.png")["job"]["label"] == 3
    chosen = "cpu" if compiled.native else "reference"
    assert f"group_norm_silu (backend 'auto'): {chosen}" in capsys.readouterr().out


def test_every_file_it_points_to_is_there() -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
