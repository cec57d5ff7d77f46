"""The results of `fastdiff bench`: rows of entries, as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastdiff.bench.turns import LEAST_NOISE, Ratio, Verdict
from fastdiff.files import write_text

FORMAT = "fastdiff bench"
VERSION = 2
TIME, CPU_TIME, DEVICE_TIME = "time", "CPU time", "device time"
"""Clocks of `Repeated`: on the wall, of all threads of the process, between a GPU's events."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One provider in one row; without `median_s` it did not run, and `note` says why."""

    provider: str
    q1_s: float | None = None
    median_s: float | None = None
    q3_s: float | None = None
    rounds: int = 0
    ratio: Ratio | None = None
    """How many times as fast it is as the row's best baseline; None for the baselines."""
    verdict: Verdict | None = None
    error: float | None = None
    """Largest error against fp64, as a multiple of eager PyTorch's own error."""
    share: float | None = None
    """Of the row's limit: 1 is as fast as the limit allows."""
    first_s: float | None = None
    """The first call, compilation included."""
    saves: float | None = None
    """The share of a whole evaluation that is saved if this takes the place of ours (estimated)."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One call, or one network, by all providers in turns."""

    kind: str
    """"op", "backward", "step", "decode", "image" or "job"."""
    name: str
    """The op or the preset."""
    job: str
    """The network that makes the call, or ""."""
    shape: str
    dtype: str
    method: str
    """How it was timed: `fastdiff.bench.clock`."""
    calls: int = 1
    """How often one evaluation of the network makes this call."""
    images: int = 0
    """Images that one call makes, if it makes any."""
    bytes: int = 0
    flops: int = 0
    baseline: str = ""
    """The fastest entry that is not ours: what ratios refer to."""
    limit: str = ""
    """The entry that is the limit: a copy of the same bytes, a product of the same FLOPs, or the
    sampling of a job."""
    noise: float = LEAST_NOISE
    """The share by which the baseline differed from itself, in turns (A/A)."""
    entries: tuple[Entry, ...] = ()

    @property
    def key(self) -> tuple[str, ...]:
        return self.kind, self.name, self.job, self.shape, self.dtype

    def __getitem__(self, provider: str) -> Entry:
        for entry in self.entries:
            if entry.provider == provider:
                return entry
        raise KeyError(provider)

    @property
    def ours(self) -> list[Entry]:
        """The entries with a ratio, the fastest first."""
        return sorted(
            (e for e in self.entries if e.ratio is not None), key=lambda entry: entry.median_s or 0
        )

    def __str__(self) -> str:
        return " ".join(part for part in (self.name, self.job, self.shape) if part)


@dataclass(frozen=True, kw_only=True)
class Repeated:
    """One provider of one row in several fresh processes, by one clock; a number per process."""

    key: tuple[str, ...]
    """`Row.key`."""
    row: str
    provider: str
    clock: str
    """`TIME`, `CPU_TIME` or `DEVICE_TIME`."""
    speed: tuple[float, ...]
    """log(seconds of eager PyTorch / seconds of the provider), the median over the rounds."""
    eager: tuple[float, ...]
    """log(seconds of eager PyTorch), the median over the rounds."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """All rows of one run, and what they depend on."""

    environment: dict[str, Any]
    rows: tuple[Row, ...] = ()
    clocks: dict[str, Any] = field(default_factory=dict)
    """A GPU's clocks, power and what held them back while timing (`fastdiff.bench.clocks`)."""
    left_out: tuple[str, ...] = ()
    """Rows for which there was no time."""
    repeats: tuple[Repeated, ...] = ()
    """The rows in fresh processes, so that the run can be compared with another."""

    @property
    def refused(self) -> list[str]:
        """Entries that were refused, as lines."""
        return [
            f"{row}: {entry.provider} {entry.note}"
            for row in self.rows
            for entry in row.entries
            if entry.note.startswith("refused")
        ]


def save(run: Run, path: Path) -> None:
    """Write a run as JSON."""
    write_text(path, json.dumps({"format": FORMAT, "version": VERSION, **asdict(run)}, indent=1))


def load(path: Path) -> Run:
    """Read a run that `save` has written.

    Raises:
        ValueError: the file is something else, or of another version.
    """
    import cattrs

    try:
        content = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); pass a file that --json wrote") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not a result of fastdiff bench; pass a file that --json wrote")
    if content["version"] != VERSION:
        raise ValueError(
            f"{path} has version {content['version']} of the format, expected {VERSION}; "
            "measure again with this version of fastdiff"
        )
    try:
        return cattrs.structure({k: content.get(k) for k in Run.__dataclass_fields__}, Run)
    except Exception as error:
        raise ValueError(f"{path} is damaged ({error!r}); measure again") from error
