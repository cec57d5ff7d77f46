"""The CPU kernels of `geglu`, in csrc/cpu/geglu.cpp."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import compiled
from ..cpu import DTYPES, cpu_backend
from ..views import as_rows, rows_of


def forward(x: Tensor, keep: bool) -> tuple[Tensor, None]:
    """Return y, contiguous."""
    d = x.shape[-1] // 2
    y = x.new_empty((*x.shape[:-1], d))
    if y.numel():
        flat, rows, stride = rows_of(x)
        compiled.native.geglu(DTYPES[x.dtype], flat.data_ptr(), y.data_ptr(), rows, d, stride)
    return y, None


def backward(dy: Tensor, x: Tensor, needs: Sequence[bool]) -> tuple[Tensor]:
    """Return dx, contiguous."""
    d = x.shape[-1] // 2
    flat, flat_dy = as_rows(x), as_rows(dy)
    dx = x.new_empty(x.shape)
    pointers = flat_dy.data_ptr(), flat.data_ptr(), dx.data_ptr()
    sizes = len(flat), d, flat_dy.stride(0), flat.stride(0)
    compiled.native.geglu_backward(DTYPES[x.dtype], *pointers, *sizes)
    return (dx,)


BACKEND = cpu_backend(forward=forward, backward=backward)
