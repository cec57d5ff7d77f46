"""Jobs whose rows and shards lie behind URLs have the bytes of those in folders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from fastdiff.jobs import JobSpec, run_job
from fastdiff.jobs.store import Folder, open_store, url_of
from tests.jobs.jobs import content, mixed_rows, shards_of, spec_of
from tests.jobs.test_same_job import written


@pytest.fixture
def memory() -> Any:
    files = fsspec.filesystem("memory")  # of which there is one in a process
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    yield files
    files.store.clear()


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    """A job with pictures, in three shards."""
    return written(tmp_path)


def objects(files: MemoryFileSystem, root: str) -> dict[str, bytes]:
    names = [name for name in files.find(root) if not name.endswith("report.html")]
    return {name.removeprefix(f"{root}/"): files.cat_file(name) for name in names}


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_a_store_gets_what_a_folder_gets(
    spec: JobSpec, memory: MemoryFileSystem, kind: str
) -> None:
    """Rows, pictures, shards and all else in a store; a shard is lost, and made again."""
    spec = replace(spec, format=kind)  # type: ignore[arg-type]
    run_job(spec)
    memory.put(f"{Path(spec.rows).parent}/in", "/bucket/in", recursive=True)
    memory.put_file(spec.rows, "/bucket/rows.jsonl")
    remote = replace(spec, rows="memory://bucket/rows.jsonl", out=Path("memory://bucket/out"))
    assert run_job(remote).images == 6
    assert objects(memory, "/bucket/out") == content(spec.out)
    memory.rm_file(f"/bucket/out/{shards_of(remote).name(1)}")
    assert run_job(remote).status.made == 2
    assert objects(memory, "/bucket/out") == content(spec.out)


def test_errors_in_a_store_are_retried(spec: JobSpec, memory: MemoryFileSystem) -> None:
    rows = [*mixed_rows(2), {"image": "late.png", "strength": 0.5, "steps": 2}]
    path = spec_of(Path(spec.rows).parent, rows, name="late.jsonl").rows
    memory.put_file(path, "/bucket/late.jsonl")
    remote = replace(spec, rows="memory://bucket/late.jsonl", out=Path("memory://bucket/late"))
    assert run_job(remote).errors == 1
    memory.put_file(str(Path(spec.rows).parent / "in/1.png"), "/bucket/late.png")
    assert (run_job(remote, retry_errors=True).errors, run_job(remote).images) == (0, 3)
    assert "000001.errors.jsonl" not in objects(memory, "/bucket/late")


def test_a_file_url_is_its_folder(spec: JobSpec, tmp_path: Path) -> None:
    store = open_store(Path(f"file://{tmp_path}/out"))
    assert store == Folder(tmp_path / "out")
    run_job(replace(spec, rows=f"file://{spec.rows}", out=Path(f"file://{tmp_path}/there")))
    run_job(spec)
    assert content(tmp_path / "there") == content(spec.out)


def test_urls_survive_a_path() -> None:
    assert url_of(Path("s3://bucket/a/b")) == url_of("s3://bucket/a/b") == "s3://bucket/a/b"
    assert url_of(Path("out/job")) is None
    assert url_of("C:/out") is None


def test_what_a_store_cannot_do_is_said(
    spec: JobSpec, memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path("memory://bucket/no")
    with pytest.raises(ValueError, match=r"use --format webdataset or --format parquet"):
        run_job(replace(spec, out=out, format="folder"))
    with pytest.raises(ValueError, match=r"may be seen before it is whole; give a folder or one"):
        run_job(replace(spec, out=Path("ftp://host/out")))
    with pytest.raises(ValueError, match=r"is seen by one process only; use --workers 1"):
        run_job(replace(spec, out=out), workers=2)
    memory.store.clear()
    pipe = MemoryFileSystem.pipe_file

    def unconditional(self: Any, path: str, value: bytes, mode: str = "", **more: Any) -> None:
        pipe(self, path, value, **more)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", unconditional)
    with pytest.raises(ValueError, match=r"memory://bucket/no has no conditional put"):
        run_job(replace(spec, out=out))
