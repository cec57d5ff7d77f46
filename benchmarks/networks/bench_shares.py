"""The share of each op in a whole evaluation, which bounds the gain from a faster op (Amdahl).

Each network of shapes.JOBS is evaluated on the reference backend, with a clock around every op.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import SHARES, measure
from fastdiff import kernels
from fastdiff.bench import shapes
from fastdiff.bench.record import Share
from fastdiff.kernels import Work


@pytest.mark.parametrize("job", shapes.JOBS)
def test_share_of_each_op(benchmark: Any, job: str) -> None:
    module, inputs = shapes.JOBS[job].build("cpu")
    seconds: list[Counter[str]] = []
    totals: list[float] = []

    def clocked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            seconds[-1][name] += time.perf_counter() - start  # type: ignore[assignment]
            return result

        return run

    def evaluate() -> None:
        seconds.append(Counter())
        start = time.perf_counter()
        module(**inputs)
        totals.append(time.perf_counter() - start)

    weights = sum(p.nbytes for p in module.parameters())
    work = Work(bytes=weights, flops=flops(job))
    with torch.inference_mode(), kernels.backend("reference"), shapes.wrapped(clocked):
        record = measure(
            benchmark,
            evaluate,
            name="network",
            job=job,
            shape=str(tuple(inputs["x"].shape)),
            provider="reference",
            work=work,
        )
    calls: Counter[str] = Counter()
    for call, count in shapes.JOBS[job].collect().items():
        calls[call.op] += count
    for op in sorted(calls):
        share = median(s[op] / t for s, t in zip(seconds, totals, strict=True))
        SHARES.append(
            Share(
                job=job,
                op=op,
                calls=calls[op],
                seconds=share * record.median_s,
                total_s=record.median_s,
            )
        )
    assert sum(s.share for s in SHARES if s.job == job) < 1


def flops(job: str) -> int:
    """FLOPs of one evaluation, 2 per multiply-add, counted on the meta device."""
    module, inputs = shapes.JOBS[job].build("meta")
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(**inputs)
    return counter.get_total_flops()
