"""Records of measurements: which provider did what in which time, and the environment.

A run is saved as ``benchmarks/results/<device>/<commit>.json``, from which report.py makes
docs/performance.md.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch

import fastdiff
from fastdiff.files import write_text

LIMITS = ("copy", "sgemm", "matmul")
END_TO_END = "end to end"
"""Records of whole networks against those of others (benchmarks/networks/bench_cpu_networks.py)."""
IN_TURNS = "in turns"
"""Records of ops against eager PyTorch (benchmarks/bench_cpu_ops.py)."""
NETWORK, LAUNCHED = "network", "network, launched"
"""Records of whole evaluations on a GPU: as one graph, and launched op by op."""
LOOP, LOOP_LAUNCHED = "20 steps", "20 steps, launched"
"""Records of a sampling loop on a GPU: each step as one replay, and launched op by op."""
ROOT = Path(__file__).resolve().parents[2]
"""The checkout or, if the package is installed, the folder that contains it."""
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True, kw_only=True)
class Record:
    """One timing: seconds are per call; quartiles and median over the rounds."""

    benchmark: str
    job: str
    """The job of shapes.JOBS that this call belongs to, or ""."""
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
    """How it was timed, one of `fastdiff.bench.clock.Timed`."""
    shape_class: str = ""
    """A class of kernels/tuning/measured.py; "" if it does not determine a winner."""

    @property
    def bytes_per_second(self) -> float:
        return self.bytes / self.median_s

    @property
    def flops_per_second(self) -> float:
        return self.flops / self.median_s

    def share_of(self, limit: Record) -> float:
        """The rate as a share of the limit's: in bytes for a copy, in FLOPs for a product."""
        if limit.provider != "copy":
            return self.flops_per_second / limit.flops_per_second
        return self.bytes_per_second / limit.bytes_per_second


@dataclass(frozen=True, kw_only=True)
class Share:
    """The share of one op in a job."""

    job: str
    op: str
    calls: int
    seconds: float
    """Over all calls of one evaluation."""
    total_s: float
    """Duration of the whole evaluation."""
    backend: str = "reference"

    @property
    def share(self) -> float:
        return self.seconds / self.total_s


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The peak resident memory of a fresh process that does only one job."""

    benchmark: str
    shape: str
    threads: int
    bytes: int


def amdahl(share: float, ratio: float) -> float:
    """The speedup of a job if a `share` of it becomes `ratio` times as fast (Amdahl's law)."""
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


def device_name() -> str:
    """The common name of the device: of the GPU, else of the CPU model."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def git(*arguments: str) -> str:
    """The output of git for this checkout, "unknown" outside of one."""
    if not (ROOT / ".git").exists():
        return "unknown"  # an installed package, which may lie inside another checkout
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def quartiles_of(seconds: Sequence[float]) -> dict[str, Any]:
    """Quartiles by the field names of `Record`."""
    q1, median, q3 = quantiles(seconds, n=4, method="inclusive")
    return {"q1_s": q1, "median_s": median, "q3_s": q3}


def environment() -> dict[str, Any]:
    """The facts that the numbers depend on."""
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
    """Write the measurements of one run to ``results/<device>/<commit>.json``; return the path.

    Args:
        results: the folder of all devices.
        extra: additional facts for the record's environment.

    Another run of the same commit on the same device adds to the file: new measurements of the same
    case replace the old ones, and the file counts as clean only if all runs were.
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
    write_text(path, json.dumps(content, indent=1) + "\n")
    return path


def _merged(
    known: list[dict[str, Any]], new: Sequence[Record | Share | Peak], key: tuple[str, ...]
) -> list[dict[str, Any]]:
    rows = [*known, *map(asdict, new)]
    return list({tuple(row.get(name) for name in key): row for row in rows}.values())
