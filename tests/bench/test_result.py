"""Runs as files, and what `--compare` says of two of them."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastdiff.bench.contest import filled
from fastdiff.bench.result import Entry, Row, Run, compare, load, save
from fastdiff.bench.turns import Ratio

FACTS = {"device": "a CPU", "cores": 2, "threads": 1, "driver": "", "torch": "2.13.0"}


def run(seed: int, slower: dict[str, float] | None = None, pace: float = 1.0) -> Run:
    """Three ops of made-up times with 5% scatter; pace: of the whole machine."""
    draw = random.Random(seed)
    rows = []
    for name in ("geglu", "layer_norm", "attention"):
        row = Row(kind="op", name=name, job="a", shape="(2, 8)", dtype="float32", method="host")
        means = {"eager": 2.0, "cpu": 1.0 * (slower or {}).get(name, 1.0)}
        rounds = [draw.lognormvariate(0, 0.3) * pace for _ in range(100)]  # what both meet
        seconds = {
            n: [mean * shared * draw.lognormvariate(0, 0.05) for shared in rounds]
            for n, mean in means.items()
        }
        entries = {n: Entry(provider=n) for n in means}
        rows.append(filled(row, entries, seconds, 1.0, {"cpu"}))
    return Run(environment=FACTS, rows=tuple(rows))


def test_a_slow_down_of_a_tenth_is_found_and_nothing_else() -> None:
    for seed in range(20):
        changes = compare(run(seed), run(100 + seed, {"geglu": 1.1}, pace=3.0))
        assert {c.row.split()[0]: c.verdict == "slower" for c in changes} == {
            "geglu": True, "layer_norm": False, "attention": False,
        }  # fmt: skip
        assert not any(c.verdict == "faster" for c in changes)


def test_the_other_way_it_became_faster() -> None:
    changes = compare(run(0, {"geglu": 1.3}), run(1))
    (faster,) = [c for c in changes if c.verdict == "faster"]
    assert faster.row.startswith("geglu")
    assert faster.speedup.value == pytest.approx(1.3, rel=0.05)


def test_the_noise_of_either_run_counts() -> None:
    before, after = run(0), run(1, {"geglu": 1.1})
    noisy = replace(after, rows=tuple(replace(row, noise=0.3) for row in after.rows))
    assert not any(c.verdict == "slower" for c in compare(before, noisy))


@pytest.mark.parametrize("fact", ["device", "cores", "threads", "driver", "torch"])
def test_runs_of_different_machines_do_not_compare(fact: str) -> None:
    other = replace(run(1), environment={**FACTS, fact: "another"})
    with pytest.raises(ValueError, match=f"the runs differ in {fact}"):
        compare(run(0), other)


def test_runs_without_a_common_row() -> None:
    with pytest.raises(ValueError, match="no row in common"):
        compare(run(0), Run(environment=FACTS))


def test_a_run_is_the_same_after_a_round_trip(tmp_path: Path) -> None:
    one = replace(run(0), left_out=("sdxl step",), clocks={"samples": 0})
    save(one, tmp_path / "a.json")
    assert load(tmp_path / "a.json") == one


def broken(content: dict[str, Any], **changes: Any) -> str:
    return json.dumps({**content, **changes})


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    save(run(0), path)
    content = json.loads(path.read_text())
    for text, message in (
        ("{", "not JSON"),
        ("[]", "not a result"),
        (broken(content, format="a recipe"), "not a result"),
        (broken(content, version=99), "version 99 of the format, expected 1"),
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
    assert found["cpu"].against_eager == pytest.approx(Ratio(1.2, 1.2, 1.2, 20))
    assert found["compile"].ratio is None
    assert [entry.provider for entry in found.ours] == ["cpu"]
