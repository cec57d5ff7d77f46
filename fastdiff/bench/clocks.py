"""The GPU's clocks and what holds them back, sampled by nvidia-smi while stages run.

A time measured while the GPU was throttled says little about a kernel, so each stage's summary, and
the record, contain what was sampled meanwhile. The GPU's settings are not touched.
"""

from __future__ import annotations

import contextlib
import math
import subprocess
import threading
from collections import Counter
from dataclasses import dataclass
from statistics import median
from types import TracebackType
from typing import Any

EVERY_MS = 250
FIELDS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "clocks_event_reasons.active")
REASONS = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal slowdown by software",
    0x40: "thermal slowdown by hardware",
    0x80: "power brake",
    0x100: "display clocks",
}
"""Bit of the active clock event reasons -> its name (NVML: nvmlClocksEventReason...)."""
THROTTLES = tuple(name for name in REASONS.values() if "slow" in name or "power" in name)
COMMAND = (
    *("nvidia-smi", "--id=0", f"--query-gpu={','.join(FIELDS)}"),
    *("--format=csv,noheader,nounits", f"--loop-ms={EVERY_MS}"),
)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One line of nvidia-smi."""

    sm_mhz: float
    memory_mhz: float
    watts: float
    celsius: float
    reasons: tuple[str, ...]


def parsed(line: str) -> Sample | None:
    """A sample, or None for a line that is none, such as an error message.

    >>> parsed("1980, 3201, 412.5, 51, 0x0000000000000004").reasons
    ('power cap',)
    """
    cells = [cell.strip() for cell in line.split(",")]
    try:  # a driver may not report all of them
        numbers = [math.nan if "N/A" in cell else float(cell) for cell in cells[:-1]]
        sm, memory, watts, celsius = numbers
        bits = 0 if "N/A" in cells[-1] else int(cells[-1], 16)
    except ValueError:
        return None
    reasons = tuple(name for bit, name in REASONS.items() if bits & bit)
    reasons = ("not reported",) if "N/A" in cells[-1] else reasons
    return Sample(sm_mhz=sm, memory_mhz=memory, watts=watts, celsius=celsius, reasons=reasons)


def summary(samples: list[Sample], refused: str = "") -> dict[str, Any]:
    """What was sampled while a stage ran.

    Clocks are those of samples in which the GPU was not idle. `throttled` counts the samples with
    each reason that slows a GPU down.
    """
    if not samples:
        return {"samples": 0, "why": refused or "nvidia-smi gave none"}
    busy = [sample for sample in samples if "idle" not in sample.reasons]
    seen = Counter(reason for sample in samples for reason in sample.reasons)
    found: dict[str, Any] = {
        "samples": len(samples),
        "busy": len(busy),
        "reasons": dict(seen),
        "throttled": {name: seen[name] for name in THROTTLES if name in seen},
        "most_celsius": max(sample.celsius for sample in samples),
        "most_watts": max(sample.watts for sample in samples),
    }
    if busy:
        clocks = [sample.sm_mhz for sample in busy]
        found["sm_mhz"] = {"least": min(clocks), "median": median(clocks), "most": max(clocks)}
        found["memory_mhz"] = median(sample.memory_mhz for sample in busy)
    return found


class Clocks:
    """Samples from `begin` to `end`, any number of times inside its ``with`` block."""

    def __init__(self, *, dry_run: bool = False, command: tuple[str, ...] = COMMAND) -> None:
        self._command, self._dry_run = command, dry_run
        self._samples: list[Sample] = []
        self._refused = "a dry run" if dry_run else ""
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Clocks:
        if self._dry_run:
            return self
        try:
            self._process = subprocess.Popen(
                self._command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        except OSError as error:
            self._refused = f"nvidia-smi does not run: {error.strerror}"
            return self
        self._thread = threading.Thread(target=self._read, args=(self._process,), daemon=True)
        self._thread.start()
        return self

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                sample = parsed(line)
                with self._lock:
                    if sample is not None:
                        self._samples.append(sample)
                    elif line.strip():
                        self._refused = f"nvidia-smi: {line.strip()[:200]}"

    def begin(self) -> None:
        """Forget the samples so far."""
        with self._lock:
            self._samples.clear()

    def end(self) -> dict[str, Any]:
        """The `summary` of the samples since `begin`."""
        with self._lock:
            return summary(list(self._samples), self._refused)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
            self._thread.join(5)
