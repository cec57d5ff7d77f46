"""LayerNorm over the last dimension, alone or after a residual addition.

    total = x + residual                                          rounded to the dtype of x
    y     = (total - m) / sqrt(v + eps) * weight + bias           Ba et al. 2016, eq. 3-4
    m, v  = mean and biased variance of a row of D numbers

Bytes that must move: 2 * rows * D * itemsize; with the addition 4 (x and residual in, total and y
out), eager 5. Statistics are fp32 (fp64 for fp64 input).

Backward, with m and v computed again (nothing but x, or total, is kept):

    g  = dy * weight,   n = (x - m) / sqrt(v + eps)
    dx = (g - mean(g) - n mean(g n)) / sqrt(v + eps) + dtotal
    dweight = sum over rows of dy n,   dbias = sum over rows of dy

Bytes: 3 * rows * D * itemsize (x and dy in, dx out), 4 with dtotal. dweight and dbias are summed in
two steps, without atomics: each of P programs adds up every P-th tile of rows, then a second kernel
adds the P shares in order. Each of the two adds 8 * P * D bytes, written and read in the L2 cache.

A row of up to 4096 numbers stays in registers: one read. Wider ones (no model has them) are read
twice (x and residual), by the backward pass 3 times (x; dy twice), and once more each for dweight
and dbias.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.kernels import extension
from fastdiff.kernels._triton import (
    Config,
    Tunable,
    as_rows,
    cdiv,
    config,
    define_tunable,
    jit,
    launch,
    next_power_of_2,
    register,
    tl,
    why_not,
)
from fastdiff.kernels.dispatch import check_floating, check_shape, compute_dtype, define_op


def layer_norm_reference(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5
) -> Tensor:
    """The op in plain PyTorch; see `layer_norm`."""
    dtype = compute_dtype(x)
    weight, bias = (None if p is None else p.to(dtype) for p in (weight, bias))
    wide = x.to(dtype)
    # LayerNorm and its gradient do not change when a row is shifted: this keeps the digits where
    # the mean is large, and makes a constant row exactly 0
    first = wide.detach()[..., :1]
    mean = first + (wide.detach() - first).mean(-1, keepdim=True)
    centered = wide - mean
    return F.layer_norm(centered, x.shape[-1:], weight, bias, eps).to(x.dtype)


def add_layer_norm_reference(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """The op in plain PyTorch; see `add_layer_norm`."""
    dtype = compute_dtype(x)
    total = (x.to(dtype) + residual.to(dtype)).to(x.dtype)
    return layer_norm_reference(total, weight, bias, eps=eps), total


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
    # a vector, not a column of the tile: each thread of a tile would load it for all its numbers
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
def _two_sum(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """a + b rounded, and what the rounding took off (Knuth 1969, TAOCP 4.2.2, theorem B)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


@jit
def _normed(
    value: tl.tensor, first: tl.tensor, inside: tl.tensor, d: tl.tensor, eps: tl.tensor
) -> tl.tensor:
    """Rows minus their means, 0 outside; 1 / sqrt(v + eps). Sums are taken above the first number
    of a row: exact where the mean is large, exactly 0 in a constant row."""
    above = tl.sum(tl.where(inside, value - first, 0.0), 1, keep_dims=True) / d
    mean, rest = _two_sum(first, above)
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
    num_programs-th tile of rows; this program's share of dweight and dbias."""
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
    """Add up (shares, D) fp32, always in the same order."""
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


# Rows too wide for registers, in tiles of BLOCK columns


