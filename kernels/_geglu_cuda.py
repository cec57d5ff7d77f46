"""The CUDA kernels of `geglu`; their launchers are in csrc/geglu.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.kernels import _cuda
from fastdiff.kernels._triton import as_rows

_cuda.declare("geglu", "ipippqqq")
_cuda.declare("geglu_backward", "ipipppqqqq")


def geglu_forward(x: Tensor) -> Tensor:
    """`geglu` by the CUDA kernel."""
    d = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], d)
    if y.numel():
        flat = as_rows(x)
        pointers = flat.data_ptr(), y.data_ptr()
        _cuda.launch("geglu", x, _cuda.DTYPES[x.dtype], *pointers, len(flat), d, flat.stride(0))
    return y


def geglu_backward(dy: Tensor, x: Tensor) -> Tensor:
    """dx of `geglu`, dense."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if dx.numel():
        flat, flat_dy = as_rows(x), as_rows(dy)
        pointers = flat_dy.data_ptr(), flat.data_ptr(), dx.data_ptr()
        sizes = len(flat), x.shape[-1] // 2, flat_dy.stride(0), flat.stride(0)
        _cuda.launch("geglu_backward", x, _cuda.DTYPES[x.dtype], *pointers, *sizes)
    return dx


geglu_cuda = torch.library.custom_op("fastdiff::geglu_cuda", geglu_forward, mutates_args=())
geglu_backward_cuda = torch.library.custom_op(
    "fastdiff::geglu_backward_cuda", geglu_backward, mutates_args=()
)
