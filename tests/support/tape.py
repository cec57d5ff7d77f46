"""A substitute for CUDA graphs on any device, which records operations and replays them.

As in a CUDA graph, everything that Python decides during recording is frozen: numbers, branches and
the tensors themselves. A replay runs the recorded operations again on the same tensors and writes
the results to the same addresses. Reading a tensor on the host, which CUDA graphs do not allow
during recording, is an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "cpu")


class HostRead(RuntimeError):
    """The host waited for a tensor while a graph was recorded."""


@contextmanager
def no_host_reads() -> Iterator[None]:
    """Inside the block, reading the values of a tensor is an error."""

    def refuse(name: str) -> Callable[..., Any]:
        def read(*_: Any, **__: Any) -> Any:
            raise HostRead(f"Tensor.{name} waits for the device")

        return read

    with ExitStack() as stack:
        for name in READS:
            stack.enter_context(patch.object(Tensor, name, refuse(name)))
        yield


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise HostRead(f"{func} waits for the device")
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, found))
        return found


class Tape:
    """A recorder (`fastdiff.runtime.graphs.Recorder`).

    Attributes:
        room: bytes that its graphs may keep together.
        replays: how often a graph was replayed.
        lengths: number of operations in each graph.
    """

    def __init__(self, room: float = math.inf) -> None:
        self.room, self._held = room, 0
        self.replays = 0
        self.lengths: list[int] = []
        self.replaying = False

    def warm_up(self, function: Callable[[], None]) -> None:
        function()

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        with no_host_reads(), _Recording() as recording:
            function()
        self.lengths.append(len(recording.calls))
        made = (t for *_, found in recording.calls for t in tree_leaves(found))
        self._held += sum(t.nbytes for t in made if isinstance(t, Tensor))

        def replay() -> None:
            self.replays += 1
            self.replaying = True
            for func, args, kwargs, recorded in recording.calls:
                found = func(*args, **kwargs)
                for old, new in zip(tree_leaves(recorded), tree_leaves(found), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)
            self.replaying = False

        return replay

    def held(self) -> int:
        """Bytes of all that its graphs compute: unlike a GPU's, they share no memory."""
        return self._held

    def renew(self) -> None:
        self._held = 0


class Idle(TorchDispatchMode):
    """Records the operations that the host issues outside the replays of a tape."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape, self.calls = tape, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.tape.replaying:
            self.calls.append(str(func))
        return func(*args, **(kwargs or {}))
