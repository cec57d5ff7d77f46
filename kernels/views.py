"""Memory layouts and views of tensors, shared by the kernels of all backends."""

from __future__ import annotations

import torch
from torch import Tensor


def memory_format_of(x: Tensor) -> torch.memory_format:
    """channels_last if x is stored that way and is not also contiguous."""
    if not x.is_contiguous():
        if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        if x.ndim == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
            return torch.channels_last_3d
    return torch.contiguous_format


def dense_like(x: Tensor) -> Tensor:
    """An empty tensor with the shape, dtype and memory format of x, without gaps."""
    return torch.empty_like(x, memory_format=memory_format_of(x))


def as_rows(x: Tensor) -> Tensor:
    """(..., D) as (rows, D) with the last dimension dense; a view if the strides allow it."""
    flat = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def rows_of(x: Tensor) -> tuple[Tensor, int, int]:
    """(..., D), not empty, as dense rows: a tensor that holds them, their number, and stride."""
    if x.is_contiguous():  # avoids creating a view
        d = x.shape[-1]
        return x, x.numel() // d, d
    flat = as_rows(x)
    return flat, len(flat), flat.stride(0)


def all_contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """Make each tensor contiguous; None stays None."""
    return [None if t is None else t.contiguous() for t in tensors]


def rows_apart(x: Tensor | None) -> tuple[Tensor | None, int]:
    """(C,) or (N, C) with dense rows, and the distance between rows: 0 for (C,) and None.

    A slice of columns stays a view.
    """
    if x is None:
        return None, 0
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x, x.stride(0) if x.ndim == 2 else 0