@jit
def _row_tile(
    x: tl.tensor,
    residual: tl.tensor,
    total: tl.tensor,
    start: tl.tensor,
    d: tl.tensor,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Columns of one row of x, or of x + residual rounded to the dtype of total, in fp32."""
    column = start + tl.arange(0, BLOCK)
    value = tl.load(x + column, column < d, other=0.0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + column, column < d, other=0.0).to(tl.float32)
        value = value.to(total.dtype.element_ty).to(tl.float32)
    return value


@jit
def _row_statistics(
    x: tl.tensor,
    residual: tl.tensor,
    total: tl.tensor,
    d: tl.tensor,
    eps: tl.tensor,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """A row's mean in two parts, and 1 / sqrt(v + eps); tiles are merged by Chan et al. 1979, eq.
    2.1, and summed above the row's first number as in `_normed`."""
    place = tl.arange(0, BLOCK)
    first = tl.sum(_row_tile(x, residual, total, 0, d, 1))
    above = 0.0
    squares = 0.0
    for start in range(0, d, BLOCK):
        inside = start + place < d
        shifted = tl.where(inside, _row_tile(x, residual, total, start, d, BLOCK) - first, 0.0)
        count = tl.minimum(d - start, BLOCK)
        tile_mean = tl.sum(shifted) / count
        apart = tl.where(inside, shifted - tile_mean, 0.0)
        delta = tile_mean - above
        share = count.to(tl.float32) / (start + count)
        squares += tl.sum(apart * apart) + delta * delta * share * start
        above += delta * share
    mean, rest = _two_sum(first, above)
    return mean, rest, tl.div_rn(1.0, tl.sqrt_rn(squares / d + eps))


@jit
def _layer_norm_wide_kernel(
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
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    y += row * d
    if residual is not None:
        residual += row * residual_stride
        total += row * d
    mean, rest, rstd = _row_statistics(x, residual, total, d, eps, BLOCK)
    for start in range(0, d, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < d
        value = _row_tile(x, residual, total, start, d, BLOCK)
        if residual is not None:
            tl.store(total + column, value.to(total.dtype.element_ty), inside)
        out = (value - mean - rest) * rstd
        if weight is not None:
            out *= tl.load(weight + column, inside, other=0.0).to(tl.float32)
        if bias is not None:
            out += tl.load(bias + column, inside, other=0.0).to(tl.float32)
        tl.store(y + column, out.to(y.dtype.element_ty), inside)


@jit
def _layer_norm_wide_backward_kernel(
    dy: tl.tensor,
    dtotal: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    dx: tl.tensor,
    statistics: tl.tensor,
    rows: tl.tensor,
    d: tl.tensor,
    dy_stride: tl.tensor,
    dtotal_stride: tl.tensor,
    x_stride: tl.tensor,
    eps: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """dx of one row, and its statistics for `_wide_shares_kernel`."""
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    dy += row * dy_stride
    mean, rest, rstd = _row_statistics(x, None, None, d, eps, BLOCK)
    place = tl.arange(0, BLOCK)
    sum_along = tl.zeros([BLOCK], tl.float32)
    sum_gradient = tl.zeros([BLOCK], tl.float32)
    for start in range(0, d, BLOCK):
        column = start + place
        normed = (_row_tile(x, None, None, start, d, BLOCK) - mean - rest) * rstd
        gradient = tl.load(dy + column, column < d, other=0.0).to(tl.float32)
        if weight is not None:
            gradient *= tl.load(weight + column, column < d, other=0.0).to(tl.float32)
        sum_along += gradient * normed
        sum_gradient += gradient
    along, mean_gradient = tl.sum(sum_along) / d, tl.sum(sum_gradient) / d
    for start in range(0, d, BLOCK):
        column = start + place
        normed = (_row_tile(x, None, None, start, d, BLOCK) - mean - rest) * rstd
        gradient = tl.load(dy + column, column < d, other=0.0).to(tl.float32)
        if weight is not None:
            gradient *= tl.load(weight + column, column < d, other=0.0).to(tl.float32)
        out = rstd * (gradient - mean_gradient - normed * along)
        if dtotal is not None:
            source = dtotal + row * dtotal_stride + column
            out += tl.load(source, column < d, other=0.0).to(tl.float32)
        tl.store(dx + row * d + column, out.to(dx.dtype.element_ty), column < d)
    tl.store(statistics + 3 * row, mean)
    tl.store(statistics + 3 * row + 1, rest)
    tl.store(statistics + 3 * row + 2, rstd)


@jit
def _wide_shares_kernel(
    dy: tl.tensor,
    x: tl.tensor,
    statistics: tl.tensor,
    dweights: tl.tensor,
    dbiases: tl.tensor,
    rows: tl.tensor,
    d: tl.tensor,
    dy_stride: tl.tensor,
    x_stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """The share of every num_programs-th row in dweight and dbias, for one tile of columns."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < d
    dweight = tl.zeros([BLOCK], tl.float32)
    dbias = tl.zeros([BLOCK], tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        place = row + tl.zeros([1], tl.int64)
        gradient = tl.load(dy + place * dy_stride + column, inside, other=0.0).to(tl.float32)
        value = tl.load(x + place * x_stride + column, inside, other=0.0).to(tl.float32)
        mean, rest = tl.load(statistics + 3 * row), tl.load(statistics + 3 * row + 1)
        dweight += gradient * ((value - mean - rest) * tl.load(statistics + 3 * row + 2))
        dbias += gradient
    target = tl.program_id(0).to(tl.int64) * d + column
    if dweights is not None:
        tl.store(dweights + target, dweight, inside)
    if dbiases is not None:
        tl.store(dbiases + target, dbias, inside)


# Launchers

WIDEST = 4096
"""The longest row that is held in registers."""


def _shape_class(d: int) -> str:
    """By the power of two that holds a row."""
    return next((str(width) for width in (512, 1024, 2048, WIDEST) if d <= width), "wide")


def _block(d: int, chosen: Config) -> tuple[dict[str, int], int]:
    """The constants of a kernel of whole rows, and how many rows one tile has."""
    block = next_power_of_2(d)
    rows = max(1, chosen["ELEMENTS"] // block)
    return {"ROWS": rows, "BLOCK": block, "num_warps": chosen["num_warps"]}, rows


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    y = x.new_empty(x.shape)
    total = None if residual is None else x.new_empty(x.shape)
    if x.numel() == 0:
        return y, total
    d, shape_class = x.shape[-1], _shape_class(x.shape[-1])
    flat, addend = as_rows(x), None if residual is None else as_rows(residual)
    strides = flat.stride(0), 0 if addend is None else addend.stride(0)
    weight, bias = (None if p is None else p.contiguous() for p in (weight, bias))
    arguments = flat, addend, weight, bias, y, total, len(flat), d, *strides, eps
    chosen = config("layer_norm", x, shape_class)
    if shape_class == "wide":
        block, warps = chosen["ELEMENTS"], chosen["num_warps"]
        launch(_layer_norm_wide_kernel, (len(flat),), *arguments, BLOCK=block, num_warps=warps)
    else:
        constants, rows = _block(d, chosen)
        launch(_layer_norm_kernel, (cdiv(len(flat), rows),), *arguments, **constants)
    return y, total


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return _forward(x, None, weight, bias, eps)[0]


def _add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    y, total = _forward(x, residual, weight, bias, eps)
    assert total is not None
    return y, total


def _layer_norm_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, and dweight and dbias where `needs` (for weight, for bias) says so, else empty.

    x is what was normed; dtotal is added to its gradient.
    """
    d, shape_class = x.shape[-1], _shape_class(x.shape[-1])
    dx, dweight, dbias = _gradients(x, weight, bias, needs)
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
        launch(_layer_norm_wide_backward_kernel, (len(flat),), *arguments, **constants)
        if any(needs):
            grid = programs, cdiv(d, chosen["ELEMENTS"])
            arguments = flat_dy, flat, statistics, *shares, len(flat), d, strides[0], strides[2]
            launch(_wide_shares_kernel, grid, *arguments, **constants)
    else:
        arguments = (*inputs, *shares, len(flat), d, *strides, eps)
        count = programs if any(needs) else tiles
        launch(_layer_norm_backward_kernel, (count,), *arguments, **constants)
    if any(needs):
        outputs = (out if need else None for out, need in zip((dweight, dbias), needs, strict=True))
        arguments = *shares, *outputs, programs, d
        launch(_sum_shares_kernel, (cdiv(d, 32),), *arguments, ROWS=64, COLUMNS=32)
    return dx, dweight, dbias


def _gradients(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for dx, dweight and dbias; the last two are empty where nobody needs them."""
    dweight, dbias = (
        torch.empty(
            x.shape[-1] if need else 0, dtype=x.dtype if p is None else p.dtype, device=x.device
        )
        for p, need in zip((weight, bias), needs, strict=True)
    )
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), dweight, dbias


def _candidates(shape_class: str, dtype: torch.dtype) -> Iterator[Config]:
    elements = (4096, 8192) if shape_class == "wide" else (1024, 2048, 4096, 8192)
    for count in elements:
        for warps in (1, 2, 4, 8, 16):
            if 8 <= count // (32 * warps) <= 32:
                yield {"ELEMENTS": count, "num_warps": warps}


def _backward_candidates(shape_class: str, dtype: torch.dtype) -> Iterator[Config]:
    for candidate in _candidates(shape_class, dtype):
        for programs in (132, 264, 528):
            yield {**candidate, "PROGRAMS": programs}


SHAPES = {"512": (8192, 320), "1024": (2048, 640), "2048": (512, 1280), "4096": (154, 4096)}
"""Rows and D: SD 1.5's levels with guidance at 64 x 64 latents; a T5 encoder's."""


def _arguments(shape_class: str, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    rows, d = SHAPES.get(shape_class, (64, 20000))
    sizes = ((rows, d), (rows, d), (d,), (d,))
    x, other, weight, bias = (torch.empty(size, dtype=dtype, device=device) for size in sizes)
    return x, other, weight, bias


def _calls(shape_class: str, dtype: torch.dtype, device: str) -> list[Callable[[], Any]]:
    x, residual, weight, bias = _arguments(shape_class, dtype, device)
    calls: list[Callable[[], Any]] = [lambda: _layer_norm(x, weight, bias, 1e-5)]
    if shape_class in ("2048", "wide"):
        calls.append(lambda: _layer_norm(x, None, None, 1e-6))  # DiT
        calls.append(lambda: _add_layer_norm(x, residual, weight, bias, 1e-5))
    return calls


def _backward_calls(shape_class: str, dtype: torch.dtype, device: str) -> list[Callable[[], Any]]:
    x, dy, weight, bias = _arguments(shape_class, dtype, device)
    calls = [lambda: _layer_norm_backward(dy, None, x, weight, bias, 1e-5, [True, True])]
    if shape_class in ("2048", "wide"):
        calls.append(lambda: _layer_norm_backward(dy, dy, x, None, None, 1e-6, [False, False]))
    return calls


for _name, _make, _search in (
    ("layer_norm", _calls, _candidates),
    ("layer_norm_backward", _backward_calls, _backward_candidates),
):
    define_tunable(
        Tunable(name=_name, shape_classes=(*SHAPES, "wide"), candidates=_search, calls=_make)
    )

# Registration

layer_norm_triton = torch.library.custom_op(
    "fastdiff::layer_norm_triton", _layer_norm, mutates_args=()
)
add_layer_norm_triton = torch.library.custom_op(
    "fastdiff::add_layer_norm_triton", _add_layer_norm, mutates_args=()
)
layer_norm_backward_triton = torch.library.custom_op(
    "fastdiff::layer_norm_backward_triton", _layer_norm_backward, mutates_args=()
)


@layer_norm_triton.register_fake
def _layer_norm_fake(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@add_layer_norm_triton.register_fake
def _add_layer_norm_fake(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@layer_norm_backward_triton.register_fake
def _layer_norm_backward_fake(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(x, weight, bias, needs)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(x, weight, bias)


def _keep_total(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, residual, weight, bias, ctx.eps = inputs
    ctx.residual_dtype = residual.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], weight, bias)


def _backward(
    ctx: Any, dy: Tensor, dtotal: Tensor | None, backward: Any = layer_norm_backward_triton
) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[-3:-1])
    dx, dweight, dbias = backward(dy, dtotal, x, weight, bias, ctx.eps, needs)
    return dx, dweight if needs[0] else None, dbias if needs[1] else None


def _layer_norm_autograd(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(ctx, dy, None), None


def _add_layer_norm_autograd(
    ctx: Any, dy: Tensor | None, dtotal: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Either gradient is None where nothing depends on that output."""
    dx, dweight, dbias = (dtotal, None, None) if dy is None else _backward(ctx, dy, dtotal)
    dresidual = None if dx is None else dx.to(ctx.residual_dtype)
    return dx, dresidual, dweight, dbias, None


layer_norm_triton.register_autograd(_layer_norm_autograd, setup_context=_keep)
add_layer_norm_triton.register_autograd(_add_layer_norm_autograd, setup_context=_keep_total)

_layer_norm_op = define_op("layer_norm", layer_norm_reference)
_add_layer_norm_op = define_op("add_layer_norm", add_layer_norm_reference)


def _objection(*tensors: Tensor | None, eps: float) -> str | None:
    return why_not(*tensors)


register(_layer_norm_op, layer_norm_triton, _objection)
register(_add_layer_norm_op, add_layer_norm_triton, _objection)


# CPU


def _forward_native(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    y = torch.empty(x.shape, dtype=x.dtype)
    total = None if residual is None else torch.empty(x.shape, dtype=x.dtype)
    if x.numel() == 0:
        return y, total
    flat, addend, wide = as_rows(x), None, False
    if residual is not None:
        addend = as_rows(extension.as_dtype_or_float(residual, x.dtype))
        wide = addend.dtype is not x.dtype
    weight, bias = extension.as_float(weight), extension.as_float(bias)
    address = extension.address
    tensors = address(flat), address(addend), address(total), address(y)
    extension.native.layer_norm(
        *(extension.DTYPES[x.dtype], wide, *tensors, address(weight), address(bias)),
        *(len(flat), x.shape[-1], flat.stride(0), 0 if addend is None else addend.stride(0), eps),
    )
    return y, total


def _layer_norm_native(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5
) -> Tensor:
    return _forward_native(x, None, weight, bias, eps)[0]


def _add_layer_norm_native(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    y, total = _forward_native(x, residual, weight, bias, eps)
    assert total is not None
    return y, total


@torch.library.custom_op("fastdiff::layer_norm_cpu", mutates_args=(), device_types="cpu")
def layer_norm_cpu(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return _layer_norm_native(x, weight, bias, eps=eps)


@torch.library.custom_op("fastdiff::add_layer_norm_cpu", mutates_args=(), device_types="cpu")
def add_layer_norm_cpu(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return _add_layer_norm_native(x, residual, weight, bias, eps=eps)


@torch.library.custom_op("fastdiff::layer_norm_backward_cpu", mutates_args=(), device_types="cpu")
def layer_norm_backward_cpu(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_layer_norm_backward`."""
    dx, dweight, dbias = _gradients(x, weight, bias, needs)
    if x.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_()
    flat, flat_dy = as_rows(x), as_rows(dy)
    flat_dtotal = None if dtotal is None else as_rows(dtotal)
    sums = [torch.empty(x.shape[-1] if need else 0) for need in needs]
    weight, address = extension.as_float(weight), extension.address
    tensors = address(flat_dy), address(flat_dtotal), address(flat), address(dx), address(weight)
    strides = flat_dy.stride(0), 0 if flat_dtotal is None else flat_dtotal.stride(0), flat.stride(0)
    extension.native.layer_norm_backward(
        *(extension.DTYPES[x.dtype], *tensors, address(sums[0]), address(sums[1])),
        *(len(flat), x.shape[-1], *strides, eps),
    )
    return dx, dweight.copy_(sums[0]), dbias.copy_(sums[1])


layer_norm_cpu.register_fake(_layer_norm_fake)
add_layer_norm_cpu.register_fake(_add_layer_norm_fake)
layer_norm_backward_cpu.register_fake(_layer_norm_backward_fake)


def _backward_native(ctx: Any, dy: Tensor, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
    if not torch.is_grad_enabled():
        return _backward(ctx, dy, dtotal, layer_norm_backward_cpu)
    reference = partial(layer_norm_reference, eps=ctx.eps)
    dx, *others = extension.reference_gradients(reference, ctx.saved_tensors, (dy,))
    return dx if dtotal is None or dx is None else dx + dtotal, *others


def _layer_norm_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward_native(ctx, dy, None), None


def _add_layer_norm_gradient(
    ctx: Any, dy: Tensor | None, dtotal: Tensor | None
) -> tuple[Tensor | None, ...]:
    dx, dweight, dbias = (dtotal, None, None) if dy is None else _backward_native(ctx, dy, dtotal)
    dresidual = None if dx is None else dx.to(ctx.residual_dtype)
    return dx, dresidual, dweight, dbias, None


layer_norm_cpu.register_autograd(_layer_norm_gradient, setup_context=_keep)
add_layer_norm_cpu.register_autograd(_add_layer_norm_gradient, setup_context=_keep_total)
extension.register(_layer_norm_op, _layer_norm_native, layer_norm_cpu)
extension.register(_add_layer_norm_op, _add_layer_norm_native, add_layer_norm_cpu)


def _check(op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    check_floating(op, "x", x)
    if x.ndim < 1:
        raise ValueError(
            f"{op}: x must be (..., D), got a scalar; give it a dimension to norm over"
        )
    check_shape(op, "weight", weight, (x.shape[-1],))
    check_shape(op, "bias", bias, (x.shape[-1],))


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5
) -> Tensor:
    """LayerNorm over the last dimension: ``(x - mean) / sqrt(var + eps) * weight + bias``.

    Args:
        x: (..., D), fp64/fp32/fp16/bf16, any strides.
        weight, bias: (D,), any float dtype, or None for 1 and 0.
        eps: added to the variance.

    Returns:
        (..., D) in the dtype of x. Differentiable in every tensor.

    Raises:
        ValueError: a shape or dtype that does not fit.

    Ba et al. 2016 (Layer Normalization), eq. 3-4.
    """
    _check("layer_norm", x, weight, bias)
    result: Tensor = _layer_norm_op(x, weight, bias, eps=eps)
    return result


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Add, then norm: ``total = x + residual``, ``y = layer_norm(total, weight, bias)``.

    Args:
        x, residual: (..., D), fp64/fp32/fp16/bf16, any strides.
        weight, bias, eps: as in `layer_norm`.

    Returns:
        (y, total), both (..., D) in the dtype of x; y is the norm of the rounded total.

    Raises:
        ValueError: a shape or dtype that does not fit.
    """
    _check("add_layer_norm", x, weight, bias)
    check_shape("add_layer_norm", "residual", residual, tuple(x.shape))
    result: tuple[Tensor, Tensor] = _add_layer_norm_op(x, residual, weight, bias, eps=eps)
    return result
