"""The documentation names files that exist: links, paths, rooms, and the index of decisions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.imports import ROOT
from tests.test_layers import LEVELS

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SYSTEMS = ROOT / "docs/systems.md"
PACKAGE = ROOT / "fastdiff"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    dead = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not dead


def missing_paths(text: str) -> list[str]:
    """Paths of Python files, and of folders in backticks, that exist neither at the root nor in the
    package; ``<op>`` stands for any name."""
    files = re.findall(r"(?<![\w./<>-])[\w<>-]+(?:/[\w<>-]+)*/[\w<>]+\.py\b", text)
    folders = re.findall(r"`([\w<>-]+(?:/[\w<>-]+)*/)`", text)
    patterns = {path: re.sub(r"<\w+>", "*", path.rstrip("/")) for path in [*files, *folders]}
    return [
        path
        for path, pattern in patterns.items()
        if not any(True for base in (ROOT, PACKAGE) for _ in base.glob(pattern))
    ]


def test_systems_names_files_that_exist() -> None:
    in_a_run = ["checkpoints/", "samples/", "tensorboard/", "model/"]
    assert missing_paths(SYSTEMS.read_text()) == in_a_run
    text = '`kernels/<op>/none.py`, `kernels/<op>/cpu.py`, a["cli/no.py: x"], `lost/`, `cli/`'
    assert missing_paths(text) == ["kernels/<op>/none.py", "cli/no.py", "lost/"]


def test_systems_lists_every_room_with_its_level() -> None:
    rows = re.findall(r"^\| (\d) \| ((?:`[\w./]+`(?:, )?)+) \|", SYSTEMS.read_text(), re.M)
    listed = {
        name.removesuffix("/").removesuffix(".py"): int(level)
        for level, names in rows
        for name in re.findall(r"`([^`]+)`", names)
    }
    there = {
        name for name in LEVELS if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists()
    }
    assert listed == {name: LEVELS[name] for name in there - {"__main__"}}


def test_the_index_lists_every_file_of_decisions() -> None:
    folder = ROOT / "docs/decisions"
    index = (folder / "README.md").read_text()
    files = {path.name for path in folder.glob("*.md")} - {"README.md"}
    assert set(re.findall(r"^\| \[([\w.]+)\]", index, re.M)) == files
