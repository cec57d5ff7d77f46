"""The CUDA kernels of `layer_norm` and `add_layer_norm`; their launchers are in
csrc/cuda/layer_norm.cu and csrc/cuda/layer_norm_backward.cu."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import cuda
from ..choose import without
from ..cpu import as_dtype_or_float
from ..views import all_contiguous, as_rows
from .gradients import empty_gradients

cuda.declare("layer_norm", "ipi" + "ppi" + "pp" + "pipi" + "qqqqfq")
cuda.declare("layer_norm_backward", "ipi" + "pppp" + "pi" + "ppippi" + "p" + "qqqqqfqq")

WIDEST = 8192
"""Longest row kept in registers; without 16-byte loads the limit is 4096."""
PROGRAMS = 256
"""Most partial sums for dweight and dbias."""


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    keep: bool = False,
) -> tuple[tuple[Tensor, Tensor | None], None]:
    """Return y and, if there is a residual, the total."""
    y = x.new_empty(x.shape)
    total = None if residual is None else x.new_empty(x.shape)
    if x.numel() == 0:
        return (y, total), None
    flat, addend = as_rows(x), None
    if residual is not None:
        addend = as_rows(as_dtype_or_float(residual, x.dtype))
    weight, bias = all_contiguous(weight, bias)
    strides = flat.stride(0), 0 if addend is None else addend.stride(0)
    cuda.launch(
        "layer_norm", x, cuda.DTYPES[x.dtype], flat.data_ptr(),
        *cuda.parameter(addend), cuda.address(total), y.data_ptr(),
        *cuda.parameter(weight), *cuda.parameter(bias),
        len(flat), x.shape[-1], *strides, eps, WIDEST,
    )  # fmt: skip
    return (y, total), None


def backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    residual: None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, dweight and dbias; the last two are empty unless `needs` asks for them.

    x is the normalized tensor (x or total); dtotal is added to its gradient.
    """
    needs = needs[1:]
    dx, dweight, dbias = empty_gradients(x, weight, bias, needs)
    if x.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_()
    flat, flat_dy, d = as_rows(x), as_rows(dy), x.shape[-1]
    flat_dtotal = None if dtotal is None else as_rows(dtotal)
    weight = None if weight is None else weight.contiguous()
    programs = min(PROGRAMS, len(flat))
    rows = [programs if need else 0 for need in needs]
    shares = x.new_empty(sum(rows), d, dtype=torch.float32).split(rows)
    wide = d > min(WIDEST, 4096)
    statistics = x.new_empty(len(flat) if wide else 0, 3, dtype=torch.float32)
    strides = flat_dy.stride(0), 0 if flat_dtotal is None else flat_dtotal.stride(0), flat.stride(0)
    outputs = (
        (cuda.address(share if need else None), *cuda.parameter(out if need else None))
        for share, out, need in zip(shares, (dweight, dbias), needs, strict=True)
    )
    cuda.launch(
        "layer_norm_backward", x, cuda.DTYPES[x.dtype],
        flat_dy.data_ptr(), cuda.address(flat_dtotal), flat.data_ptr(), dx.data_ptr(),
        *cuda.parameter(weight), *next(outputs), *next(outputs), statistics.data_ptr(),
        len(flat), d, *strides, eps, programs, WIDEST,
    )  # fmt: skip
    return dx, dweight, dbias


ADDING = cuda.cuda_backend(forward=forward, backward=backward, settings=lambda: WIDEST)
"""The backend of `add_layer_norm`."""
BACKEND = without(ADDING, slice(1, 2))
