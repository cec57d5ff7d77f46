"""How much of a job's time is sampling and decoding: the job against `stream` on the same batch.

    python -m tests.jobs.throughput --images 100 --steps 10

Both run in this process with one thread for the network, once without counting. Seconds are of
the CPU, so that other programs do not matter. "sampling thread" leaves out the threads that encode
and write, which other cores run at the same time; "one core" counts them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from fastdiff.checkpoint.open import load
from fastdiff.generate.job import ClassJob, SampleSettings
from fastdiff.generate.run import stream
from fastdiff.jobs import JobSpec, run_job


@contextlib.contextmanager
def timed() -> Iterator[list[float]]:
    """Seconds of this thread and of this process."""
    since, found = (time.thread_time(), time.process_time()), list[float]()
    yield found
    found += [time.thread_time() - since[0], time.process_time() - since[1]]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.jobs.throughput")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--model", default="digits")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load(options.model, device="cpu", dtype=torch.float32)
    settings = SampleSettings(steps=options.steps, sampler="ddim")
    jobs = [ClassJob(label=n % 10, seed=n, settings=settings) for n in range(options.images)]

    def fail(number: int, error: Exception) -> None:
        raise error

    with tempfile.TemporaryDirectory() as name:
        rows = Path(name) / "rows.jsonl"
        rows.write_text("".join(f"{json.dumps({'label': job.label})}\n" for job in jobs))
        spec = JobSpec(
            rows=str(rows),
            model=options.model,
            shard_size=20,
            device="cpu",
            format="webdataset",
            defaults={"steps": options.steps, "sampler": "ddim"},
        )
        for number in range(2):  # the first time warms up
            with timed() as bare:
                made = sum(1 for _ in stream(model, jobs, on_failure=fail))
            with timed() as whole:
                summary = run_job(replace(spec, out=Path(name) / str(number)), threads=1)
            assert made == summary.images == options.images
    print(
        f"{options.images} images of {options.steps} steps: {bare[0]:.2f} s bare; the job takes "
        f"{whole[0]:.2f} s of its sampling thread ({bare[0] / whole[0]:.1%} of bare) and "
        f"{whole[1]:.2f} s of one core ({bare[1] / whole[1]:.1%}), loading the model included"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
