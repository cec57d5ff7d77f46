"""What a job depends on is compared or noticed: paths do not count, contents do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdiff.checkpoint.open import load
from fastdiff.generate.job import ClassJob
from fastdiff.generate.run import stream
from fastdiff.images import save_png
from fastdiff.jobs import JobSpec, run_job, settle
from fastdiff.jobs.fingerprint import read_fingerprint
from fastdiff.jobs.processes import Task, _work
from fastdiff.jobs.rows import RowFile, open_rows
from fastdiff.jobs.shards import Claims
from fastdiff.jobs.store import Folder, Store
from fastdiff.jobs.worker import Begun
from tests.jobs.jobs import content, shards_of, spec_of, tiny_bundle

ROWS: list[dict[str, Any]] = [
    {"image": f"in/{number % 3}.png", "strength": 0.5, "steps": 2} for number in range(6)
]


def written(folder: Path) -> JobSpec:
    """A folder with a model, rows and pictures, and a job of them in three shards."""
    (folder / "in").mkdir(parents=True)
    tiny_bundle(folder)
    for number in range(3):
        picture = torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(number))
        save_png(folder / f"in/{number}.png", picture * 2 - 1)
    return spec_of(folder, ROWS, shard_size=2)


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    return written(tmp_path / "one")


def test_a_job_goes_on_at_another_place(spec: JobSpec, tmp_path: Path) -> None:
    run_job(spec)
    whole = content(spec.out)
    (spec.out / "000001.tar").unlink()
    other = tmp_path / "deep" / "other"
    shutil.copytree(tmp_path / "one", other)
    shutil.rmtree(tmp_path / "one")
    (other / "tiny").rename(other / "renamed")
    moved = replace(
        spec, rows=str(other / "rows.jsonl"), model=str(other / "renamed"), out=other / "out"
    )
    assert run_job(moved).status.made == 2
    assert content(moved.out) == whole
    recipe = json.loads(next(shards_of(moved).read(1)).recipe)
    assert (recipe["model"], recipe["job"]["image"]["path"]) == ("tiny", "in/2.png")
    fresh = replace(
        moved, model=str(shutil.move(other / "renamed", other / "tiny")), out=other / "x"
    )
    run_job(fresh)
    assert content(fresh.out) == whole


def test_a_picture_that_changed_between_runs_is_recorded(spec: JobSpec) -> None:
    run_job(spec)
    whole = content(spec.out)
    picture = Path(spec.rows).parent / "in/1.png"
    before = picture.read_bytes()
    save_png(picture, torch.zeros(1, 16, 16))
    (spec.out / "000000.tar").unlink()
    assert run_job(spec).errors == 1
    (record,) = shards_of(spec).errors(0)
    assert record["row"] == 1
    assert "a picture of the row has changed since the job began" in record["error"]
    picture.write_bytes(before)  # what the message advises
    assert run_job(spec, retry_errors=True).errors == 0
    assert content(spec.out) == whole


def test_damaged_hashes_of_pictures_are_refused(spec: JobSpec) -> None:
    run_job(spec)
    path = spec.out / "pictures.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"pictures.bin is damaged"):
        run_job(spec)


def test_rows_that_change_during_the_job_are_noticed(
    spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, calls = RowFile.check_unchanged, 0

    def changed(self: RowFile) -> None:
        nonlocal calls
        calls += 1
        if calls == 12:  # after the first row was checked and all pictures were hashed
            self.path.write_text(self.path.read_text().replace("0.5", "0.6", 1))
        read(self)

    monkeypatch.setattr(RowFile, "check_unchanged", changed)
    with pytest.raises(ValueError, match=r"rows.jsonl was changed while the job read it"):
        run_job(spec)
    assert not (spec.out / "000002.tar").exists()


def test_a_worker_with_other_weights_refuses(spec: JobSpec) -> None:
    spec.out.mkdir()
    begun = Begun(model="tiny", weights="0" * 64, pictures=None)
    task = Task(spec, open_rows(spec.rows), begun, 4, 1, (0, 1), [], 2)
    with pytest.raises(ValueError, match=r"the weights of .*tiny have changed since the job began"):
        _work(json.loads(task.line(0, 4)), lambda counts: None, None)


def test_without_locks_workers_get_shares(spec: JobSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    spec.out.mkdir()
    with pytest.warns(UserWarning, match="out has no locks, so each worker gets a fixed share"):
        locks = run_job.__globals__["_share_by_locks"](Folder(spec.out))
    one, other = Claims(Folder(spec.out)), Claims(Folder(spec.out))
    assert (locks, one.take(1), other.take(1)) == (False, True, True)
    begun, rows = Begun("tiny", "", None), open_rows(spec.rows)
    task = Task(spec, rows, begun, 4, 1, (1, 2), [3], 2, locks)
    lines = [json.loads(task.line(index, 4)) for index in range(2)]
    shares = [set(range(line["share"][0], 12, line["share"][1])) for line in lines]
    assert shares == [{1, 5, 9}, {3, 7, 11}]
    assert all(line["retry"] == [3] for line in lines)


def test_a_process_that_begins_at_the_same_instant_takes_the_choices_of_the_other(
    spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin: Callable[[Store, dict[str, Any]], bool] = settle.begin

    def late(store: Store, mine: dict[str, Any]) -> bool:
        mine["compute"]["threads"] = 3
        assert begin(store, mine)
        return begin(store, mine)

    monkeypatch.setattr(settle, "begin", late)
    assert run_job(spec).images == 6
    found = read_fingerprint(Folder(spec.out))
    assert found is not None
    assert found["compute"]["threads"] == 3


def test_the_memory_of_one_image_decides_whether_a_row_fits(
    spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More slots than fit are halved when memory runs out; the row must not fail before."""
    asked: list[tuple[int, int | None]] = []
    monkeypatch.setattr(
        "fastdiff.generate.memory.check_fits",
        lambda models, job, call, **_: asked.append((call.count, call.batch)),
    )
    monkeypatch.setattr("fastdiff.generate.run.is_small", lambda *_, **__: False)
    model = load(spec.model, device="cpu", dtype=torch.float32)
    jobs = [ClassJob(seed=seed, height=16, width=16) for seed in range(2)]
    made = stream(model, jobs, on_failure=lambda number, error: None, batch=64)
    assert len([*made]) == 2
    assert asked == [(1, 1)]
