"""Capture calls in CUDA graphs, with an error if they wait for the device."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")


@contextmanager
def no_waiting() -> Iterator[None]:
    """Inside the block, any PyTorch operation that makes the host wait for the device raises."""
    with warnings.catch_warnings():
        # PyTorch warns once per process that this is a prototype
        warnings.filterwarnings("ignore", "Synchronization debug mode", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def captured(run: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """A graph of a call, and what the call returned during capture. The call is run once before
    capture so that its kernels are compiled and loaded."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), no_waiting():
        result = run()
    return graph, result
