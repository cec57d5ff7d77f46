"""Record the launches of CUDA kernels, and the resources that each uses."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fastdiff.kernels.cuda import declare, function


@dataclass(frozen=True)
class Launch:
    """A launch and its resources, as the CUDA runtime reports them (csrc/cuda/launch.cuh)."""

    kernel: str
    """The C++ name, mangled."""
    blocks: int
    threads: int
    """Threads per block."""
    cluster: int
    """Blocks per cluster; 1: no clusters."""
    registers: int
    """Registers per thread."""
    stack: int
    """Bytes of local memory per thread: arrays indexed at run time, and spilled registers."""
    fixed_shared: int
    """Bytes of static shared memory per block."""
    shared: int
    """Bytes of dynamic shared memory per block."""
    binary: int
    """The architecture of the code that runs: 90 for sm_90."""
    resident: int
    """Resident blocks per multiprocessor."""
    clusters: int
    """Resident clusters on the GPU; 0 without clusters."""
    multiprocessors: int
    most_threads: int
    """Most resident threads per multiprocessor."""

    @property
    def occupancy(self) -> float:
        """Resident threads as a share of the most that a multiprocessor can have."""
        return self.resident * self.threads / self.most_threads


declare("watch", "ii")
declare("seen", "qqpp")


@contextmanager
def watched(*, start: bool = True) -> Iterator[list[Launch]]:
    """Record the launches of CUDA kernels inside the block; the list is filled when it exits.

    Args:
        start: False records the launches without starting kernels, so outputs are not written.

    Backward passes run on the calling thread inside the block, because each thread has its own
    record.

    Raises:
        RuntimeError: there are no CUDA kernels.
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
