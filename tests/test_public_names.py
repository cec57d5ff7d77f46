"""There is one list of public names: `__all__`, dir, help, type checkers and the site agree."""

from __future__ import annotations

import inspect
import os
import pydoc
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

import fastdiff
import fastdiff.data
import fastdiff.evaluation
import fastdiff.jobs
import fastdiff.kernels
import fastdiff.training
from tests.support.imports import ROOT

LAZY_OR_FOUND = [fastdiff, fastdiff.kernels]
"""Names come from a `__getattr__`, or from folders: the two that could disagree."""
PAGES = {
    fastdiff: "fastdiff",
    fastdiff.kernels: "kernels",
    fastdiff.training: "training",
    fastdiff.data: "training",
    fastdiff.evaluation: "evaluation",
    fastdiff.jobs: "jobs",
}
DIRECTIVE = re.compile(r"^\.\. (?:auto|py:)(?:function|class|exception|data):: (\w+)$", re.M)


def by_name(module: types.ModuleType) -> str:
    return module.__name__


@pytest.mark.parametrize("module", LAZY_OR_FOUND, ids=by_name)
def test_dir_shows_what_is_public(module: types.ModuleType) -> None:
    assert [name for name in dir(module) if not name.startswith("__")] == sorted(module.__all__)
    assert len(module.__all__) == len(set(module.__all__))
    for name in module.__all__:
        assert getattr(module, name) is not None


@pytest.mark.parametrize("module", LAZY_OR_FOUND, ids=by_name)
def test_help_shows_what_is_public(module: types.ModuleType) -> None:
    text = pydoc.render_doc(module, renderer=pydoc.plaintext)
    sections = dict(re.findall(r"^([A-Z ]+)\n(.*?)(?=^[A-Z]|\Z)", text, re.M | re.S))
    shown = {
        *re.findall(r"^    (?:class )?(\w+)(?: = class \w+)?\(", sections["CLASSES"], re.M),
        *re.findall(r"^    (\w+)\(", sections["FUNCTIONS"], re.M),
        *re.findall(r"^    (\w+) = ", sections.get("DATA", ""), re.M),
        *re.findall(r"^    (\w+) \(package\)", sections["PACKAGE CONTENTS"], re.M),
    } - {"__all__"}
    assert set(module.__all__) <= shown
    functions = {name for name in module.__all__ if inspect.isfunction(getattr(module, name))}
    assert set(re.findall(r"^    (\w+)\(", sections["FUNCTIONS"], re.M)) == functions


@pytest.mark.parametrize("module", PAGES, ids=by_name)
def test_the_site_shows_what_is_public(module: types.ModuleType) -> None:
    """`make docs` fails where a directive names nothing; here: none is missing, none too many."""
    page = (ROOT / f"docs/api/{PAGES[module]}.md").read_text()
    parts = re.split(r"^\.\. currentmodule:: (\S+)$", page, flags=re.M)
    texts = [
        text for name, text in zip(parts[1::2], parts[2::2], strict=True) if name == module.__name__
    ]
    named = DIRECTIVE.findall("".join(texts))
    assert sorted(named) == sorted(set(module.__all__) - {"kernels"})


def test_a_function_has_its_arguments_in_every_view() -> None:
    """`help` and editors show real arguments, not `(*args, **options)`, for the two wrappers."""
    assert {"dtype", "device", "vae", "options"} <= set(inspect.signature(fastdiff.load).parameters)
    assert set(inspect.signature(fastdiff.generate).parameters) >= {"model", "jobs", "batch"}


@pytest.mark.slow
def test_type_checkers_see_what_is_public_and_nothing_else(tmp_path: Path) -> None:
    """mypy --strict on a user's file that uses every name, and two that do not exist."""
    good = [f"fastdiff.{name}" for name in fastdiff.__all__]
    good += [f"fastdiff.kernels.{name}" for name in fastdiff.kernels.__all__]
    good += [f"fastdiff.jobs.{name}" for name in fastdiff.jobs.__all__]
    bad = ["fastdiff.acelerate", "fastdiff.kernels.gegluu"]
    lines = [
        "import fastdiff, fastdiff.jobs",
        *good,
        *bad,
        'n: int = fastdiff.load("digits").generate(seeds=[1])',
    ]
    lines += ["m: int = fastdiff.kernels.ada_layer_norm", "fastdiff.load(7)"]
    (tmp_path / "user.py").write_text("\n".join(lines) + "\n")
    command = ["--strict", "--follow-imports=silent", "user.py"]
    environment = {**os.environ, "MYPYPATH": str(ROOT), "MYPY_CACHE_DIR": str(ROOT / ".mypy_cache")}
    result = subprocess.run(
        [sys.executable, "-m", "mypy", *command],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    errors = re.findall(r"^user\.py:(\d+): error: .*\[([\w-]+)\]$", result.stdout, re.M)
    kinds = [*["attr-defined"] * len(bad), "assignment", "assignment", "arg-type"]
    expected = [(str(2 + len(good) + at), kind) for at, kind in enumerate(kinds)]
    assert errors == expected, result.stdout + result.stderr
