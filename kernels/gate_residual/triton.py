"""The Triton kernels of `gate_residual`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..triton import cdiv, jit, launch, next_power_of_2, tl, triton_backend
from ..views import as_rows

WIDEST = 1024
"""Most columns of a tile; wider rows are split."""
NUMBERS = 2048
"""Numbers of a tile: two 16-byte loads of half precision per thread and tensor."""
CHUNKS = 64
"""Most partial sums per sample for dgate."""


@jit
def _gate_residual_kernel(
    x: tl.tensor,
    gate: tl.tensor,
    residual: tl.tensor,
    y: tl.tensor,
    rows: tl.tensor,
    length: tl.tensor,
    d: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < d)
    value = tl.load(x + row * x_stride + column, inside, other=0.0).to(tl.float32)
    addend = tl.load(residual + row * residual_stride + column, inside, other=0.0).to(tl.float32)
    factor = tl.load(gate + row // length * d + column, inside, other=0.0).to(tl.float32)
    tl.store(y + row * d + column, (factor * value + addend).to(y.dtype.element_ty), inside)


@jit
def _gate_residual_backward_kernel(
    dy: tl.tensor,
    x: tl.tensor,
    gate: tl.tensor,
    dx: tl.tensor,
    shares: tl.tensor,
    length: tl.tensor,
    d: tl.tensor,
    dy_stride: tl.tensor,
    x_stride: tl.tensor,
    chunks: tl.tensor,
    share: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Compute dx for `share` rows of a sample, ROWS at a time, and their partial sum of dgate."""
    sample = (tl.program_id(0) // chunks).to(tl.int64)
    begin = tl.program_id(0) % chunks * share
    end = tl.minimum(begin + share, length)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    within = column < d
    factor = tl.load(gate + sample * d + column, within, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(begin, end, ROWS):
        t = first + tl.arange(0, ROWS)[:, None]
        row = sample * length + t
        inside = (t < end) & within[None, :]
        gradient = tl.load(dy + row * dy_stride + column[None, :], inside, other=0.0)
        value = tl.load(x + row * x_stride + column[None, :], inside, other=0.0)
        gradient = gradient.to(tl.float32)
        total += gradient * value.to(tl.float32)
        out = factor[None, :] * gradient
        tl.store(dx + row * d + column[None, :], out.to(dx.dtype.element_ty), inside)
    own = shares + tl.program_id(0).to(tl.int64) * d + column
    tl.store(own, tl.sum(total, 0), within)


def _tile(d: int) -> dict[str, int]:
    columns = min(WIDEST, next_power_of_2(d))
    return {"ROWS": max(1, min(16, NUMBERS // columns)), "COLUMNS": columns, "num_warps": 4}


def forward(x: Tensor, gate: Tensor, residual: Tensor, keep: bool) -> tuple[Tensor, None]:
    """Return y, contiguous."""
    _, length, d = x.shape
    y = x.new_empty(x.shape)
    if x.numel():
        flat, addend, tile = as_rows(x), as_rows(residual), _tile(d)
        grid = (cdiv(len(flat), tile["ROWS"]), cdiv(d, tile["COLUMNS"]))
        sizes = len(flat), length, d, flat.stride(0), addend.stride(0)
        launch(_gate_residual_kernel, grid, flat, gate.contiguous(), addend, y, *sizes, **tile)
    return y, None


def backward(
    dy: Tensor, x: Tensor, gate: Tensor, residual: None, needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """Return dx, dgate."""
    n, length, d = x.shape
    dx = x.new_empty(x.shape)
    share = max(1, cdiv(length, CHUNKS))
    chunks = cdiv(length, share)
    make = torch.empty if x.numel() else torch.zeros
    shares = make(n, chunks, d, dtype=torch.float32, device=x.device)
    if x.numel():
        flat, flat_dy, tile = as_rows(x), as_rows(dy), _tile(d)
        launch(
            _gate_residual_backward_kernel,
            (n * chunks, cdiv(d, tile["COLUMNS"])),
            *(flat_dy, flat, gate.contiguous(), dx, shares, length, d),
            *(flat_dy.stride(0), flat.stride(0), chunks, share),
            **tile,
        )
    return dx, shares.sum(1).to(gate.dtype)


BACKEND = triton_backend(forward=forward, backward=backward)
