"""Shared by the Triton kernels of all ops: launching, and small device functions."""

from __future__ import annotations

from .backend import slower_in_fp32, triton_backend, why_not_dtypes
from .functions import merged, sigmoid, silu, two_sum, with_tile
from .launches import (
    DTYPES,
    INTERPRETED,
    Launch,
    cdiv,
    constexpr_function,
    jit,
    launch,
    next_power_of_2,
    recorded_architecture,
    recording_launches,
    tl,
    triton,
)
from .products import product, tile
