"""The timers for the host and for a GPU; the latter is also tested on a fake GPU."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastdiff.bench.clock import CALLS, GpuTimer, HostTimer, Method, Timing, timer_for


def test_the_hosts_clock() -> None:
    ran = []
    timing = HostTimer(rounds=3)(lambda: ran.append(1), method="events", budget_s=10)
    assert (timing.method, timing.rounds, len(ran)) == ("host", 3, 4)
    assert 0 <= timing.q1_s <= timing.median_s <= timing.q3_s
    assert isinstance(timer_for("cpu"), HostTimer)


def test_quartiles() -> None:
    assert Timing.of("graph", [1.0, 2.0, 3.0, 4.0, 5.0]) == Timing(
        method="graph", rounds=5, q1_s=2.0, median_s=3.0, q3_s=4.0
    )
    assert Timing.of("graph", [7.0]).q1_s == 7.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["events", "graph", "host"])
def test_a_gpus_clock(method: Method) -> None:
    x = torch.ones(2**26, device="cuda")
    timing = GpuTimer()(lambda: x.mul_(1.0), method=method)
    assert timing.method == method
    assert 2 * x.nbytes / 20e12 < timing.median_s < 1e-2  # no memory moves 20 TB/s


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cold_cache_is_slower_and_a_graph_hides_launches() -> None:
    x = torch.ones(2**22, device="cuda")  # 16 MB, which fit in the cache
    timer = GpuTimer()
    cold, warm = (timer(lambda: x.mul_(1.0), method=m) for m in ("events", "graph"))
    assert warm.median_s < cold.median_s


class MadeUpGpu:
    """The parts of torch.cuda that GpuTimer uses, with a clock that each call advances by 1 ms."""

    def __init__(self) -> None:
        self.now_ms = 0.0
        self.calls = 0
        self.log: list[str] = []
        self.late: list[bool] = []
        """Whether the GPU passes the next events before their calls are queued; then never."""

    def work(self) -> None:
        self.calls += 1
        self.now_ms += 1.0
        self.log.append("work")

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = gpu.now_ms

            def query(self) -> bool:
                return gpu.late.pop(0) if gpu.late else False

            def elapsed_time(self, end: Any) -> float:
                return end.at - self.at

        class Graph:
            def replay(self) -> None:
                gpu.log.append("replay")
                gpu.now_ms += 1.0 * self.captured

        @contextlib.contextmanager
        def capture(graph: Graph) -> Any:
            before = gpu.calls
            yield
            graph.captured = gpu.calls - before

        stream = SimpleNamespace(wait_stream=lambda other: None)
        for name, value in {
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": capture,
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "stream": lambda _: contextlib.nullcontext(),
            "device": lambda _: contextlib.nullcontext(),
            "synchronize": lambda: None,
            "_sleep": lambda cycles: self.log.append("sleep"),
            "get_device_properties": lambda _: SimpleNamespace(L2_cache_size=2**10),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


def test_the_gpus_clock_goes_by_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = MadeUpGpu()
    gpu.install(monkeypatch)
    timer = GpuTimer("cpu")
    monkeypatch.setattr(timer, "flush", SimpleNamespace(zero_=lambda: gpu.log.append("flush")))
    timing = timer(gpu.work, method="events", budget_s=0.005)
    assert (timing.rounds, timing.median_s) == (5, 1e-3)
    # before each call, the cache is overwritten and the host gets a head start
    assert gpu.log[-15:] == ["flush", "sleep", "work"] * 5

    timing = timer(gpu.work, method="graph", budget_s=0.1)
    assert (timing.rounds, timing.median_s) == (5, pytest.approx(1e-3))
    assert gpu.log[-10:] == ["sleep", "replay"] * 5

    gpu.calls = 0
    timing = timer(gpu.work, method="host", budget_s=1e-9)
    assert timing.rounds == 2
    assert gpu.calls == 2 + 4 * CALLS  # one to warm up, one to choose the size, 4 times `CALLS`


@pytest.mark.parametrize("method", ["events", "graph"])
def test_timings_that_may_include_the_hosts_time_are_marked(
    method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU passes the first event early in 1 or 2 of 5 rounds; quartiles ignore only one."""
    gpu = MadeUpGpu()
    gpu.install(monkeypatch)
    timer = GpuTimer("cpu")
    monkeypatch.setattr(timer, "flush", SimpleNamespace(zero_=lambda: None))
    first = 1 if method == "events" else 2  # calls that choose the number of rounds
    for late, marked in ((1, method), (2, f"{method}+host")):
        gpu.late = [True] * (first + late)
        timing = timer(gpu.work, method=method, budget_s=0.005 if method == "events" else 0.1)
        assert (timing.rounds, timing.method) == (5, marked)
