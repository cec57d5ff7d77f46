"""Time the benchmarks of this folder with pytest-benchmark.

`compare` times one provider of several:

    reference   the op through `fastdiff.kernels`
    eager       what people write with PyTorch today
    compile     the same through `torch.compile`
    library     the best library kernel, if there is one
    copy        the limit of a memory-bound op: a copy that moves the same bytes
    sgemm       the limit of a compute-bound op: a square product with the same FLOPs

On a GPU there are more providers and methods: fastdiff/bench/run.py.

With ``--save-records`` the run writes ``benchmarks/results/<device>/<commit>.json``, from which
fastdiff/bench/report.py generates docs/performance.md; otherwise it changes no files.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff import kernels
from fastdiff.bench.providers import compiled_for
from fastdiff.bench.record import LIMITS, Peak, Record, Share
from fastdiff.bench.run import copied
from fastdiff.kernels import Work

PROVIDERS = ("reference", "eager", "compile", "library", "copy", "sgemm", "auto")
BUDGET_S = 1.0
"""Time limit for all timed rounds of one benchmark together."""
RECORDS: list[Record] = []
SHARES: list[Share] = []
PEAKS: list[Peak] = []
"""The measurements of this run, in the order of the benchmarks."""


def measure(
    benchmark: Any,
    function: Callable[[], Any],
    *,
    name: str,
    shape: str,
    provider: str,
    work: Work,
    job: str = "",
    dtype: torch.dtype = torch.float32,
    rounds: int | None = None,
) -> Record:
    """Time ``function()`` after a warm-up call (two if it takes less than a second).

    Args:
        benchmark: the fixture of pytest-benchmark.
        name: the op or the task; shape: its row in shapes.py; provider: what does the work.
        work: the declared bytes and FLOPs.
        job: the name of its job in shapes.JOBS.
        rounds: timed calls; None: as many as fit into `BUDGET_S`, from 2 to 50.
    """

    def timed() -> None:
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    for _ in range(2):
        start = time.perf_counter()
        timed()
        taken = time.perf_counter() - start
        if taken > BUDGET_S:
            break
    if rounds is None:
        rounds = min(50, max(2, int(BUDGET_S / taken)))
    benchmark.group = f"{name} {job} {shape}"
    benchmark.pedantic(timed, rounds=rounds, iterations=1)
    stats = benchmark.stats.stats
    record = Record(
        benchmark=name,
        job=job,
        shape=shape,
        provider=provider,
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        rounds=rounds,
        q1_s=stats.q1,
        median_s=stats.median,
        q3_s=stats.q3,
        bytes=work.bytes,
        flops=work.flops,
    )
    benchmark.extra_info["GB/s"] = round(record.bytes_per_second / 1e9, 3)
    benchmark.extra_info["GFLOP/s"] = round(record.flops_per_second / 1e9, 3)
    RECORDS.append(record)
    return record


def compare(
    benchmark: Any,
    provider: str,
    functions: dict[str, Callable[..., Any]],
    arguments: tuple[Any, ...],
    keywords: Mapping[str, Any] = MappingProxyType({}),
    *,
    work: Work,
    **options: Any,
) -> Record:
    """`measure` one provider of an op, without gradients and with ops on the reference backend.

    Args:
        functions: provider -> function of the arguments and keywords; "compile" is derived from
            "eager", the limits from the declared work.
        options: name, job, shape and other arguments of `measure`.
    """
    if provider in LIMITS:
        function, arguments, keywords = limit(provider, work), (), {}
    elif provider == "compile":
        function = compiled(functions["eager"], arguments, keywords)
    else:
        function = functions[provider]
    with torch.inference_mode(), kernels.backend("reference"):
        return measure(
            benchmark,
            lambda: function(*arguments, **keywords),
            provider=provider,
            work=work,
            **options,
        )


def compiled(
    function: Callable[..., Any], arguments: tuple[Any, ...], keywords: Mapping[str, Any]
) -> Callable[..., Any]:
    """``torch.compile(function)``, compiled for these shapes; skips the test if that fails."""
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Inductor's own imports use deprecated PyTorch functions
        try:
            return compiled_for(function, arguments, dict(keywords))
        except torch._dynamo.exc.TorchDynamoException as error:
            pytest.skip(f"torch.compile does not work here: {' '.join(str(error).split())[:200]}")


def limit(kind: str, work: Work) -> Callable[[], Tensor]:
    """What the hardware needs at least for the declared work, by definition at 100% of the rate."""
    if kind == "copy":
        source, target = copied(work, torch.device("cpu"))
        return lambda: target.copy_(source)
    side = round((work.flops / 2) ** (1 / 3))
    a, b, out = torch.randn(side, side), torch.randn(side, side), torch.zeros(side, side)
    return lambda: torch.mm(a, b, out=out)
