"""Shared by the CUDA kernels of all ops: the library that contains them, and calls into it."""

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
    function,
    launch,
    parameter,
    refusal,
    using_library,
)
