"""Simulate the engine, the workers and the store of a job, and write docs/scaling.md.

    python -m benchmarks.scaling            write the page
    python -m benchmarks.scaling --check    say whether the page is up to date

Engine: the rule by which `runtime.engine` picks the requests of a step, without a network; it
counts network rows. Workers: each takes shard after shard, as `jobs.worker` does, and starts the
next one when its engine has room. Store: puts that share a bandwidth.

Nothing here is a measurement. Rates of the page are inputs, named there with their source.
"""

from __future__ import annotations

import argparse
import heapq
import random
import sys
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs/scaling.md"
Request = Sequence[int]
"""Network rows of each step of a request: 1, or 2 where it is guided."""


# --- the engine -----------------------------------------------------------------------------------


def network_rows(requests: Iterable[Request], slots: int, block: int) -> int:
    """Network rows that the slot engine evaluates, with padding, until all requests are done.

    block: rows per evaluation on a CPU, see `runtime.blocks`. Each step takes as many requests as
    fill whole blocks; those left over come first in the next step.
    """
    waiting, busy, total = deque(requests), deque[tuple[Request, int]](), 0
    while waiting or busy:
        while waiting and len(busy) < slots:
            busy.append((waiting.popleft(), 0))
        room = sum(request[at] for request, at in busy)
        room = max(room - room % block, block)
        rows, kept, advanced = 0, deque[tuple[Request, int]](), deque[tuple[Request, int]]()
        for request, at in busy:
            if request[at] <= room:
                room -= request[at]
                rows += request[at]
                if at + 1 < len(request):
                    advanced.append((request, at + 1))
            else:
                kept.append((request, at))
        total += -(-rows // block) * block
        busy = kept + advanced
    return total


def static_rows(requests: Iterable[Request], settings: Iterable[object], block: int) -> int:
    """The same for batches of requests with equal settings, one batch after another."""
    groups: dict[object, list[Request]] = defaultdict(list)
    for request, key in zip(requests, settings, strict=True):
        groups[key].append(request)
    return sum(network_rows(group, len(group), block) for group in groups.values())


# --- workers and the store ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """Workers, what each does, and where their shards go."""

    workers: int
    rate: float
    """Images per second of one worker with full slots."""
    slots: int
    start: float
    """Seconds until a worker makes its first images: imports, model, graphs."""
    image_bytes: float
    bandwidth: float
    """Bytes per second of the store, of all workers together."""
    put: float = 0.1
    """Seconds of a put besides its bytes."""
    life: float | None = None
    """Mean seconds between two losses of one worker; None: none is lost."""


def seconds_of(fleet: Fleet, images: int, shard: int, seed: int = 0) -> float:
    """Seconds until all shards of a job are in the store.

    A shard of n images leaves the engine n / rate after the one before it. The last ones of a
    worker take longer: when nothing is left to join, slots run empty, and the images in progress
    finish together after the time in which full slots are made once. A lost worker starts again and
    makes its shard again.
    """
    rng = random.Random(seed)
    left = [min(shard, images - first) for first in range(0, images, shard)]
    left.reverse()
    free = [(fleet.start * rng.uniform(0.9, 1.1), worker) for worker in range(fleet.workers)]
    heapq.heapify(free)
    lives = [_life(fleet, rng) for _ in range(fleet.workers)]
    latency = fleet.slots / fleet.rate
    done = store_free = 0.0
    while left:
        now, worker = heapq.heappop(free)
        count = left.pop()
        end = now + count / fleet.rate
        if end + latency > lives[worker]:  # lost in the middle of the shard
            left.append(count)
            again = max(lives[worker], now) + fleet.start
            lives[worker] = again + _life(fleet, rng)
            heapq.heappush(free, (again, worker))
            continue
        heapq.heappush(free, (end, worker))
        begin = max(end + latency, store_free)  # encoding and writing overlap with the next shard
        store_free = begin + count * fleet.image_bytes / fleet.bandwidth
        done = max(done, store_free + fleet.put)
    return done


def _life(fleet: Fleet, rng: random.Random) -> float:
    return float("inf") if fleet.life is None else rng.expovariate(1 / fleet.life)


def efficiency(fleet: Fleet, images: int, shard: int) -> float:
    """Part of the images per second of as many workers that nothing delays."""
    return images / (fleet.workers * fleet.rate) / seconds_of(fleet, images, shard)


# --- the page -------------------------------------------------------------------------------------

DIGITS = 100_000
GPU_SECOND = 2.5 / 3600
"""Dollars per second of a GPU, the one assumed price of the page."""
CPU = Fleet(workers=1, rate=46.0, slots=64, start=4.0, image_bytes=1.5e3, bandwidth=1e9, put=0.01)
GPU = Fleet(
    workers=1, rate=4.0, slots=64, start=90.0, image_bytes=4e5, bandwidth=5e9, life=24 * 3600.0
)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page() -> str:
    """The text of docs/scaling.md."""
    small = [(count, replace(CPU, workers=count)) for count in (1, 2, 4, 8)]
    one = seconds_of(small[0][1], DIGITS, 20)
    few = _table(
        ("workers", "images/s", "of linear"),
        (
            (
                str(count),
                f"{DIGITS / (took := seconds_of(fleet, DIGITS, 20)):.1f}",
                f"{one / took / count:.1%}",
            )
            for count, fleet in small
        ),
    )
    many = _table(
        ("GPUs", "shards of", "hours", "images/s", "of linear", "dollars per 1,000 images"),
        (_gpus(count, shard) for count in (8, 64, 256, 1000) for shard in (100, 1000)),
    )
    return TEXT.format(
        digits=DIGITS, few=few, many=many, cpu=CPU, gpu=GPU, dollars=GPU_SECOND * 3600
    )


def _gpus(count: int, shard: int) -> Sequence[str]:
    images, fleet = 1_000_000, replace(GPU, workers=count)
    took = seconds_of(fleet, images, shard)
    return (
        f"{count:,}",
        f"{shard:,}",
        f"{took / 3600:.2f}",
        f"{images / took:,.0f}",
        f"{images / (count * fleet.rate) / took:.1%}",
        f"{took * count * GPU_SECOND / images * 1000:.3f}",
    )


TEXT = """# To 1,000 GPUs

Workers share nothing but the names of finished shards, so a job scales until one of four things
ends it: workers that start, the last shards, the store, and machines that are lost. Generated by
`python -m benchmarks.scaling`, a simulation of the engine, the workers and the store;
`tests/jobs/test_scaling.py` holds its network rows within 5% of a run. **No GPU has run any of
this.**

## One machine

{digits:,} digits in shards of 20, {cpu.rate:g} images/s per worker (500 rows of one to three steps,
five samplers, guided or not, by one worker with one thread on a Xeon, 2026-11-30; 19 to 35 while
other programs used the cores), {cpu.start:g} s to start a worker, {cpu.slots} slots.

{few}

Workers here have a core each. What is missing is the start of the workers, which a longer job
does not feel. Not measured: the machine at hand has two cores, which others share.

## Many GPUs

A million images of 512 x 512, simulated with figures that are **assumptions**: {gpu.rate:g}
images/s per GPU, {gpu.start:g} s until a worker makes images, {gpu.slots} slots, 400 kB per
image, a store that takes 5 GB/s, a worker lost once a day on average, {dollars} dollars per GPU
and hour. Put in what `fastdiff bench` measures on yours.

{many}

## Limits

- **Start.** At 1,000 GPUs the job lasts minutes, of which the start of a worker takes most of
  what is missing. A larger job has the same loss once.
- **Shards.** With fewer shards than a few per worker, most workers wait for the last. Take shards
  of at most images / (10 x workers), and see that listing and reading that many files is no
  burden.
- **Store.** 1,000 GPUs at {gpu.rate:g} images/s write 1.6 GB/s. A store that takes less is the
  limit, whatever the workers do.
- **Losses.** A lost worker costs its start and the shards it was making. At one loss per GPU and
  day that is below 1% for shards of up to 1,000 images.
- **Reading.** Each command reads all rows once to count and hash them, and rows that may name
  pictures a second time. A million rows take seconds, or a minute; a billion would need one count
  for all.
- **Shares.** Without locks or Ray, shares are fixed: the slowest worker decides. The simulation
  hands out shards one by one.
- **Ray.** The ledger answers two calls per shard; 1,000 workers with shards of 100 at
  {gpu.rate:g} images/s make 80 calls a second.
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if options.check:
        if PAGE.read_text(encoding="utf-8") == page():
            return 0
        print(f"{PAGE} differs; run python -m benchmarks.scaling")
        return 1
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
