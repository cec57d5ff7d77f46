"""The Triton kernels of `layer_norm` and `add_layer_norm`, and their launchers.

A row of up to `WIDEST` elements stays in registers, with ROWS rows per tile; wider rows use the
kernels of triton_wide.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..choose import without
from ..triton import cdiv, jit, launch, next_power_of_2, tl, triton_backend, two_sum
from ..tuning import Config, config
from ..views import all_contiguous, as_rows
from .gradients import empty_gradients
from .triton_wide import (
    layer_norm_wide_backward_kernel,
    layer_norm_wide_kernel,
    wide_shares_kernel,
)


@jit
def _layer_norm_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    total: tl.tensor,
    rows: tl.tensor,
    d: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    eps: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < d)
    value = tl.load(x + row * x_stride + column, inside, other=0.0).to(tl.float32)
    # a vector, not a column of the tile, for which a thread would repeat the load per element
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.load(x + place * x_stride, place < rows, other=0.0).to(tl.float32)
    if residual is not None:
        source = residual + row * residual_stride + column
        value += tl.load(source, inside, other=0.0).to(tl.float32)
        source = residual + place * residual_stride
        first += tl.load(source, place < rows, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row * d + column, rounded, inside)
        value = rounded.to(tl.float32)
        first = first.to(total.dtype.element_ty).to(tl.float32)
    centered, rstd = _normed(value, first[:, None], inside, d, eps)
    out = centered * rstd
    if weight is not None:
        out *= tl.load(weight + column, column < d, other=0.0).to(tl.float32)
    if bias is not None:
        out += tl.load(bias + column, column < d, other=0.0).to(tl.float32)
    tl.store(y + row * d + column, out.to(y.dtype.element_ty), inside)


@jit
def _normed(
    value: tl.tensor, first: tl.tensor, inside: tl.tensor, d: tl.tensor, eps: tl.tensor
) -> tl.tensor:
    """Rows minus their means, 0 outside, and 1 / sqrt(v + eps).

    A row's first number is subtracted before summing, which keeps precision when the mean is large
    and gives exactly 0 for a constant row.
    """
    above = tl.sum(tl.where(inside, value - first, 0.0), 1, keep_dims=True) / d
    mean, rest = two_sum(first, above)
    centered = tl.where(inside, value - mean - rest, 0.0)
    variance = tl.sum(centered * centered, 1, keep_dims=True) / d
    return centered, tl.div_rn(1.0, tl.sqrt_rn(variance + eps))


@jit
def _layer_norm_backward_kernel(
    dy: tl.tensor,
    dtotal: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    dx: tl.tensor,
    dweights: tl.tensor,
    dbiases: tl.tensor,
    rows: tl.tensor,
    d: tl.tensor,
    dy_stride: tl.tensor,
    dtotal_stride: tl.tensor,
    x_stride: tl.tensor,
    eps: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """dx = rstd (g - mean(g) - xhat mean(g xhat)) + dtotal, g = dy weight, for every
    num_programs-th tile of rows, and this program's partial sums of dweight and dbias."""
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)[None, :]
    if weight is not None:
        gamma = tl.load(weight + column, column < d, other=0.0).to(tl.float32)
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    dbias = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(program, tl.cdiv(rows, ROWS), tl.num_programs(0)):
        place = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        row = (tile * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        inside = (row < rows) & (column < d)
        value = tl.load(x + row * x_stride + column, inside, other=0.0).to(tl.float32)
        first = tl.load(x + place * x_stride, place < rows, other=0.0).to(tl.float32)
        gradient = tl.load(dy + row * dy_stride + column, inside, other=0.0).to(tl.float32)
        centered, rstd = _normed(value, first[:, None], inside, d, eps)
        normed = centered * rstd
        if dweights is not None:
            dweight += gradient * normed
        if dbiases is not None:
            dbias += gradient
        if weight is not None:
            gradient *= gamma
        along = tl.sum(gradient * normed, 1, keep_dims=True) / d
        mean = tl.sum(gradient, 1, keep_dims=True) / d
        out = rstd * (gradient - mean - normed * along)
        if dtotal is not None:
            out += tl.load(dtotal + row * dtotal_stride + column, inside, other=0.0).to(tl.float32)
        tl.store(dx + row * d + column, out.to(dx.dtype.element_ty), inside)
    target = program * d + tl.arange(0, BLOCK)
    if dweights is not None:
        tl.store(dweights + target, tl.sum(dweight, 0), tl.arange(0, BLOCK) < d)
    if dbiases is not None:
        tl.store(dbiases + target, tl.sum(dbias, 0), tl.arange(0, BLOCK) < d)


@jit
def _sum_shares_kernel(
    dweights: tl.tensor,
    dbiases: tl.tensor,
    dweight: tl.tensor,
    dbias: tl.tensor,
    shares: tl.tensor,
    d: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Add up the partial sums, (shares, D) fp32, always in the same order."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    if dweight is not None:
        out = _sum_rows(dweights, shares, d, column, ROWS, COLUMNS)
        tl.store(dweight + column, out.to(dweight.dtype.element_ty), column < d)
    if dbias is not None:
        out = _sum_rows(dbiases, shares, d, column, ROWS, COLUMNS)
        tl.store(dbias + column, out.to(dbias.dtype.element_ty), column < d)


@jit
def _sum_rows(
    numbers: tl.tensor,
    rows: tl.tensor,
    d: tl.tensor,
    column: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (column < d)[None, :]
        total += tl.load(numbers + row * d + column[None, :], inside, other=0.0)
    return tl.sum(total, 0)


# Launchers

WIDEST = 4096
"""Longest row kept in registers."""


def _shape_class(d: int) -> str:
    """The smallest class that holds a row."""
    return next((str(width) for width in (512, 1024, 2048, WIDEST) if d <= width), "wide")


def _block(d: int, chosen: Config) -> tuple[dict[str, int], int]:
    """The constants of a kernel over whole rows, and the number of rows per tile."""
    block = next_power_of_2(d)
    rows = max(1, chosen["ELEMENTS"] // block)
    return {"ROWS": rows, "BLOCK": block, "num_warps": chosen["num_warps"]}, rows


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    keep: bool = False,
) -> tuple[tuple[Tensor, Tensor | None], None]:
    y = x.new_empty(x.shape)
    total = None if residual is None else x.new_empty(x.shape)
    if x.numel() == 0:
        return (y, total), None
    d, shape_class = x.shape[-1], _shape_class(x.shape[-1])
    flat, addend = as_rows(x), None if residual is None else as_rows(residual)
    strides = flat.stride(0), 0 if addend is None else addend.stride(0)
    weight, bias = all_contiguous(weight, bias)
    arguments = flat, addend, weight, bias, y, total, len(flat), d, *strides, eps
    chosen = config("layer_norm", x, shape_class)
    if shape_class == "wide":
        block, warps = chosen["ELEMENTS"], chosen["num_warps"]
        launch(layer_norm_wide_kernel, (len(flat),), *arguments, BLOCK=block, num_warps=warps)
    else:
        constants, rows = _block(d, chosen)
        launch(_layer_norm_kernel, (cdiv(len(flat), rows),), *arguments, **constants)
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
    d, shape_class = x.shape[-1], _shape_class(x.shape[-1])
    dx, dweight, dbias = empty_gradients(x, weight, bias, needs)
    if x.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_()
    flat, flat_dy, flat_dtotal = (
        as_rows(x),
        as_rows(dy),
        None if dtotal is None else as_rows(dtotal),
    )
    strides = flat_dy.stride(0), 0 if flat_dtotal is None else flat_dtotal.stride(0), flat.stride(0)
    weight = None if weight is None else weight.contiguous()
    chosen = config("layer_norm_backward", x, shape_class)
    constants, rows = _block(d, chosen)
    tiles = len(flat) if shape_class == "wide" else cdiv(len(flat), rows)
    programs = min(chosen["PROGRAMS"], tiles)
    shares = [
        torch.empty(programs, d, dtype=torch.float32, device=x.device) if need else None
        for need in needs
    ]
    inputs = flat_dy, flat_dtotal, flat, weight, dx
    if shape_class == "wide":
        constants = {"BLOCK": chosen["ELEMENTS"], "num_warps": chosen["num_warps"]}
        statistics = torch.empty(len(flat), 3, dtype=torch.float32, device=x.device)
        arguments: tuple[Any, ...] = (*inputs, statistics, len(flat), d, *strides, eps)
        launch(layer_norm_wide_backward_kernel, (len(flat),), *arguments, **constants)
        if any(needs):
            grid = programs, cdiv(d, chosen["ELEMENTS"])
            arguments = flat_dy, flat, statistics, *shares, len(flat), d, strides[0], strides[2]
            launch(wide_shares_kernel, grid, *arguments, **constants)
    else:
        arguments = (*inputs, *shares, len(flat), d, *strides, eps)
        count = programs if any(needs) else tiles
        launch(_layer_norm_backward_kernel, (count,), *arguments, **constants)
    if any(needs):
        outputs = (out if need else None for out, need in zip((dweight, dbias), needs, strict=True))
        arguments = *shares, *outputs, programs, d
        launch(_sum_shares_kernel, (cdiv(d, 32),), *arguments, ROWS=64, COLUMNS=32)
    return dx, dweight, dbias


ADDING = triton_backend(forward=forward, backward=backward)
"""The backend of `add_layer_norm`."""
BACKEND = without(ADDING, slice(1, 2))
