"""`fastdiff generate`: options and a job's file say the same, and mistakes are one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastdiff.cli import generate, main
from fastdiff.cli.generate import status_line
from fastdiff.generate.job import PLAIN
from fastdiff.jobs import JobSpec, Status, Summary, read_job
from fastdiff.jobs.run import share_of_environment
from tests.jobs.jobs import content, mixed_rows, spec_of, tiny_bundle

FILE = """
rows: rows.csv
model: tiny
columns: {label: digit}
ignore: [id]
defaults: {steps: 2, sampler: ddim, eta: 0.5}
seed: 5
shard_size: 3
format: webdataset
out: made
device: cpu
load: {strict: true}
"""
OPTIONS = (
    "rows.csv --model tiny --column label=digit --ignore id --default eta=0.5 --steps 2 "
    "--sampler ddim --seed 5 --shard-size 3 --format webdataset --out made --device cpu --strict"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text(FILE)
    (tmp_path / "rows.csv").write_text("digit,id\n1,a\n2,b\n")
    return tmp_path


@pytest.fixture
def specs(monkeypatch: pytest.MonkeyPatch) -> list[JobSpec]:
    """The jobs that the command would run."""
    found: list[JobSpec] = []

    def run_job(spec: JobSpec, **options: object) -> Summary:
        found.append(spec)
        raise KeyboardInterrupt

    monkeypatch.setattr("fastdiff.jobs.run_job", run_job)
    return found


def test_a_file_and_options_are_the_same_job(folder: Path, specs: list[JobSpec]) -> None:
    main(["generate", "job.yaml"])
    main(["generate", *OPTIONS.split()])
    main(["generate", "job.yaml", "--steps", "3", "--seed", "6", "--default", "eta=0.25"])
    assert specs[0] == specs[1]
    assert specs[0].defaults == {"steps": 2, "sampler": "ddim", "eta": 0.5}
    assert specs[0].rows == "rows.csv"
    assert specs[2].defaults == {"steps": 3, "sampler": "ddim", "eta": 0.25}
    assert specs[2].seed == 6
    (folder / "other.yaml").write_text("rows: rows.csv\ndefaults: {guidance_rescale: 0.7}")
    main(["generate", "other.yaml", "--guidance-rescale", str(PLAIN.guidance_rescale)])
    main(["generate", "other.yaml"])
    assert [spec.defaults["guidance_rescale"] for spec in specs[3:]] == [0.0, 0.7]
    assert specs[0].recorded == {**read_job("job.yaml").recorded, "dtype": "float32"}
    assert JobSpec.of_recorded(json.loads(json.dumps(specs[0].recorded))) == specs[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows: [", "job.yaml is not YAML"),
        ("model: tiny", "the job lacks 'rows'"),
        ("rows: a.csv\nshardsize: 3", "unknown field 'shardsize'; did you mean shard_size"),
        ("rows: a.csv\nshard_size: many", "shard_size must be a whole number, got 'many'"),
        ("rows: a.csv\nshard_size: 0", "shard_size must be a whole number of at least 1, got 0"),
        ("rows: a.csv\nformat: zip", "unknown format 'zip'"),
        ("rows: a.csv\nload: {vaee: x}", "unknown loading option 'vaee'"),
        ("rows: a.csv\ndtype: int8", "unknown dtype 'int8'"),
        ("[1, 2]", "a job must be an object"),
    ],
)
def test_a_wrong_file_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    (folder / "job.yaml").write_text(text)
    assert main(["generate", "job.yaml"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.csv"], "no file of rows at none.csv"),
        (["rows.csv", "--shard", "3/2"], "--shard must be I/N with I from 1 to N, such as 1/4"),
        (["rows.csv", "--shard", "0/2"], "--shard must be I/N"),
        (["rows.csv", "--column", "label"], "--column takes pairs such as prompt=caption"),
        (["rows.csv", "--default", "stps=3"], "unknown field 'stps'; did you mean steps"),
        (["rows.csv", "--default", "height=big"], "height must be a whole number, got 'big'"),
        (["rows.csv", "--workers", "0"], "workers and share must be at least 1"),
        (["rows.csv"], "unknown column 'digit'; map it to a field (--column FIELD=digit)"),
        (["rows.csv", "--column", "label=digit"], "unknown column 'id'"),
    ],
)
def test_a_mistake_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["generate", *words, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (folder / "out").exists()


def test_the_advice_about_columns_works(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_bundle(folder)
    words = ["rows.csv", "--model", "tiny", "--device", "cpu", "--steps", "1"]
    assert main(["generate", *words, "--column", "label=digit", "--ignore", "id"]) == 0
    said = capsys.readouterr().out
    assert "images    2\n" in said
    assert "shards    1 of 1\n" in said


def test_a_share_of_torchrun(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks make the shards that one process makes."""
    tiny_bundle(folder)
    spec = spec_of(folder, mixed_rows(9), "made", shard_size=2)
    words = [spec.rows, "--model", "tiny", "--device", "cpu", "--shard-size", "2"]
    words += ["--format", "webdataset", "--threads", "1"]
    assert main(["generate", *words, "--out", "whole"]) == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, there in ((0, {0, 2, 4}), (1, {0, 1, 2, 3, 4})):
        monkeypatch.setenv("RANK", str(rank))
        assert main(["generate", *words, "--out", "ranks"]) == 0
        assert {int(path.stem) for path in (folder / "ranks").glob("0*.tar")} == there
    assert content(folder / "ranks") == content(folder / "whole")


def test_the_environment_of_torchrun() -> None:
    assert share_of_environment({}) is None
    assert share_of_environment({"RANK": "3", "WORLD_SIZE": "8"}) == (4, 8)
    for rank in ("8", "-1", "x"):
        with pytest.raises(ValueError, match="RANK must be from 0 to WORLD_SIZE - 1"):
            share_of_environment({"RANK": rank, "WORLD_SIZE": "8"})
    assert generate.local_device("cuda", {"LOCAL_RANK": "3"}) == "cuda:3"
    assert generate.local_device("cuda:1", {"LOCAL_RANK": "3"}) == "cuda:1"
    assert generate.local_device("cpu", {"LOCAL_RANK": "3"}) == "cpu"
    assert generate.local_device("cuda", {}) == "cuda"


def test_a_line_of_progress() -> None:
    status = Status(
        rows=10_000, before=1000, made=2000, failed=3, busy=60, slots=64, waiting=0,
        memory=3 * 2**29, seconds=50.0,
    )  # fmt: skip
    assert status_line(status) == (
        "3,003 of 10,000 rows, 3 failed, 40.0 images/s, 2 min 55 s left, 60 of 64 slots, 1.5 GiB"
    )
