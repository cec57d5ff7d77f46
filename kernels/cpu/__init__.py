"""Calls of the CPU kernels, which are functions of the compiled module (csrc/cpu/<op>.cpp)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..choose import Backend

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""The codes of csrc/common/kernels.h."""


def address(x: Tensor | None) -> int:
    """Where the numbers of a dense tensor begin; 0 for None and for no numbers."""
    return 0 if x is None else x.data_ptr()


def room(*shape: int, zeros: bool = False) -> Tensor:
    """fp32 memory on the CPU for a kernel to fill, whatever PyTorch's default dtype and device."""
    make = torch.zeros if zeros else torch.empty
    return make(shape, dtype=torch.float32, device="cpu")


def as_float(x: Tensor | None) -> Tensor | None:
    """A parameter as dense fp32."""
    if x is None or (x.dtype is torch.float32 and x.is_contiguous()):
        return x
    return x.to(torch.float32).contiguous()


def as_dtype_or_float(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x if it has the dtype, else as fp32: what a kernel takes for a second operand."""
    return x if x.dtype is dtype or x.dtype is torch.float32 else x.float()


def cpu_backend(
    *,
    forward: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    dtypes: tuple[torch.dtype, ...] = tuple(DTYPES),
    slower: Callable[..., str | None] | None = None,
) -> Backend:
    """The backend "cpu" of an op."""
    return Backend(name="cpu", forward=forward, backward=backward, dtypes=dtypes, slower=slower)
