"""A job from a file of rows to files of images, next to the sampling that it contains.

fastdiff     `fastdiff.jobs.run_job`: read the rows, load the model, sample, write PNG files
eager        the same with networks on torch's functions
sampling     the limit: the same images with our ops, model loaded, nothing written
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from fastdiff.bench.contest import Conditions
from fastdiff.bench.plain import plain_ops
from fastdiff.bench.result import Row
from fastdiff.bench.whole import OURS, Contestant, contested

SAMPLING = "sampling"
ROWS = {True: 16, False: 128}
"""Quick or not -> rows of the job."""
STEPS, GUIDANCE = 10, 2.0


def bare_job_row(rows: int) -> Row:
    """The row of a job without entries."""
    return Row(
        kind="job",
        name="digits",
        job="",
        shape=f"{rows} rows, {STEPS} steps, guided",
        dtype="float32",
        method="host",
        images=rows,
        limit=SAMPLING,
    )


def job_row(conditions: Conditions, *, rows: int) -> Row:
    """Images per second of a job of digits, and the share of bare sampling that it reaches.

    Raises:
        RuntimeError: the files of the job are not the images that sampling makes.
    """
    with job_contestants(conditions.device, rows=rows) as contest:
        return contested(bare_job_row(rows), contest, conditions, 1.0, {})


@contextlib.contextmanager
def job_contestants(device: torch.device, *, rows: int) -> Iterator[dict[str, Contestant]]:
    """The providers of the row; their files are deleted at the end."""
    with tempfile.TemporaryDirectory(prefix="fastdiff-bench-") as folder:
        place = Path(folder)
        lines = [json.dumps({"label": row % 10, "seed": row}) for row in range(rows)]
        (place / "rows.jsonl").write_text("\n".join(lines) + "\n")
        whole, sampling = _whole(place, device), _sampling(device, rows)
        check_files(place / "0", rows, whole, sampling)
        yield {
            OURS: Contestant(whole),
            "eager": Contestant(whole, plain_ops),
            SAMPLING: Contestant(lambda: _count(sampling())),
        }


def _whole(place: Path, device: torch.device) -> Callable[[], Tensor]:
    """The job, into another folder in each call."""
    from fastdiff.jobs import JobSpec, run_job

    calls = iter(range(2**31))

    def run() -> Tensor:
        spec = JobSpec(
            rows=str(place / "rows.jsonl"),
            out=place / str(next(calls)),
            defaults={"steps": STEPS, "guidance_scale": GUIDANCE},
            device=str(device),
        )
        return torch.tensor([run_job(spec, threads=torch.get_num_threads()).images])

    return run


def _sampling(device: torch.device, rows: int) -> Callable[[], Tensor]:
    """The images (N, C, H, W) of the job's rows, without files."""
    from fastdiff.checkpoint.open import load
    from fastdiff.generate.job import ClassJob, SampleSettings
    from fastdiff.generate.run import generate

    model = load("digits", device=str(device))
    settings = SampleSettings(steps=STEPS, guidance_scale=GUIDANCE)
    jobs = [ClassJob(label=row % 10, seed=row, settings=settings) for row in range(rows)]
    return lambda: torch.stack([result.image for result in generate(model, jobs)])


def _count(images: Tensor) -> Tensor:
    return torch.tensor([len(images)])


def check_files(
    folder: Path, rows: int, whole: Callable[[], Tensor], sampling: Callable[[], Tensor]
) -> None:
    """Compare the job's files, which its first call writes into a folder, with sampled images.

    Raises:
        RuntimeError: there are more or fewer, or a pixel differs by more than one level.
    """
    from fastdiff.images import read_image, to_uint8

    whole()
    files = sorted(folder.rglob("*.png"))
    if len(files) != rows:
        raise RuntimeError(f"the job of {rows} rows wrote {len(files)} images")
    written = to_uint8(torch.stack([read_image(path) for path in files])).int()
    expected = to_uint8(sampling().cpu()).int()
    difference = (written - expected.expand_as(written)).abs().max().item()
    if difference > 1:
        raise RuntimeError(f"the job's files differ from sampled images by {difference} levels")
