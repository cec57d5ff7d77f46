"""Steps of an engine as CUDA graphs: recorded once per shape, replayed with other requests.

Everything that differs between two steps of one shape is kept in tensors at fixed addresses: rows
of the sampler tables, positions of the embeddings, seeds, projected contexts. When a request joins
or leaves, these are overwritten in place and the graph stays valid. A step is recorded again when
one of these changes: the number of network rows, guidance, rescaling, whether there is a preview,
the backend of the ops, or the address of a tensor (because a buffer had to grow).
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
"""Maximum number of graphs kept, the most recently used ones. They share memory."""
SHARE = 0.25
"""Part of a GPU's memory that the graphs of an engine may keep together."""
WARM_UP = 2
"""Number of runs before recording, in which kernels are compiled, loaded and chosen."""
ROWS = 1024
"""Initial capacity of a buffer for tables or embeddings, in rows. Growing moves the buffer."""

Replay = Callable[[], object]


class Recorder(Protocol):
    """Records functions as graphs, which share memory.

    Attributes:
        room: bytes that the graphs may keep together.
    """

    room: float

    def warm_up(self, function: Callable[[], None]) -> None:
        """Run the function under the conditions of recording."""

    def record(self, function: Callable[[], None]) -> Replay:
        """Record the work of the function without doing it. Returns a function that does it."""

    def held(self) -> int:
        """Bytes that the graphs keep together."""

    def renew(self) -> None:
        """Start with new memory: that of earlier graphs is free once they are all gone."""


class CudaRecorder:
    """Records CUDA graphs on a separate stream; all share one memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = None
        self.room = SHARE * torch.cuda.get_device_properties(device).total_memory

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

    def held(self) -> int:
        if self._pool is None:
            return 0
        segments = torch.cuda.memory_snapshot(self._pool)
        return sum(segment["total_size"] for segment in segments)

    def renew(self) -> None:
        self._pool = None


@dataclass(eq=False)
class _Graph:
    replay: Replay
    addresses: list[int]


class StepGraphs:
    """The recorded steps of one engine.

    At most `limit` graphs are kept. If one more needs more memory than the recorder has room for,
    all others are dropped, since they share their memory; those that are used again are recorded
    again. The graph of a single step may need more than that.

    Attributes:
        recorded: number of recordings so far; each takes as long as a few steps.
    """

    def __init__(self, recorder: Recorder, *, limit: int = LIMIT) -> None:
        self._recorder, self._limit = recorder, limit
        self._graphs: dict[Hashable, _Graph] = {}
        self._batches: dict[Hashable, StaticBatch] = {}
        self._weights: list[int] = []
        self._loaded: Batch | None = None
        self.recorded = 0

    def run(
        self,
        key: Hashable,
        function: Callable[[], None],
        *,
        reads: Sequence[Tensor],
        state: Sequence[Tensor],
    ) -> None:
        """Do the work of a function by replaying its graph, which is recorded if needed.

        key: identifies the work, together with the current backend, except for the values in its
            tensors.
        reads: all tensors that the function reads but does not create, except the weights of the
            network (see `forget_if_moved`).
        state: the tensors that the function changes; their values are restored after warm-up.
        """
        key = key, selected_backend()
        addresses = [tensor.data_ptr() for tensor in reads]
        graph = self._graphs.pop(key, None)
        if graph is None or graph.addresses != addresses:
            graph = None  # frees its memory for the new graph
            graph = self._recorded(function, addresses, state)
        self._graphs[key] = graph  # at the end, as the most recently used
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
        if self._graphs and self._recorder.held() > self._recorder.room:
            del replay
            self.forget()
            replay = self._recorder.record(function)
        restore()
        self.recorded += 1
        return _Graph(replay, addresses)

    def forget_if_moved(self, network: nn.Module) -> None:
        """Drop all graphs if the address of a weight has changed since the last call.

        Changes in place, such as merging a LoRA, keep the addresses and need no new graphs.
        """
        weights = [t.data_ptr() for t in (*network.parameters(), *network.buffers())]
        if weights != self._weights:
            self._weights = weights
            self.forget()

    def forget(self) -> None:
        """Drop all graphs and their memory."""
        self._graphs.clear()
        self._recorder.renew()

    def static(self, batch: Batch, masked: Tensor, levels: Tensor, counters: Tensor) -> StaticBatch:
        """The static batch that graphs for this shape read, with this batch in it.

        counters: int64, incremented by every step; the indices of the embeddings and `levels` are
            kept there.
        """
        key = batch.form, batch.uncond is None, len(masked)
        kept = self._batches.pop(key, None) or StaticBatch(batch, masked, levels, counters)
        self._batches[key] = kept
        if self._loaded is not batch:  # each replay advances it
            kept.load(batch, masked, levels)
            self._loaded = batch
        if len(self._batches) > self._limit:
            del self._batches[next(iter(self._batches))]
        return kept


class StaticBatch:
    """A batch with tensors at fixed addresses, into which other batches of its shape are copied."""

    def __init__(self, batch: Batch, masked: Tensor, levels: Tensor, counters: Tensor) -> None:
        inputs = len(batch.embeddings)
        self.batch = batch.copied(counters[:inputs])
        self.masked, self.levels = masked.clone(), counters[inputs:][: len(levels)]

    def load(self, batch: Batch, masked: Tensor, levels: Tensor) -> None:
        """Copy a batch in."""
        self.masked.copy_(masked)
        self.levels.copy_(levels)
        self.batch.copy_from(batch)


def rounded_rows(rows: int) -> int:
    """The number of network rows in the graph that evaluates `rows`. There are four sizes per
    factor of two, so padding adds at most a quarter.

    >>> [rounded_rows(n) for n in (1, 7, 9, 17, 29, 33)]
    [1, 7, 10, 20, 32, 40]
    """
    step = max(1, (1 << max(rows - 1, 0).bit_length()) // 8)
    return -(-rows // step) * step


def objection(network: nn.Module) -> str | None:
    """Why the evaluation of a network cannot be recorded, or None if it can."""
    for name, module in network.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            where = name or type(network).__name__
            return f"{where} has a hook, which a graph would run only while recording"
    return None


class GraphWarning(UserWarning):
    """Sampling on a GPU runs without CUDA graphs; the message says why."""


def no_graphs(network: nn.Module) -> None:
    """Used for `graphs` in `Engines` to launch steps kernel by kernel."""


def graphs_for(network: nn.Module) -> StepGraphs | None:
    """CUDA graphs for an engine of this network. None on other devices, and, with a warning, if the
    network cannot be recorded."""
    device = next(network.parameters()).device
    if device.type != "cuda":
        return None
    reason = objection(network)
    if reason is not None:
        warnings.warn(f"steps run without CUDA graphs: {reason}", GraphWarning, stacklevel=3)
        return None
    return StepGraphs(CudaRecorder(device))
