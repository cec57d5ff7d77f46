"""The CUDA kernels of `ada_layer_norm`; their launchers are in csrc/cuda/ada_layer_norm.cu."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import cuda
from ..views import as_rows

cuda.declare("ada_layer_norm", "ip" + "i" + "pp" + "pipi" + "qqqqf")
cuda.declare("ada_layer_norm_backward", "ip" + "i" + "ppp" + "pi" + "p" + "qqqqqqf")

CHUNKS = 64
"""Most partial sums per sample for dscale and dshift."""


def forward(x: Tensor, scale: Tensor, shift: Tensor, eps: float, keep: bool) -> tuple[Tensor, None]:
    """Return y, contiguous."""
    n, length, d = x.shape
    y = x.new_empty(x.shape)
    if x.numel():
        flat, dense_scale, dense_shift = as_rows(x), scale.contiguous(), shift.contiguous()
        cuda.launch(
            "ada_layer_norm", x, cuda.DTYPES[x.dtype], flat.data_ptr(), y.data_ptr(),
            *cuda.parameter(dense_scale), *cuda.parameter(dense_shift),
            n, length, d, flat.stride(0), eps,
        )  # fmt: skip
    return y, None


def backward(
    dy: Tensor, x: Tensor, scale: Tensor, shift: Tensor, eps: float, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, dscale, dshift."""
    n, length, d = x.shape
    dx, chunks = x.new_empty(x.shape), max(1, min(CHUNKS, length))
    shares = torch.zeros(n, chunks, 2, d, dtype=torch.float32, device=x.device)
    if x.numel():
        flat, flat_dy, dense_scale = as_rows(x), as_rows(dy), scale.contiguous()
        cuda.launch(
            "ada_layer_norm_backward", x, cuda.DTYPES[x.dtype],
            flat_dy.data_ptr(), flat.data_ptr(), dx.data_ptr(), *cuda.parameter(dense_scale),
            shares.data_ptr(), n, length, d, chunks, flat_dy.stride(0), flat.stride(0), eps,
        )  # fmt: skip
    dscale, dshift = (shares[:, :, i].sum(1) for i in range(2))
    return dx, dscale.to(scale.dtype), dshift.to(shift.dtype)


BACKEND = cuda.cuda_backend(forward=forward, backward=backward)
