"""Runs as files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastdiff.bench.contest import filled
from fastdiff.bench.result import Entry, Repeated, Row, Run, load, save
from fastdiff.bench.turns import Ratio

FACTS = {"device": "a CPU", "cores": 2, "threads": 1, "driver": "", "torch": "2.13.0"}


def run() -> Run:
    """Three ops of made-up times, and one of them in fresh processes."""
    rows = []
    for name in ("geglu", "layer_norm", "attention"):
        row = Row(kind="op", name=name, job="a", shape="(2, 8)", dtype="float32", method="host")
        seconds = {"eager": [2.0, 2.1] * 10, "cpu": [1.0, 1.2] * 10}
        entries = {n: Entry(provider=n) for n in seconds}
        rows.append(filled(row, entries, seconds, 1.0, {"cpu"}))
    again = Repeated(
        key=rows[0].key, row="geglu", provider="cpu", clock="time", speed=(0.5,), eager=(-3.0,)
    )
    return Run(environment=FACTS, rows=tuple(rows), repeats=(again,))


def test_a_run_is_the_same_after_a_round_trip(tmp_path: Path) -> None:
    one = replace(run(), left_out=("sdxl step",), clocks={"samples": 0})
    save(one, tmp_path / "a.json")
    assert load(tmp_path / "a.json") == one


def broken(content: dict[str, Any], **changes: Any) -> str:
    return json.dumps({**content, **changes})


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    save(run(), path)
    content = json.loads(path.read_text())
    for text, message in (
        ("{", "not JSON"),
        ("[]", "not a result"),
        (broken(content, format="a recipe"), "not a result"),
        (broken(content, version=99), "version 99 of the format, expected 2"),
        (broken(content, rows=[{"kind": 3}]), "damaged"),
        (broken(content, rows=None), "damaged"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load(path)


def test_the_best_baseline_is_the_fastest_that_is_not_ours_and_no_limit() -> None:
    row = Row(kind="op", name="a", job="", shape="", dtype="float32", method="host", limit="copy")
    seconds = {"eager": 3.0, "compile": 2.0, "cpu": 2.5, "copy": 1.0}
    entries = {name: Entry(provider=name) for name in seconds}
    found = filled(row, entries, {n: [s] * 20 for n, s in seconds.items()}, 1.0, {"cpu"})
    assert found.baseline == "compile"
    assert found["cpu"].ratio == Ratio(0.8, 0.8, 0.8, 20)
    assert found["cpu"].verdict == "slower"
    assert found["compile"].ratio is None
    assert [entry.provider for entry in found.ours] == ["cpu"]
