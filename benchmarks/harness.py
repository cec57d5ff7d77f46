"""What one benchmark declares and the record it leaves.

A benchmark names its op, the shape (from shapes.py), the provider, and the bytes and FLOPs that
have to move, whatever the provider moves in fact. `measure` times it with pytest-benchmark and adds
the bandwidth that the declared bytes make. With ``--save-records`` the run leaves
``benchmarks/results/<device>/<commit>.json``; a plain run leaves the tree as it was.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import fastdiff

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

    @property
    def gigabytes_per_second(self) -> float:
        return self.bytes / self.median_s / 1e9


RECORDS: list[Record] = []
"""The records of this run, in the order of the benchmarks."""


def measure(
    benchmark: Any,
    function: Callable[[], Any],
    *,
    name: str,
    shape: str,
    provider: str,
    work: Work,
    dtype: torch.dtype = torch.float32,
    rounds: int = 7,
) -> Record:
    """Time ``function()`` after one warm-up call and keep the record.

    Args:
        benchmark: the fixture of pytest-benchmark.
        name: the op or job; shape: its row in shapes.py; provider: who does the work.
        work: the declared bytes and FLOPs.
        rounds: timed calls.
    """

    def timed() -> None:
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    benchmark.group = f"{name} {shape}"
    benchmark.pedantic(timed, rounds=rounds, iterations=1, warmup_rounds=1)
    stats = benchmark.stats.stats
    record = Record(
        benchmark=name,
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
    benchmark.extra_info["declared_bytes"] = work.bytes
    benchmark.extra_info["GB/s"] = round(record.gigabytes_per_second, 3)
    RECORDS.append(record)
    return record


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
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastdiff": fastdiff.__version__,
    }


def save_records(records: list[Record], results: Path = RESULTS) -> Path:
    """Write the records of one run as ``results/<device>/<commit>.json`` and return the path."""
    facts = environment()
    folder = results / re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{facts['commit'][:12]}.json"
    content = {"environment": facts, "records": [asdict(record) for record in records]}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path
