"""The row of a job: its files are the images of bare sampling, which is its limit."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastdiff.bench import plan
from fastdiff.bench.clock import HostTimer
from fastdiff.bench.contest import Conditions
from fastdiff.bench.page import answer
from fastdiff.bench.plan import Plan
from fastdiff.bench.result import Run
from fastdiff.bench.turns import in_turns
from fastdiff.bench.whole_job import check_files, job_row
from fastdiff.images import save_png

CPU = torch.device("cpu")


def test_a_job_beside_its_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdiff.bench.whole_job.STEPS", 1)
    monkeypatch.setattr("fastdiff.bench.whole.in_turns", partial(in_turns, least=1))
    conditions = Conditions(timer=HostTimer(), device=CPU, budget_s=0.0)
    row = job_row(conditions, rows=2)
    assert (row.kind, row.images, row.limit) == ("job", 2, "sampling")
    assert {entry.provider for entry in row.entries} == {"fastdiff", "eager", "sampling"}
    assert not any(entry.note for entry in row.entries)
    assert row.baseline == "eager"
    ours, sampling = row["fastdiff"], row["sampling"]
    assert ours.ratio is not None
    assert sampling.ratio is None
    assert ours.share is not None
    assert 0 < ours.share < 1.5
    (line,) = [text for text in answer(Run(environment={}, rows=(row,))) if "job of" in text]
    assert f"{2 / (ours.median_s or 0):.3g} images/s, {ours.share:.0%} of sampling" in line


@pytest.mark.parametrize(
    ("change", "count", "message"),
    [
        (0.0, 2, None),
        (0.1, 2, "differ from sampled images by 12 levels"),
        (0.0, 1, "the job of 2 rows wrote 1 images"),
    ],
)
def test_wrong_files_are_noticed(
    tmp_path: Path, change: float, count: int, message: str | None
) -> None:
    images = torch.zeros(2, 1, 4, 4)

    def whole() -> Tensor:
        for place in range(count):
            save_png(tmp_path / f"{place}.png", images[place] + change)
        return torch.tensor([count])

    def checked() -> None:
        check_files(tmp_path, 2, whole, lambda: images)

    if message is None:
        checked()
    else:
        with pytest.raises(RuntimeError, match=message):
            checked()


def test_a_quick_run_has_jobs_only_if_asked() -> None:
    def names(**options: object) -> list[str]:
        chosen = Plan(presets=("digits",), **options)  # type: ignore[arg-type]
        conditions = Conditions(timer=HostTimer(), device=CPU)
        return [name for name, _ in plan._tasks(chosen, None, conditions)]

    assert "digits job" in names()
    assert "digits job" not in names(quick=True)
    assert names(quick=True, parts=("jobs",)) == ["digits job"]
