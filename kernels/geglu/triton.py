"""The Triton kernels of `geglu`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..triton import cdiv, jit, launch, tl, triton_backend
from ..tuning import config
from ..views import as_rows


@jit
def _geglu_kernel(
    x: tl.tensor,
    y: tl.tensor,
    rows: tl.tensor,
    d: tl.tensor,
    x_stride: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < d)
    source = x + row * x_stride + column
    value = tl.load(source, inside, other=0.0).to(tl.float32)
    gate = tl.load(source + d, inside, other=0.0).to(tl.float32)
    gelu = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(y + row * d + column, (value * gelu).to(y.dtype.element_ty), inside)


@jit
def _geglu_backward_kernel(
    dy: tl.tensor,
    x: tl.tensor,
    dx: tl.tensor,
    rows: tl.tensor,
    d: tl.tensor,
    dy_stride: tl.tensor,
    x_stride: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < d)
    source = x + row * x_stride + column
    value = tl.load(source, inside, other=0.0).to(tl.float32)
    gate = tl.load(source + d, inside, other=0.0).to(tl.float32)
    gradient = tl.load(dy + row * dy_stride + column, inside, other=0.0).to(tl.float32)
    cdf = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))  # Phi(g), gelu(g) = g Phi(g)
    density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    target = dx + row * (2 * d) + column
    tl.store(target, (gradient * gate * cdf).to(dx.dtype.element_ty), inside)
    dgate = gradient * value * (cdf + gate * density)
    tl.store(target + d, dgate.to(dx.dtype.element_ty), inside)


def forward(x: Tensor, keep: bool) -> tuple[Tensor, None]:
    """Return y, contiguous."""
    d = x.shape[-1] // 2
    flat = as_rows(x)
    y = x.new_empty(*x.shape[:-1], d)
    chosen = config("geglu", x, "rows")
    grid = (cdiv(len(flat), chosen["ROWS"]), cdiv(d, chosen["COLUMNS"]))
    launch(_geglu_kernel, grid, flat, y, len(flat), d, flat.stride(0), **chosen)
    return y, None


def backward(dy: Tensor, x: Tensor, needs: Sequence[bool]) -> tuple[Tensor]:
    """Return dx, contiguous."""
    d = x.shape[-1] // 2
    flat, flat_dy = as_rows(x), as_rows(dy)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    chosen = config("geglu_backward", x, "rows")
    grid = (cdiv(len(flat), chosen["ROWS"]), cdiv(d, chosen["COLUMNS"]))
    strides = flat_dy.stride(0), flat.stride(0)
    launch(_geglu_backward_kernel, grid, flat_dy, flat, dx, len(flat), d, *strides, **chosen)
    return (dx,)


BACKEND = triton_backend(forward=forward, backward=backward)
