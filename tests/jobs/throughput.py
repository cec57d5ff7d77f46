"""How much of a job's time is sampling and decoding.

    python -m tests.jobs.throughput --images 1000 --steps 6

A job runs in this process with one thread for the network. What its call of `stream` takes, without
the rows that it is given, is the sampling and decoding that it would take without a job; both are
measured in one run, so that other programs slow both down. Seconds are of the CPU: "sampling
thread" leaves out the threads that encode and write, which other cores run at the same time; "one
core" counts them. Loading the model, checking the rows and the report count as parts of the job.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastdiff.generate.job import Job
from fastdiff.generate.run import Progress, Result, stream
from fastdiff.jobs import JobSpec, run_job, worker


@dataclass
class Meter:
    """Seconds of this thread."""

    sampling: float = 0.0
    """In `stream`."""
    given: float = 0.0
    """Of those, in what it was given: the next job, and the report of its progress."""

    @contextlib.contextmanager
    def count(self, name: str) -> Iterator[None]:
        since = time.thread_time()
        yield
        setattr(self, name, getattr(self, name) + time.thread_time() - since)

    def stream(
        self, model: Any, jobs: Iterable[Job], *, progress: Progress, **options: Any
    ) -> Iterator[tuple[int, Result]]:
        def told(done: int, total: int) -> None:
            with self.count("given"):
                progress(done, total)

        yield from self.metered(
            stream(model, self.metered(jobs, "given"), progress=told, **options), "sampling"
        )

    def metered(self, items: Iterable[Any], name: str) -> Iterator[Any]:
        items = iter(items)
        while True:
            with self.count(name):
                item = next(items, self)
            if item is self:
                return
            yield item


def measured(run: Callable[[], object]) -> tuple[float, float, float]:
    """Seconds of sampling and decoding, of the thread, and of the process."""
    meter, since = Meter(), (time.thread_time(), time.process_time())
    worker.stream = meter.stream  # type: ignore[assignment]
    run()
    worker.stream = stream
    whole, core = time.thread_time() - since[0], time.process_time() - since[1]
    return meter.sampling - meter.given, whole, core


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.jobs.throughput")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--model", default="digits")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        spec = JobSpec(
            rows=str(Path(name) / "rows.jsonl"),
            model=options.model,
            shard_size=20,
            device="cpu",
            format="webdataset",
            defaults={"steps": options.steps, "sampler": "ddim"},
            out=Path(name) / "out",
        )
        for images in (32, options.images):  # the first job warms up
            rows = [json.dumps({"label": number % 10}) for number in range(images)]
            Path(spec.rows).write_text("\n".join(rows))
            job = replace(spec, out=Path(name) / str(images))
            bare, whole, core = measured(lambda job=job: run_job(job, threads=1))  # type: ignore[misc]
    print(
        f"{options.images} images of {options.steps} steps: {bare:.2f} s of sampling and decoding; "
        f"the job takes {whole:.2f} s of its sampling thread ({bare / whole:.1%} of bare) and "
        f"{core:.2f} s of one core ({bare / core:.1%})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
