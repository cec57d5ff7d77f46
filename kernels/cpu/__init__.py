"""Helpers to call the CPU kernels, functions of the compiled module (csrc/cpu/<op>.cpp)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..choose import Backend

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""Dtype codes of csrc/common/kernels.h."""


def address(x: Tensor | None) -> int:
    """Data pointer of a dense tensor; 0 for None or an empty tensor."""
    return 0 if x is None else x.data_ptr()


def room(*shape: int, zeros: bool = False) -> Tensor:
    """fp32 CPU memory for a kernel to fill, regardless of PyTorch's default dtype and device."""
    make = torch.zeros if zeros else torch.empty
    return make(shape, dtype=torch.float32, device="cpu")


def as_float(x: Tensor | None) -> Tensor | None:
    """Convert a parameter to dense fp32."""
    if x is None or (x.dtype is torch.float32 and x.is_contiguous()):
        return x
    return x.to(torch.float32).contiguous()


def as_dtype_or_float(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x if it has the dtype, else x in fp32: the dtypes a kernel's second operand may have."""
    return x if x.dtype is dtype or x.dtype is torch.float32 else x.float()


def cpu_backend(
    *,
    forward: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    dtypes: tuple[torch.dtype, ...] = tuple(DTYPES),
    slower: Callable[..., str | None] | None = None,
) -> Backend:
    """Build an op's backend "cpu"."""
    return Backend(name="cpu", forward=forward, backward=backward, dtypes=dtypes, slower=slower)
