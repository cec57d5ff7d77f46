"""The CUDA kernels of `gate_residual`; their launchers are in csrc/cuda/gate_residual.cu."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import cuda
from ..views import as_rows

cuda.declare("gate_residual", "ip" + "i" + "ppp" + "pi" + "qqqqq")
cuda.declare("gate_residual_backward", "ip" + "i" + "ppp" + "pi" + "p" + "qqqqqq")

CHUNKS = 64
"""Most partial sums per sample for dgate."""


def forward(x: Tensor, gate: Tensor, residual: Tensor, keep: bool) -> tuple[Tensor, None]:
    """Return y, contiguous."""
    n, length, d = x.shape
    y = x.new_empty(x.shape)
    if x.numel():
        flat, flat_residual, dense_gate = as_rows(x), as_rows(residual), gate.contiguous()
        cuda.launch(
            "gate_residual", x, cuda.DTYPES[x.dtype],
            flat.data_ptr(), flat_residual.data_ptr(), y.data_ptr(), *cuda.parameter(dense_gate),
            n, length, d, flat.stride(0), flat_residual.stride(0),
        )  # fmt: skip
    return y, None


def backward(
    dy: Tensor, x: Tensor, gate: Tensor, residual: None, needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """Return dx, dgate."""
    n, length, d = x.shape
    dx, chunks = x.new_empty(x.shape), max(1, min(CHUNKS, length))
    make = torch.empty if x.numel() else torch.zeros
    shares = make(n, chunks, d, dtype=torch.float32, device=x.device)
    if x.numel():
        flat, flat_dy, dense_gate = as_rows(x), as_rows(dy), gate.contiguous()
        cuda.launch(
            "gate_residual_backward", x, cuda.DTYPES[x.dtype],
            flat_dy.data_ptr(), flat.data_ptr(), dx.data_ptr(), *cuda.parameter(dense_gate),
            shares.data_ptr(), n, length, d, chunks, flat_dy.stride(0), flat.stride(0),
        )  # fmt: skip
    return dx, shares.sum(1).to(gate.dtype)


BACKEND = cuda.cuda_backend(forward=forward, backward=backward)
