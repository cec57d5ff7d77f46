"""What the CUDA kernels of all ops share: the library they are in, and calls into it."""

from __future__ import annotations

from .backend import cuda_backend
from .library import (
    DTYPES,
    SUPPORTED,
    address,
    aligned,
    ask,
    built,
    declare,
    launch,
    parameter,
    refusal,
    using_library,
)
from .watch import Launch, watched

__all__ = [
    "DTYPES",
    "SUPPORTED",
    "Launch",
    "address",
    "aligned",
    "ask",
    "built",
    "cuda_backend",
    "declare",
    "launch",
    "parameter",
    "refusal",
    "using_library",
    "watched",
]
