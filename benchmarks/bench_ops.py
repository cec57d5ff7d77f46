"""Every op of the networks at its largest call in each job, against what people write instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.harness import compare
from fastdiff.bench import shapes
from fastdiff.bench.providers import Make
from fastdiff.bench.subjects import SUBJECTS

CPU = Make(torch.float32, torch.device("cpu"))
CASES = [
    pytest.param(op, job, provider, id=f"{op}-{job}-{provider}")
    for op, subject in SUBJECTS.items()
    for job in shapes.jobs_with(op)
    for provider in subject.cpu_providers
]


@pytest.mark.parametrize(("op", "job", "provider"), CASES)
def test_op(benchmark: Any, op: str, job: str, provider: str) -> None:
    subject, call = SUBJECTS[op], shapes.JOBS[job].largest(op)
    args, kwargs = subject.arguments(call, shapes.JOBS[job], CPU)
    compare(
        benchmark,
        provider,
        subject.functions,
        args,
        kwargs,
        name=op,
        job=job,
        shape=str(call.tensors[0]),
        work=subject.work(call, shapes.JOBS[job], CPU.dtype),
    )
