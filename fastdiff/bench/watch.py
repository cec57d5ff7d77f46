"""The launches of CUDA kernels, and what each takes of its GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fastdiff.kernels.cuda import declare, function


@dataclass(frozen=True)
class Launch:
    """A launch and what it takes of its GPU, as CUDA's runtime tells it (csrc/launch.cuh)."""

    kernel: str
    """The C++ name, mangled."""
    blocks: int
    threads: int
    """Of a block."""
    cluster: int
    """Blocks of a cluster; 1: without clusters."""
    registers: int
    """Of a thread."""
    stack: int
    """Bytes of a thread's memory: arrays that are indexed at run time, and spilled registers."""
    fixed_shared: int
    """Bytes of a block's shared memory whose size stands in the source."""
    shared: int
    """Bytes of a block's shared memory that the launch asks for."""
    binary: int
    """The architecture whose code runs: 90 is sm_90."""
    resident: int
    """Blocks that a multiprocessor has room for at a time."""
    clusters: int
    """Clusters that the GPU has room for at a time; 0 without clusters."""
    multiprocessors: int
    most_threads: int
    """Of a multiprocessor."""

    @property
    def occupancy(self) -> float:
        """Threads a multiprocessor has room for, as a share of the most it can have."""
        return self.resident * self.threads / self.most_threads


declare("watch", "ii")
declare("seen", "qqpp")


@contextmanager
def watched(*, start: bool = True) -> Iterator[list[Launch]]:
    """The launches of the CUDA kernels inside the block; the list is filled at its end.

    start: False asks what launches would take and starts no kernel: results stay unwritten.
    Backward passes run on the calling thread inside the block, since each thread has its own list.

    Raises:
        RuntimeError: there are no CUDA kernels here.
    """
    watch, seen = function("watch"), function("seen")
    found: list[Launch] = []
    watch(1, start)
    try:
        with torch.autograd.set_multithreading_enabled(False):
            yield found
        name, fields = ctypes.create_string_buffer(4096), (ctypes.c_int64 * 12)()
        where = ctypes.addressof(name), ctypes.addressof(fields)
        while seen(len(found), len(name), *where) is None and name.value:
            found.append(Launch(name.value.decode(), *fields))
    finally:
        watch(0, True)
