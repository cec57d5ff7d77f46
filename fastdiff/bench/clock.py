"""Measure how long a function takes, with device events on GPUs and the clock on the CPU.

A timing names the method it was made with:

    events   one call between two events, after the GPU's cache has been overwritten. Calls are
             queued in advance, so that the host's launch times do not count
    graph    `CALLS` calls (one if it is long) in a CUDA graph, replayed between two events, for
             work that is shorter than its launches. The operands stay in the cache, as they would
             in a network with tensors that small
    host     the host's clock, until the device has finished: around one call on a CPU, around
             `CALLS` on a GPU. Launches and waiting for the device count
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

Method = Literal["events", "graph", "host"]
ROUNDS = 50
"""Most timed rounds."""
CALLS = 20
LONG_S = 2e-3
"""From this duration on, a graph has one call."""
HEAD_START = 500_000
"""Clock cycles (a quarter of a millisecond) that the GPU waits while the host queues a call."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds per call over the rounds."""

    method: Method
    rounds: int
    q1_s: float
    median_s: float
    q3_s: float

    @classmethod
    def of(cls, method: Method, seconds: Sequence[float]) -> Timing:
        q1, median, q3 = (
            statistics.quantiles(seconds, n=4, method="inclusive")
            if len(seconds) > 1
            else [seconds[0]] * 3
        )
        return cls(method=method, rounds=len(seconds), q1_s=q1, median_s=median, q3_s=q3)


class Timer(Protocol):
    """Times a function within a budget; a device without events always uses the method "host"."""

    def __call__(
        self, function: Callable[[], Any], *, method: Method = "events", budget_s: float = 0.2
    ) -> Timing: ...


class HostTimer:
    """Times with the host's clock, for a CPU."""

    def __init__(self, rounds: int = ROUNDS) -> None:
        self.rounds = rounds

    def __call__(
        self, function: Callable[[], Any], *, method: Method = "events", budget_s: float = 0.2
    ) -> Timing:
        def timed() -> float:
            start = time.perf_counter()
            function()
            return time.perf_counter() - start

        rounds = min(self.rounds, _rounds(timed(), budget_s))
        return Timing.of("host", [timed() for _ in range(rounds)])


class GpuTimer:
    """Times with events on one GPU. Allocates a buffer four times the size of its L2 cache."""

    def __init__(self, device: torch.device | str = "cuda") -> None:
        self.device = torch.device(device)
        properties = torch.cuda.get_device_properties(self.device)
        cache = max(64 * 2**20, getattr(properties, "L2_cache_size", 0))
        self.flush = torch.empty(4 * cache, dtype=torch.uint8, device=self.device)

    def __call__(
        self, function: Callable[[], Any], *, method: Method = "events", budget_s: float = 0.2
    ) -> Timing:
        with torch.cuda.device(self.device):
            function()  # compiles, allocates, loads
            if method == "events":
                rounds = _rounds(self._between(function), budget_s)
                return Timing.of("events", self._cold(function, rounds))
            calls = CALLS if self._between(function) < LONG_S else 1
            repeated = _repeated(function, calls)
            run = self._captured(function, repeated) if method == "graph" else repeated
            between = self._between if method == "graph" else self._waiting
            run()
            rounds = _rounds(between(run), budget_s)
            return Timing.of(method, [between(run) / calls for _ in range(rounds)])

    def _cold(self, function: Callable[[], Any], rounds: int) -> list[float]:
        pairs = [(_event(), _event()) for _ in range(rounds)]
        for start, end in pairs:
            self.flush.zero_()
            torch.cuda._sleep(HEAD_START)
            start.record()
            function()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]

    def _captured(
        self, function: Callable[[], Any], repeated: Callable[[], Any]
    ) -> Callable[[], Any]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # a capture needs a warm-up on a side stream
            function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            repeated()
        return graph.replay

    def _between(self, function: Callable[[], Any]) -> float:
        start, end = _event(), _event()
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def _waiting(self, function: Callable[[], Any]) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        return time.perf_counter() - start


def _repeated(function: Callable[[], Any], calls: int) -> Callable[[], Any]:
    def run() -> None:
        for _ in range(calls):
            function()

    return run


def _rounds(taken: float, budget_s: float) -> int:
    return min(ROUNDS, max(2, int(budget_s / max(taken, 1e-9))))


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)


def timer_for(device: torch.device | str) -> Timer:
    """A timer with events for a GPU, with the clock for anything else."""
    return GpuTimer(device) if torch.device(device).type == "cuda" else HostTimer()
