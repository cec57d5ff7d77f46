"""How tensors lie in memory, as the kernels of all backends take them."""

from __future__ import annotations

import torch
from torch import Tensor


def memory_format_of(x: Tensor) -> torch.memory_format:
    """channels_last where x is stored so (and could not as well be called contiguous)."""
    if not x.is_contiguous():
        if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        if x.ndim == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
            return torch.channels_last_3d
    return torch.contiguous_format


def dense_like(x: Tensor) -> Tensor:
    """Room for a tensor of the shape, dtype and memory format of x."""
    return torch.empty_like(x, memory_format=memory_format_of(x))


def as_rows(x: Tensor) -> Tensor:
    """(..., D) as (rows, D) with the last dimension dense; a view where the strides allow it."""
    flat = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def rows_of(x: Tensor) -> tuple[Tensor, int, int]:
    """(..., D) as dense rows: a tensor that holds them, how many, how far apart. x has numbers."""
    if x.is_contiguous():  # no view has to be made
        d = x.shape[-1]
        return x, x.numel() // d, d
    flat = as_rows(x)
    return flat, len(flat), flat.stride(0)


def all_contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """Each of them dense, in the order of its dimensions; None stays None."""
    return [None if t is None else t.contiguous() for t in tensors]
