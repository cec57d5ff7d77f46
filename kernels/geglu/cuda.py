"""The CUDA kernels of `geglu`; their launchers are in csrc/cuda/geglu.cu."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import cuda
from ..views import as_rows

cuda.declare("geglu", "ipippqqq")
cuda.declare("geglu_backward", "ipipppqqqq")


def forward(x: Tensor, keep: bool) -> tuple[Tensor, None]:
    """Return y, contiguous."""
    d = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], d)
    if y.numel():
        flat = as_rows(x)
        pointers = flat.data_ptr(), y.data_ptr()
        cuda.launch("geglu", x, cuda.DTYPES[x.dtype], *pointers, len(flat), d, flat.stride(0))
    return y, None


def backward(dy: Tensor, x: Tensor, needs: Sequence[bool]) -> tuple[Tensor]:
    """Return dx, contiguous."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if dx.numel():
        flat, flat_dy = as_rows(x), as_rows(dy)
        pointers = flat_dy.data_ptr(), flat.data_ptr(), dx.data_ptr()
        sizes = len(flat), x.shape[-1] // 2, flat_dy.stride(0), flat.stride(0)
        cuda.launch("geglu_backward", x, cuda.DTYPES[x.dtype], *pointers, *sizes)
    return (dx,)


BACKEND = cuda.cuda_backend(forward=forward, backward=backward)
