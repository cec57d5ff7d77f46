"""Every op call of the networks on the CPU: our kernel against eager PyTorch, in turns.

    cpu                   the choice of `auto`: the native kernel, or what measured faster
    eager                 what people write: channels_last, or scaled_dot_product_attention
    cpu, memory kept      the same two in a process that keeps the memory it frees
    eager, memory kept    (cpu_layers.keep_freed_memory): outputs are reused without page faults

Sampler steps are also compared with diffusers' schedulers. The table of goals in
docs/performance.md uses the worst case of each from these records and those of
networks/bench_cpu_networks.py.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pytest
import torch

from benchmarks.harness import RECORDS
from fastdiff.bench import shapes
from fastdiff.bench.ops import sampler_step
from fastdiff.bench.providers import Make, Subject
from fastdiff.bench.record import IN_TURNS, Record, duration, quartiles_of
from fastdiff.bench.shapes import Call, Job
from fastdiff.bench.subjects import SUBJECTS

CASE_S = 0.3
"""Seconds of timed rounds per case."""
LEAST_ROUNDS = 7
KEPT = ", memory kept"
MAKE = Make(torch.float32, torch.device("cpu"))


@dataclass(frozen=True)
class Case:
    """One call of a network."""

    job: str
    of: Job
    subject: Subject
    call: Call

    def providers(self) -> dict[str, Callable[[], Any]]:
        args, kwargs = self.subject.arguments(self.call, self.of, MAKE)
        return {
            "cpu": lambda: self.subject.ours(*args, **kwargs),
            "eager": lambda: self.subject.eager(*args, **kwargs),
        }


def cases(op: str) -> Iterator[Case]:
    """The distinct calls of an op in each network, largest first."""
    for name, job in shapes.JOBS.items():
        for call in sorted(job.collect(), key=lambda call: -call.numbers):
            if call.op == op:
                yield Case(name, job, SUBJECTS[op], call)


def step_cases() -> Iterator[tuple[Case, dict[str, Callable[[], Any]]]]:
    """Sampler steps on Stable Diffusion's latents, with diffusers' schedulers as peers."""
    from fastdiff.bench.providers import import_diffusers

    diffusers = import_diffusers()
    for case in sampler_step.gpu_cases(64, (1, 4, 16)):
        found = Case("", case.job, case.subject, case.call)
        x, prediction, *_ = case.subject.arguments(case.call, case.job, MAKE)[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its schedulers use deprecated numpy functions
            peers = {
                name: sampler_step.stepping(name, diffusers, x, prediction)
                for name in sampler_step.SCHEDULERS
            }
        yield found, {**found.providers(), **peers}


def in_turns(functions: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Seconds of each function, called once per round, after two warm-up rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    with torch.inference_mode():
        for _, function in itertools.product(range(2), functions.values()):
            function()
        end, rounds = time.perf_counter() + CASE_S, 0
        while rounds < LEAST_ROUNDS or time.perf_counter() < end:
            for name, function in functions.items():
                start = time.perf_counter()
                function()
                seconds[name].append(time.perf_counter() - start)
            rounds += 1
    return seconds


def records(case: Case, seconds: dict[str, list[float]], kept: bool = False) -> list[Record]:
    work = case.subject.work(case.call, case.of, MAKE.dtype)
    return [
        Record(
            benchmark=IN_TURNS,
            job=case.job,
            shape=f"{case.call.op} {case.call}",
            provider=provider + (KEPT if kept else ""),
            dtype="float32",
            threads=torch.get_num_threads(),
            rounds=len(times),
            bytes=work.bytes,
            flops=work.flops,
            **quartiles_of(times),
        )
        for provider, times in seconds.items()
    ]


def measure(op: str, kept: bool = False) -> list[Record]:
    """Measure all calls of an op."""
    return [r for case in cases(op) for r in records(case, in_turns(case.providers()), kept)]


def tell(found: list[Record]) -> None:
    """Store the records and print the ratio of each case."""
    RECORDS.extend(found)
    eager = {(r.job, r.shape, r.provider): r.median_s for r in found}
    for r in found:
        if r.provider.startswith("cpu"):
            ratio = eager[r.job, r.shape, r.provider.replace("cpu", "eager")] / r.median_s
            print(f"\n{r.job} {r.shape}: {duration(r.median_s)}, {ratio:.2f} x eager", end="")


@pytest.mark.parametrize("op", SUBJECTS)
def test_op(benchmark: Any, op: str) -> None:
    tell(benchmark.pedantic(measure, args=(op,), rounds=1))


def test_group_norm_silu_memory_kept(benchmark: Any) -> None:
    """In a process of its own, because keeping freed memory cannot be undone."""

    def run() -> list[Record]:
        words = [sys.executable, "-m", "benchmarks.bench_cpu_ops"]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
        return [Record(**record) for record in json.loads(done.stdout.splitlines()[-1])]

    tell(benchmark.pedantic(run, rounds=1))


def test_sampler_step(benchmark: Any) -> None:
    def run() -> list[Record]:
        return [r for case, steps in step_cases() for r in records(case, in_turns(steps))]

    tell(benchmark.pedantic(run, rounds=1))


if __name__ == "__main__":
    from fastdiff.runtime.cpu_layers import keep_freed_memory

    keep_freed_memory()
    print(json.dumps([asdict(record) for record in measure("group_norm_silu", kept=True)]))
