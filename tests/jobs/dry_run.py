"""Stream many rows through a job whose network costs nothing, and watch the memory.

    python -m tests.jobs.dry_run --rows 1000000

Everything but the network is real: reading, checking, the engine, encoding, shards. Prints the peak
of the memory after 1,000 rows and after each tenth, and what a row costs.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.checkpoint.layouts.bundle import save_bundle
from fastdiff.jobs import JobSpec, Status, run_job
from fastdiff.runtime.denoiser import Batch, Denoiser
from tests.support.tiny import UNET, tiny_pixel_model, tiny_unet

SHARD = 500


def without_network(self: Denoiser, x: Tensor, batch: Batch, *_inputs: Any) -> Tensor:
    """In place of `Denoiser.__call__`: zeros, of the shape that a network would return."""
    return x.new_zeros(batch.rows, *x.shape[1:])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.jobs.dry_run")
    parser.add_argument("--rows", type=int, default=20_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    Denoiser.__call__ = without_network  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as name:
        folder, since = Path(name), time.process_time()
        model = tiny_pixel_model(
            denoiser=tiny_unet(replace(UNET, in_channels=1, out_channels=1)),
            image_channels=1,
            image_size=8,
        )
        save_bundle(model, folder / "tiny", provenance={"command": "a dry run"})
        with (folder / "rows.csv").open("w") as file:
            file.write("label,steps,sampler\n")
            for number in range(options.rows):
                file.write(f"{number % 4},{1 + number % 2},{('ddim', 'euler')[number % 2]}\n")
        marks = sorted({1000, *(options.rows * tenth // 10 for tenth in range(1, 11))})
        begun = time.monotonic()

        def listen(status: Status) -> None:
            done = status.made + status.failed
            if marks and done >= marks[0]:
                del marks[: sum(mark <= done for mark in marks)]
                each = (time.process_time() - since) / done * 1000
                print(
                    f"{done:,} rows, peak {peak() / 2**20:.1f} MiB, {each:.2f} ms of CPU each, "
                    f"{time.monotonic() - begun:.0f} s",
                    flush=True,
                )

        spec: dict[str, Any] = {"format": "webdataset", "shard_size": SHARD, "device": "cpu"}
        rows = str(folder / "rows.csv")
        job = JobSpec(rows=rows, model=str(folder / "tiny"), out=folder / "out", **spec)
        summary = run_job(job, listen=listen)
        seconds = (time.process_time() - since) / options.rows * 1000
        print(f"{summary.images} images, peak {peak()} bytes, {seconds:.2f} ms of CPU each")
        return int(summary.images != options.rows)


def peak() -> int:
    """The most bytes that this process has had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())
