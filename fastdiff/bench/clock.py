"""Measure how long a function takes, with device events on GPUs and the clock on the CPU.

A timing names the method it was made with:

    events   one call between two events, after the GPU's cache has been overwritten. Calls are
             queued in advance, so that the host's launch times do not count
    graph    `CALLS` calls (one if it is long) in a CUDA graph, replayed between two events, for
             work that is shorter than its launches. The operands stay in the cache, as they would
             in a network with tensors that small
    host     the host's clock, until the device has finished: around one call on a CPU, around
             `CALLS` on a GPU. Launches and waiting for the device count
    events+host, graph+host   between two events as above, but in a quarter of the rounds or more
             the GPU had passed the first event before the host had queued the call, so that launch
             times may count
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

Method = Literal["events", "graph", "host"]
"""How to time."""
Timed = Literal["events", "graph", "host", "events+host", "graph+host"]
"""How a timing came about: its method, and whether the host's time may be in it."""
ROUNDS = 50
"""Most timed rounds."""
CALLS = 20
ROUND_S = 5e-4
"""Seconds that a round on the CPU takes at least: shorter calls are repeated."""
LONG_S = 2e-3
"""For calls that take at least this long, a graph contains one call."""
HEAD_START = 500_000
"""Clock cycles (a quarter of a millisecond) that the GPU waits while the host queues a call."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds per call over the rounds."""

    method: Timed
    rounds: int
    q1_s: float
    median_s: float
    q3_s: float

    @classmethod
    def of(cls, method: Timed, seconds: Sequence[float]) -> Timing:
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


class TurnTimer(Timer, Protocol):
    """A timer that also serves for rounds of several functions in turns (turns.py)."""

    def prepared(
        self, function: Callable[[], Any], *, method: Method = "events", single: bool = False
    ) -> Callable[[], float]:
        """Warm up, and return a function that times one round: its seconds per call.

        single: one call per round, even of a short function; then no two calls of a round have the
        same operands if these change between the rounds. Has no effect on a graph.
        """


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

    def prepared(
        self, function: Callable[[], Any], *, method: Method = "events", single: bool = False
    ) -> Callable[[], float]:
        start = time.perf_counter()
        function()
        calls = max(1, math.ceil(ROUND_S / max(time.perf_counter() - start, 1e-9)))
        calls = 1 if single else calls

        def round_of_calls() -> float:
            start = time.perf_counter()
            for _ in range(calls):
                function()
            return (time.perf_counter() - start) / calls

        if calls > 1:  # the first call was slower than the others will be
            calls = max(calls, math.ceil(ROUND_S / round_of_calls()))
        return round_of_calls


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
                rounds = _rounds(self._between(function)[0], budget_s)
                return _between_events("events", self._cold(function, rounds))
            calls = CALLS if self._between(function)[0] < LONG_S else 1
            repeated = _repeated(function, calls)
            if method == "host":
                repeated()
                rounds = _rounds(self._waiting(repeated), budget_s)
                return Timing.of("host", [self._waiting(repeated) / calls for _ in range(rounds)])
            replay = self._captured(function, repeated)
            replay()
            rounds = _rounds(self._between(replay)[0], budget_s)
            return _between_events("graph", [self._between(replay) for _ in range(rounds)], calls)

    def prepared(
        self, function: Callable[[], Any], *, method: Method = "events", single: bool = False
    ) -> Callable[[], float]:
        with torch.cuda.device(self.device):
            function()
            if method == "events":
                return lambda: self._cold(function, 1)[0][0]
            calls = CALLS if self._between(function)[0] < LONG_S else 1
            calls = 1 if single and method == "host" else calls
            repeated = _repeated(function, calls)
            if method == "host":
                return lambda: self._waiting(repeated) / calls
            replay = self._captured(function, repeated)
            return lambda: self._between(replay)[0] / calls

    def _cold(self, function: Callable[[], Any], rounds: int) -> list[tuple[float, bool]]:
        """The seconds of each round, and whether the host's time may be in them."""
        pairs = [(_event(), _event()) for _ in range(rounds)]
        late = []
        for start, end in pairs:
            self.flush.zero_()
            late.append(_queue(function, start, end))
        torch.cuda.synchronize()
        taken = [start.elapsed_time(end) / 1e3 for start, end in pairs]
        return list(zip(taken, late, strict=True))

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

    def _between(self, function: Callable[[], Any]) -> tuple[float, bool]:
        start, end = _event(), _event()
        late = _queue(function, start, end)
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3, late

    def _waiting(self, function: Callable[[], Any]) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        return time.perf_counter() - start


def _queue(function: Callable[[], Any], start: Any, end: Any) -> bool:
    """Queue a call between two events while the GPU waits. Returns whether the GPU had passed the
    first event before everything was queued."""
    torch.cuda._sleep(HEAD_START)
    start.record()
    function()
    end.record()
    return bool(start.query())


def _between_events(
    method: Literal["events", "graph"], rounds: Sequence[tuple[float, bool]], calls: int = 1
) -> Timing:
    """A timing, marked if the host's time may be in a quarter of its rounds or more."""
    late = sum(was_late for _, was_late in rounds)
    marked: dict[str, Timed] = {"events": "events+host", "graph": "graph+host"}
    timed: Timed = marked[method] if 4 * late >= len(rounds) else method
    return Timing.of(timed, [seconds / calls for seconds, _ in rounds])


def _repeated(function: Callable[[], Any], calls: int) -> Callable[[], Any]:
    def run() -> None:
        for _ in range(calls):
            function()

    return run


def _rounds(taken: float, budget_s: float) -> int:
    return min(ROUNDS, max(2, int(budget_s / max(taken, 1e-9))))


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)


def timer_for(device: torch.device | str) -> TurnTimer:
    """A timer with events for a GPU, with the clock for anything else."""
    return GpuTimer(device) if torch.device(device).type == "cuda" else HostTimer()
