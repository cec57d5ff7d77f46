"""What caching between steps costs and saves, on the shipped model: docs/caching.md.

    python -m benchmarks.caching          measure, one minute of one core
    python -m benchmarks.caching --docs   the page alone, from the record

Images of the same seeds with and without `cache`. The record is benchmarks/trained/caching.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.judging import SmallSets
from fastdiff.checkpoint.model import Model
from fastdiff.checkpoint.open import load
from fastdiff.diffusion.caching import CacheConfig
from fastdiff.evaluation.report import measured_by
from fastdiff.files import write_json, write_text
from fastdiff.generate.job import ClassJob, SampleSettings
from fastdiff.generate.run import generate
from fastdiff.kernels import backend
from fastdiff.models.network import Network

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "benchmarks/trained/caching.json"
PAGE = ROOT / "docs/caching.md"
PER_CLASS = 10
RUNS = (("dpmpp-2m", 20),)
SIDE = 8
"""Height and width of the model's latents."""


def settings_of(branches: int, steps: int) -> Iterator[dict[str, Any]]:
    """The settings of `cache` that are measured; the first is none."""
    yield {}
    for interval in (2, 3, 5):
        yield {"cache": interval}
    yield {"cache": 3, "cache_branch": branches // 2}
    for center in (steps // 4, steps * 3 // 4):
        yield {"cache": 5, "cache_center": center}


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.caching",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--docs", action="store_true", help="only write the page")
    if not parser.parse_args(words).docs:
        write_json(RECORD, measure())
    write_text(PAGE, page(json.loads(RECORD.read_text())))
    print(PAGE.relative_to(ROOT))
    return 0


def measure() -> dict[str, Any]:
    torch.set_num_threads(1)
    model, sets = load("digits"), SmallSets(PER_CLASS)
    assert model.denoiser is not None
    whole, parts = flops(model.denoiser)  # before it is prepared for inference
    sampled(model, [0] * 16, SampleSettings(steps=2, guidance_scale=1.0))  # prepares the model
    rows = []
    for sampler, steps in RUNS:
        plain = SampleSettings(sampler=sampler, steps=steps, guidance_scale=1.0)
        exact, least = torch.empty(0), 0.0
        for options in settings_of(model.denoiser.branches, steps):
            settings = replace(plain, **options)
            images, seconds = sampled(model, sets.labels, settings)
            if not options:
                exact, least = images, seconds
            score, full = sets.score(images), full_rows(settings.caching, steps)
            spent = (full * whole + (steps - full) * parts[settings.cache_branch]) / (steps * whole)
            rows.append(
                {
                    "sampler": sampler,
                    "steps": steps,
                    "options": options,
                    "full": full,
                    "flops": spent,
                    "seconds": seconds / least,
                    "distance": (images - exact).square().mean().sqrt().item(),
                    "accuracy": score.accuracy,
                    "frechet": score.frechet,
                }
            )
            print(rows[-1], flush=True)
    source = measured_by("python -m benchmarks.caching")
    facts = {"weights": model.weights_hash, "images": len(sets.labels)}
    return {**source, **facts, "parts": [part / whole for part in parts], "rows": rows}


def sampled(model: Model, labels: list[int], settings: SampleSettings) -> tuple[Tensor, float]:
    """Images of the seeds from 0, and the CPU seconds that sampling took, without decoding."""
    clock = Clock()
    jobs = [
        ClassJob(label=label, seed=seed, settings=settings) for seed, label in enumerate(labels)
    ]
    images = [result.image for result in generate(model, jobs, clock=clock)]
    return torch.stack(images), clock.seconds["sample"]


class Clock:
    """CPU seconds of this process per stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._stage, self._begin = "", 0.0

    def __call__(self, stage: str) -> Clock:
        self._stage = stage
        return self

    def __enter__(self) -> None:
        self._begin = time.process_time()

    def __exit__(self, *_: object) -> None:
        spent = time.process_time() - self._begin
        self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + spent


def full_rows(cache: CacheConfig | None, steps: int) -> int:
    """Number of full evaluations, for a sampler with one per step."""
    return steps if cache is None else sum(cache.full([False] * steps))


@torch.no_grad()
def flops(network: Network) -> tuple[int, list[int]]:
    """FLOPs of convolutions and linear layers of a full evaluation of one row, and of a shallow
    one per branch."""
    x = torch.zeros(1, network.config.in_channels, SIDE, SIDE)
    emb = network.embed(torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    shapes = [network.deep_shape(branch, (SIDE, SIDE)) for branch in range(network.branches)]

    def counted(*deep: Any) -> int:
        with backend("reference"), FlopCounterMode(display=False) as counter:
            network.shallow(x, emb, None, *deep) if deep else network.body(x, emb)
        return counter.get_total_flops()

    return counted(), [counted(b, torch.zeros(1, *shape)) for b, shape in enumerate(shapes)]


def page(record: dict[str, Any]) -> str:
    """docs/caching.md."""
    lines = []
    for row in record["rows"]:
        options = ", ".join(f"`{name}={value}`" for name, value in row["options"].items())
        lines.append(
            f"| {row['sampler']}, {row['steps']} | {options or 'none'} | {row['full']} | "
            f"{row['flops']:.0%} | {row['seconds']:.0%} | {row['distance']:.3f} | "
            f"{row['accuracy']:.1%} | {row['frechet']:.2f} |"
        )
    table = "\n".join(lines)
    parts = ", ".join(f"{part:.0%}" for part in record["parts"])
    return f"""# Caching between steps, measured

Generated by `{record["command"]}`, commit {record["commit"]}, {record["date"]}, weights
`{record["weights"][:12]}`. The shipped model with classes, unguided, {record["images"]} images
of the same seeds in every line, one thread. Full: evaluations of the whole network per image. FLOPs
and time: those of sampling, without decoding, relative to no cache. Distance: root mean square
between the images and those without a cache, whose values lie in [-1, 1]. Accuracy and Fréchet
distance are as in [Quality against evaluations](quality.md); at this size an accuracy of 97% has a
standard error of 2 points.

| sampler, steps | cache | full | FLOPs | CPU time | distance | accuracy | Fréchet distance |
|---|---|---:|---:|---:|---:|---:|---:|
{table}

An evaluation with reused features takes this part of the FLOPs of convolutions and matrix products
(without attention's) of a full one, from branch 0 on: {parts}.
"""


if __name__ == "__main__":
    sys.exit(main())
