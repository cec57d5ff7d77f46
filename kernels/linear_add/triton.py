"""The Triton kernel of `linear_add`: a product of tiles that are sums, with a residual."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..triton import cdiv, jit, launch, product, slower_in_fp32, tile, tl, triton_backend
from ..tuning import config
from ..tuning.products import tiles
from ..views import as_rows
from .composed import backward


@jit
def _linear_add_kernel(
    x: tl.tensor,
    addend: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    y: tl.tensor,
    rows: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    x_stride: tl.tensor,
    addend_stride: tl.tensor,
    weight_stride: tl.tensor,
    residual_stride: tl.tensor,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    row, column, of_row, of_column, inside = tile(rows, n, BLOCK_M, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)[None, :]
    x_tile = x + of_row[:, None] * x_stride + inner
    addend_tile = None if addend is None else addend + of_row[:, None] * addend_stride + inner
    w_tile = (
        weight + of_column[None, :].to(tl.int64) * weight_stride + tl.arange(0, BLOCK_K)[:, None]
    )
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total = product(total, x_tile, addend_tile, w_tile, k, EVEN, BLOCK_K)
    if bias is not None:
        total += tl.load(bias + of_column).to(tl.float32)[None, :]
    if residual is not None:
        place = residual + row[:, None] * residual_stride + column[None, :]
        total += tl.load(place, inside, other=0.0).to(tl.float32)
    target = y + row[:, None] * n + column[None, :]
    tl.store(target, total.to(y.dtype.element_ty), inside)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    addend: Tensor | None,
    residual: Tensor | None,
    keep: bool,
) -> tuple[Tensor, None]:
    """Return y, contiguous."""
    n, flat, weight = weight.shape[0], as_rows(x), as_rows(weight)
    y = x.new_empty(*x.shape[:-1], n)
    if y.numel():
        rows, k = flat.shape
        more = None if addend is None else as_rows(addend)
        after = None if residual is None else as_rows(residual)
        chosen = config("linear_add", x, tiles(rows, n))
        grid = cdiv(n, chosen["BLOCK_N"]), cdiv(rows, chosen["BLOCK_M"])
        launch(
            _linear_add_kernel, grid,
            flat, more, weight, None if bias is None else bias.contiguous(), after, y,
            rows, n, k,
            flat.stride(0), _stride(more), weight.stride(0), _stride(after),
            EVEN=k % chosen["BLOCK_K"] == 0, **chosen,
        )  # fmt: skip
    return y, None


def _stride(rows: Tensor | None) -> int:
    return 0 if rows is None else rows.stride(0)


BACKEND = replace(triton_backend(forward=forward, backward=backward), slower=slower_in_fp32)
