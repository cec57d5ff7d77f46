"""The CPU kernels of `layer_norm` and `add_layer_norm`, in csrc/cpu/layer_norm.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import compiled
from ..choose import without
from ..cpu import DTYPES, address, as_dtype_or_float, as_float, cpu_backend, room
from ..views import as_rows, rows_of
from .gradients import empty_gradients


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    keep: bool = False,
) -> tuple[tuple[Tensor, Tensor | None], None]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = None if residual is None else torch.empty_like(y)
    if x.numel() == 0:
        return (y, total), None
    flat, rows, stride = rows_of(x)
    addend, addend_stride, wide = None, 0, False
    if residual is not None:
        addend, _, addend_stride = rows_of(as_dtype_or_float(residual, x.dtype))
        wide = addend.dtype is not x.dtype
    weight, bias = as_float(weight), as_float(bias)
    compiled.native.layer_norm(
        DTYPES[x.dtype], wide,
        flat.data_ptr(), address(addend), address(total), y.data_ptr(),
        address(weight), address(bias), rows, x.shape[-1], stride, addend_stride, eps,
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
    flat, flat_dy = as_rows(x), as_rows(dy)
    flat_dtotal = None if dtotal is None else as_rows(dtotal)
    sums = [room(x.shape[-1] if need else 0) for need in needs]
    weight = as_float(weight)
    tensors = address(flat_dy), address(flat_dtotal), address(flat), address(dx), address(weight)
    strides = flat_dy.stride(0), 0 if flat_dtotal is None else flat_dtotal.stride(0), flat.stride(0)
    compiled.native.layer_norm_backward(
        *(DTYPES[x.dtype], *tensors, address(sums[0]), address(sums[1])),
        *(len(flat), x.shape[-1], *strides, eps),
    )
    return dx, dweight.copy_(sums[0]), dbias.copy_(sums[1])


ADDING = cpu_backend(forward=forward, backward=backward)
"""The backend of `add_layer_norm`."""
BACKEND = without(ADDING, slice(1, 2))
