"""An engine's step as a CUDA graph: recorded once per shape, replayed with other requests.

All that differs between two steps of one shape is in tensors that stay where they are: rows of the
sampler tables, places of the embeddings, seeds, projected contexts. A request that joins or leaves
changes them by copies; the graph goes on serving. What is part of the key, and recorded anew when
it changes: the number of network rows, guided or not, rescaled or not, a preview or none, the
backend of the ops, and the addresses of the tensors (a buffer that had to grow has moved).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastdiff.kernels.choose import selected_backend
from fastdiff.runtime.denoiser import Batch

LIMIT = 16
"""Graphs that are kept, the most recently used. They share their memory."""
WARM_UP = 2
"""Runs before recording, in which kernels are compiled, loaded and chosen."""
ROWS = 1024
"""Rows that a buffer of tables or embeddings has room for from the start: growing moves it."""

Replay = Callable[[], object]


class Recorder(Protocol):
    """Makes a graph of a function."""

    def warm_up(self, function: Callable[[], None]) -> None:
        """Run the function as it will be recorded."""

    def record(self, function: Callable[[], None]) -> Replay:
        """Record the function's work without doing it. Returns what does it."""


class CudaRecorder:
    """CUDA graphs on a stream of their own, all in one memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = None

    def warm_up(self, function: Callable[[], None]) -> None:
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            function()
        current.wait_stream(self._stream)

    def record(self, function: Callable[[], None]) -> Replay:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            function()
        self._pool = graph.pool()
        return graph.replay


@dataclass(eq=False)
class _Graph:
    replay: Replay
    addresses: list[int]


class StepGraphs:
    """The recorded steps of one engine.

    Attributes:
        recorded: how often a step was recorded; each takes as long as a few steps.
    """

    def __init__(self, recorder: Recorder, *, limit: int = LIMIT) -> None:
        self._recorder, self._limit = recorder, limit
        self._graphs: dict[Hashable, _Graph] = {}
        self._batches: dict[Hashable, StaticBatch] = {}
        self._weights: list[int] = []
        self.recorded = 0

    def run(
        self,
        key: Hashable,
        function: Callable[[], None],
        *,
        reads: Sequence[Tensor],
        state: Sequence[Tensor],
    ) -> None:
        """Do a function's work, by its graph.

        key: what the function does, with the backend of the moment, apart from the numbers in its
            tensors.
        reads: all tensors that it reads and does not make itself, but for the network's weights
            (`forget_if_moved`).
        state: those that it changes: they get their numbers back after warming up.
        """
        key = key, selected_backend()
        addresses = [tensor.data_ptr() for tensor in reads]
        graph = self._graphs.pop(key, None)
        if graph is None or graph.addresses != addresses:
            graph = None  # frees its memory for the new one
            graph = self._recorded(function, addresses, state)
        self._graphs[key] = graph  # the last one is the most recently used
        if len(self._graphs) > self._limit:
            del self._graphs[next(iter(self._graphs))]
        graph.replay()

    def _recorded(
        self, function: Callable[[], None], addresses: list[int], state: Sequence[Tensor]
    ) -> _Graph:
        before = [tensor.clone() for tensor in state]

        def restore() -> None:
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)

        for _ in range(WARM_UP):
            self._recorder.warm_up(function)
            restore()
        replay = self._recorder.record(function)
        restore()
        self.recorded += 1
        return _Graph(replay, addresses)

    def forget_if_moved(self, network: nn.Module) -> None:
        """Drop all graphs if a weight of the network lies elsewhere since the last call.

        Weights that are copied into (a LoRA that is merged in place) stay where they are.
        """
        weights = [t.data_ptr() for t in (*network.parameters(), *network.buffers())]
        if weights != self._weights:
            self._weights = weights
            self._graphs.clear()

    def static(self, batch: Batch, masked: Tensor, levels: Tensor) -> StaticBatch:
        """Where the graphs of a batch of this shape read it; `load` fills it."""
        key = len(batch.blocks), batch.rows, batch.uncond is None, len(masked)
        kept = self._batches.pop(key, None) or StaticBatch(batch, masked, levels)
        self._batches[key] = kept
        if len(self._batches) > self._limit:
            del self._batches[next(iter(self._batches))]
        return kept


class StaticBatch:
    """A batch whose tensors stay where they are; others of its shape are copied into it."""

    def __init__(self, batch: Batch, masked: Tensor, levels: Tensor) -> None:
        self.batch = batch.copied()
        self.masked, self.levels = masked.clone(), levels.clone()
        self._of: Batch | None = batch

    def load(self, batch: Batch, masked: Tensor, levels: Tensor) -> None:
        """Take over a batch, once: from then on each replay goes on to its next row."""
        if self._of is batch:
            return
        self._of = batch
        self.masked.copy_(masked)
        self.levels.copy_(levels)
        self.batch.copy_from(batch)

    def advance(self) -> None:
        """Go on to the next row of every sample's table."""
        self.batch.advance()
        self.levels += 1


def rounded_rows(rows: int) -> int:
    """Network rows of the graph that serves so many: four sizes an octave, so at most a quarter
    of them fill up.

    >>> [rounded_rows(n) for n in (1, 7, 9, 17, 29, 33)]
    [1, 7, 10, 20, 32, 40]
    """
    step = max(1, (1 << max(rows - 1, 0).bit_length()) // 8)
    return -(-rows // step) * step


def objection(network: nn.Module) -> str | None:
    """Why a network's evaluation cannot be recorded, or None if it can."""
    for name, module in network.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            where = name or type(network).__name__
            return f"{where} has a hook, which a graph would run once and never again"
    return None


class GraphWarning(UserWarning):
    """Sampling on a GPU goes on without graphs; the message says why."""


def no_graphs(network: nn.Module) -> None:
    """For an engine whose steps are launched kernel by kernel."""


def graphs_for(network: nn.Module) -> StepGraphs | None:
    """CUDA graphs for an engine of this network; None on other devices, and, with a warning, where
    the network cannot be recorded."""
    device = next(network.parameters()).device
    if device.type != "cuda":
        return None
    reason = objection(network)
    if reason is not None:
        warnings.warn(f"steps run without CUDA graphs: {reason}", GraphWarning, stacklevel=3)
        return None
    return StepGraphs(CudaRecorder(device))
