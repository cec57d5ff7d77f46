"""What one benchmark declares and the record it leaves.

A benchmark names its op, the shape (from shapes.py), the provider, and the bytes and FLOPs that
have to move, whatever the provider moves in fact. `measure` times it with pytest-benchmark.
`compare` does so for one provider of several:

    reference   the op through `fastdiff.kernels`
    eager       what people write with PyTorch today
    compile     the same through `torch.compile`
    library     the best ready-made kernel, where there is one
    copy        the limit of an op that memory bounds: a copy that moves the same bytes
    sgemm       the limit of an op that arithmetic bounds: a square product of the same FLOPs

A GPU has more providers and methods: gpu.py.

With ``--save-records`` the run leaves ``benchmarks/results/<device>/<commit>.json``, from which
report.py makes docs/performance.md; a plain run leaves the tree as it was.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff import kernels

LIMITS = ("copy", "sgemm", "matmul")
END_TO_END = "end to end"
"""Records of whole networks beside others' (bench_cpu_networks.py)."""
IN_TURNS = "in turns"
"""Records of ops beside eager PyTorch (bench_cpu_ops.py)."""
PROVIDERS = ("reference", "eager", "compile", "library", "copy", "sgemm", "auto")
BUDGET_S = 1.0
"""How long the timed rounds of one benchmark may take together."""
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class Work:
    """What has to be done, declared beside the benchmark and not measured."""

    bytes: int
    """Bytes that must be read and written once."""
    flops: int = 0
    """Floating-point operations, 2 per multiply-add; 0 where the bytes decide."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One timing: seconds are per call; quartiles and median over the rounds."""

    benchmark: str
    job: str
    """The job in shapes.JOBS that this call is part of, or ""."""
    shape: str
    provider: str
    dtype: str
    threads: int
    rounds: int
    q1_s: float
    median_s: float
    q3_s: float
    bytes: int
    flops: int
    method: str = "host"
    """How it was timed, in the words of fastdiff/timing.py."""
    shape_class: str = ""
    """In the words of kernels/measured.py; "" where no winner depends on it."""

    @property
    def bytes_per_second(self) -> float:
        return self.bytes / self.median_s

    @property
    def flops_per_second(self) -> float:
        return self.flops / self.median_s

    def share_of(self, limit: Record) -> float:
        """The rate as a share of the limit's: in bytes of a copy's, in FLOPs of a product's."""
        if limit.provider != "copy":
            return self.flops_per_second / limit.flops_per_second
        return self.bytes_per_second / limit.bytes_per_second


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one op takes of a job."""

    job: str
    op: str
    calls: int
    seconds: float
    """In all calls of one evaluation."""
    total_s: float
    """The whole evaluation."""
    backend: str = "reference"

    @property
    def share(self) -> float:
        return self.seconds / self.total_s


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The most memory that a fresh process, doing nothing but one job, had resident."""

    benchmark: str
    shape: str
    threads: int
    bytes: int


def amdahl(share: float, ratio: float) -> float:
    """How much faster the job is when a `share` of it becomes `ratio` times as fast."""
    return 1 / (1 - share + share / ratio)


def duration(seconds: float) -> str:
    """Three digits and a unit: 0.001234 -> 1.23 ms."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 0.9995 or unit == "µs":
            value = seconds * factor
            return (
                f"{value:#.3g}".rstrip(".") + f" {unit}" if value < 999.5 else f"{value:.0f} {unit}"
            )
    raise AssertionError(seconds)


RECORDS: list[Record] = []
SHARES: list[Share] = []
PEAKS: list[Peak] = []
"""What this run measured, in the order of the benchmarks."""


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
    """Time ``function()`` after a warm-up call (two where it takes less than a second).

    Args:
        benchmark: the fixture of pytest-benchmark.
        name: the op or what is done; shape: its row in shapes.py; provider: who does the work.
        work: the declared bytes and FLOPs.
        job: the name in shapes.JOBS that it is a part of.
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
    *,
    work: Work,
    **options: Any,
) -> Record:
    """`measure` one provider of an op, without gradients, the op on its reference backend.

    Args:
        functions: provider -> function of the arguments; "compile" is made of "eager", the limits
            of the declared work.
        options: name, job, shape and what else `measure` takes.
    """
    if provider in LIMITS:
        function, arguments = limit(provider, work), ()
    elif provider == "compile":
        function = compiled(functions["eager"], arguments)
    else:
        function = functions[provider]
    with torch.inference_mode(), kernels.backend("reference"):
        return measure(
            benchmark, lambda: function(*arguments), provider=provider, work=work, **options
        )


def compiled(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Callable[..., Any]:
    """``torch.compile(function)``, compiled for these shapes; skips where it cannot compile."""
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Inductor's own imports use what PyTorch deprecates
        try:
            return compiled_for(function, arguments, {})
        except torch._dynamo.exc.TorchDynamoException as error:
            pytest.skip(f"torch.compile does not work here: {' '.join(str(error).split())[:200]}")


def compiled_for(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    backend: str = "inductor",
) -> Callable[..., Any]:
    """``torch.compile(function)``, compiled for these arguments."""
    torch.compiler.reset()
    result = torch.compile(function, dynamic=False, fullgraph=True, backend=backend)
    result(*args, **kwargs)
    return result


def limit(kind: str, work: Work) -> Callable[[], Tensor]:
    """What the hardware needs for the declared work; its own rate is the 100%."""
    if kind == "copy":
        source = torch.ones(max(1, work.bytes // 2), dtype=torch.uint8)
        target = torch.zeros_like(source)
        return lambda: target.copy_(source)
    side = round((work.flops / 2) ** (1 / 3))
    a, b, out = torch.randn(side, side), torch.randn(side, side), torch.zeros(side, side)
    return lambda: torch.mm(a, b, out=out)


def channels_last(*shape: int) -> Tensor:
    """Standard normal numbers in the layout of `runtime.prepare`."""
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def device_name() -> str:
    """The device as people call it: the GPU's name, else the CPU's model."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def git(*arguments: str) -> str:
    """What git says about this checkout, "unknown" outside one."""
    command = ["git", "-C", str(RESULTS.parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def environment() -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "commit": git("rev-parse", "HEAD"),
        "clean": git("status", "--porcelain", "--untracked-files=no") == "",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastdiff": fastdiff.__version__,
    }


def save_records(
    records: Sequence[Record] = (),
    shares: Sequence[Share] = (),
    peaks: Sequence[Peak] = (),
    *,
    results: Path = RESULTS,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write what one run measured as ``results/<device>/<commit>.json`` and return the path.

    Args:
        results: the folder of all devices.
        extra: more facts for the record's environment.

    Another run of the same commit on the same device adds to the file: what was measured again
    replaces what it was, and the file is clean only if all its runs were.
    """
    facts = {**environment(), **(extra or {})}
    folder = results / re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{facts['commit'][:12]}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    if known:
        facts["clean"] = facts["clean"] and known["environment"]["clean"]
    content = {
        "environment": facts,
        "shares": _merged(known.get("shares", []), shares, ("job", "op", "backend")),
        "peaks": _merged(known.get("peaks", []), peaks, ("benchmark", "shape")),
        "records": _merged(
            known.get("records", []), records, ("benchmark", "job", "shape", "dtype", "provider")
        ),
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def _merged(
    known: list[dict[str, Any]], new: Sequence[Record | Share | Peak], key: tuple[str, ...]
) -> list[dict[str, Any]]:
    rows = [*known, *map(asdict, new)]
    return list({tuple(row.get(name) for name in key): row for row in rows}.values())
