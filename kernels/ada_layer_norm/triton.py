"""The Triton kernels of `ada_layer_norm`: a row stays in registers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..triton import cdiv, jit, launch, next_power_of_2, tl, triton_backend, two_sum
from ..views import as_rows

WIDEST = 8192
"""Longest row that fits in registers."""
CHUNKS = 64
"""Most partial sums per sample for dscale and dshift."""


@jit
def _normed(
    x: tl.tensor, column: tl.tensor, inside: tl.tensor, d: tl.tensor, eps: tl.tensor
) -> tl.tensor:
    """The normalized row and 1 / sqrt(v + eps).

    The row's first number is subtracted before summing, which keeps precision when the mean is
    large and gives exactly 0 for a constant row.
    """
    value = tl.load(x + column, inside, other=0.0).to(tl.float32)
    first = tl.load(x).to(tl.float32)
    mean, rest = two_sum(first, tl.sum(tl.where(inside, value - first, 0.0)) / d)
    centered = tl.where(inside, value - mean - rest, 0.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(centered * centered) / d + eps))
    return centered * rstd, rstd


@jit
def _ada_layer_norm_kernel(
    x: tl.tensor,
    scale: tl.tensor,
    shift: tl.tensor,
    y: tl.tensor,
    length: tl.tensor,
    d: tl.tensor,
    x_stride: tl.tensor,
    eps: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < d
    normed, _ = _normed(x + row * x_stride, column, inside, d, eps)
    own = row // length * d + column
    factor = 1.0 + tl.load(scale + own, inside, other=0.0).to(tl.float32)
    out = normed * factor + tl.load(shift + own, inside, other=0.0).to(tl.float32)
    tl.store(y + row * d + column, out.to(y.dtype.element_ty), inside)


@jit
def _ada_layer_norm_backward_kernel(
    dy: tl.tensor,
    x: tl.tensor,
    scale: tl.tensor,
    dx: tl.tensor,
    shares: tl.tensor,
    length: tl.tensor,
    d: tl.tensor,
    dy_stride: tl.tensor,
    x_stride: tl.tensor,
    eps: tl.tensor,
    chunks: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Compute dx for ROWS rows of a sample, and their partial sums of dscale and dshift."""
    sample = (tl.program_id(0) // chunks).to(tl.int64)
    begin = tl.program_id(0) % chunks * ROWS
    column = tl.arange(0, BLOCK)
    inside = column < d
    factor = 1.0 + tl.load(scale + sample * d + column, inside, other=0.0).to(tl.float32)
    dscale = tl.zeros([BLOCK], tl.float32)
    dshift = tl.zeros([BLOCK], tl.float32)
    for t in range(begin, tl.minimum(begin + ROWS, length)):
        row = sample * length + t
        normed, rstd = _normed(x + row * x_stride, column, inside, d, eps)
        gradient = tl.load(dy + row * dy_stride + column, inside, other=0.0).to(tl.float32)
        dscale += gradient * normed
        dshift += gradient
        gradient *= tl.where(inside, factor, 0.0)
        level, along = tl.sum(gradient) / d, tl.sum(gradient * normed) / d
        out = rstd * (gradient - level - normed * along)
        tl.store(dx + row * d + column, out.to(dx.dtype.element_ty), inside)
    share = shares + tl.program_id(0).to(tl.int64) * (2 * d) + column
    tl.store(share, dscale, inside)
    tl.store(share + d, dshift, inside)


def _constants(d: int) -> dict[str, int]:
    block = next_power_of_2(d)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 256))}


def forward(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, keep: bool = False
) -> tuple[Tensor, None]:
    """Return y, contiguous."""
    _, length, d = x.shape
    y = x.new_empty(x.shape)
    if x.numel():
        flat = as_rows(x)
        own = scale.contiguous(), shift.contiguous()
        sizes = length, d, flat.stride(0), eps
        launch(_ada_layer_norm_kernel, (len(flat),), flat, *own, y, *sizes, **_constants(d))
    return y, None


def backward(
    dy: Tensor, x: Tensor, scale: Tensor, shift: Tensor, eps: float, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, dscale, dshift."""
    n, length, d = x.shape
    dx = x.new_empty(x.shape)
    rows = max(1, cdiv(length, CHUNKS))
    chunks = cdiv(length, rows)
    shares = torch.zeros(n, chunks, 2, d, dtype=torch.float32, device=x.device)
    if x.numel():
        flat, flat_dy = as_rows(x), as_rows(dy)
        launch(
            _ada_layer_norm_backward_kernel,
            (n * chunks,),
            *(flat_dy, flat, scale.contiguous(), dx, shares, length, d),
            *(flat_dy.stride(0), flat.stride(0), eps, chunks),
            ROWS=rows,
            **_constants(d),
        )
    dscale, dshift = (shares[:, :, i].sum(1) for i in range(2))
    return dx, dscale.to(scale.dtype), dshift.to(shift.dtype)


def why_not(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> str | None:
    """Why the kernels cannot run this call, or None if they can."""
    if x.shape[2] > WIDEST:
        return f"it supports rows of up to {WIDEST} elements, got {x.shape[2]}"
    return None


BACKEND = triton_backend(forward=forward, backward=backward, why_not=why_not)
