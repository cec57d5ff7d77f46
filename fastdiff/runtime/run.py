"""Run requests of any kind in one call, with one engine per shape class, one after another."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from fastdiff.diffusion.sampling import OnStep, Step
from fastdiff.models.network import Network
from fastdiff.runtime.engine import Engine, Progress, Request, Result, ShapeClass
from fastdiff.runtime.graphs import StepGraphs, graphs_for

REFUSED = -1
"""Ticket in the result of a request that never joined an engine."""
KEPT = 4
"""Maximum number of engines with graphs that are kept for the next call."""


class Engines:
    """Engines of one network. Engines with graphs are kept, to use their graphs in later calls."""

    def __init__(
        self, network: Network, *, graphs: Callable[[Network], StepGraphs | None] = graphs_for
    ) -> None:
        """graphs: creates the graphs of an engine; by default CUDA graphs, and only on a GPU."""
        self._network, self._graphs = network, graphs
        self._kept: dict[tuple[ShapeClass, int, bool], Engine] = {}

    @contextmanager
    def borrowed(
        self, kind: ShapeClass, slots: int, *, log_probs: bool = False
    ) -> Iterator[Engine]:
        """An empty engine for requests of a class; requests that remain at the end are dropped.
        Calls that overlap get separate engines."""
        key = kind, slots, log_probs
        engine = self._kept.pop(key, None)
        if engine is None:
            graphs = self._graphs(self._network) if kind.gradients == "none" else None
            engine = Engine(
                self._network, **kind._asdict(), slots=slots, graphs=graphs, log_probs=log_probs
            )
        try:
            yield engine
        finally:
            engine.clear()
            if engine.graphs is not None:
                self._kept[key] = engine
                if len(self._kept) > KEPT:
                    del self._kept[next(iter(self._kept))]


def run(
    network: Network,
    requests: Iterable[Request],
    *,
    slots: int = 64,
    on_step: OnStep | None = None,
    progress: Progress | None = None,
    check: bool = True,
    engines: Engines | None = None,
    log_probs: bool = False,
) -> Iterator[Result]:
    """Generate samples, yielding each as it finishes.

    Requests are taken from the iterable as slots become free, so it may be long, or create them on
    demand. Requests of one shape class run together. At most `slots` requests of other classes are
    read ahead and wait for their turn; then no more are read until the current class is done.

    Args:
        network: prepared for inference.
        slots: most requests at a time. Bounds memory; does not affect any result on a CPU.
        on_step: called after each step; `Step.samples` are the positions of its requests in
            `requests`, from 0.
        progress: called after each step; its total covers all requests if they are a sequence,
            otherwise those taken so far.
        check: raise ValueError at the first request that the engine refuses, or for which the
            network returns NaN or infinity. If False, its result has an error (`Result.error`), and
            the others continue.
        engines: keeps the engines, and with them their graphs, for the next call.
        log_probs: results contain the log-density of each row's noise (`Result.log_probs`).

    Raises:
        ValueError: see `check` and `Engine.submit`; results yielded before stay valid.
    """
    line, engines = _Line(requests, slots), Engines(network) if engines is None else engines
    places: dict[int, int] = {}  # ticket -> position in `requests`
    engine: Engine
    done = 0  # rows of earlier engines, and rows that failed requests have left undone

    def watch(tickets: Sequence[int], x: Tensor, denoised: Tensor) -> None:
        assert on_step is not None
        samples = [places[ticket] for ticket in tickets]
        on_step(Step(done + engine.rows_taken, line.rows, samples, x, denoised))

    while (kind := line.next_class()) is not None:
        with engines.borrowed(kind, line.at_most(slots), log_probs=log_probs) as engine:
            while True:
                while engine.free and (found := line.take(kind)) is not None:
                    place, request = found
                    try:
                        places[engine.submit(request)] = place
                    except ValueError as error:
                        if check:
                            raise
                        done += len(request.table)
                        yield Result(request, REFUSED, request.x, 0, str(error))
                if not engine.busy:
                    break
                results = engine.step(watch=watch if on_step else None)
                done += sum(len(result.request.table) - result.rows for result in results)
                if progress is not None:
                    progress(done + engine.rows_taken, line.rows)
                for result in results:
                    place = places.pop(result.ticket)
                    if check and result.error is not None:
                        raise ValueError(f"{result.error} (request {place}, counted from 0)")
                    yield result
            done += engine.rows_taken


class _Line:
    """A queue of requests that hands them out by shape class, in order.

    Attributes:
        rows: table rows of all requests if they are a sequence, otherwise of those taken so far.
    """

    def __init__(self, requests: Iterable[Request], ahead: int) -> None:
        """ahead: how many requests of other classes may be read ahead of their turn."""
        self._given = requests if isinstance(requests, Sequence) else None
        self._source = enumerate(requests)
        self._waiting: deque[tuple[int, Request]] = deque()
        self._ahead = ahead
        self.rows = sum(len(request.table) for request in self._given or ())

    def at_most(self, slots: int) -> int:
        """The number of slots, limited to the number of requests if that is known."""
        return slots if self._given is None else min(slots, len(self._given))

    def next_class(self) -> ShapeClass | None:
        """The class of the request that has waited longest; None if there are no more."""
        if not self._waiting and (found := self._next()) is not None:
            self._waiting.append(found)
        return self._waiting[0][1].shape_class if self._waiting else None

    def take(self, kind: ShapeClass) -> tuple[int, Request] | None:
        """The next request of a class, and its position; None if none is within reach."""
        for found in self._waiting:
            if found[1].shape_class == kind:
                self._waiting.remove(found)
                return found
        while len(self._waiting) < self._ahead and (new := self._next()) is not None:
            if new[1].shape_class == kind:
                return new
            self._waiting.append(new)
        return None

    def _next(self) -> tuple[int, Request] | None:
        found = next(self._source, None)
        if found is not None and self._given is None:
            self.rows += len(found[1].table)
        return found
