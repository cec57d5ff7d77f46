"""The Triton kernel of `cat_linear`: one sum over the features of both tensors."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..triton import cdiv, jit, launch, product, slower_in_fp32, tile, tl, triton_backend
from ..tuning import config
from ..tuning.products import tiles
from ..views import as_rows
from .composed import backward


@jit
def _cat_linear_kernel(
    x: tl.tensor,
    skip: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    rows: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    skip_k: tl.tensor,
    x_stride: tl.tensor,
    skip_stride: tl.tensor,
    weight_stride: tl.tensor,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    row, column, of_row, of_column, inside = tile(rows, n, BLOCK_M, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    x_tile = x + of_row[:, None] * x_stride + inner[None, :]
    skip_tile = skip + of_row[:, None] * skip_stride + inner[None, :]
    w_tile = weight + of_column[None, :].to(tl.int64) * weight_stride + inner[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total = product(total, x_tile, None, w_tile, k, EVEN, BLOCK_K)
    total = product(total, skip_tile, None, w_tile + k, skip_k, EVEN, BLOCK_K)
    if bias is not None:
        total += tl.load(bias + of_column).to(tl.float32)[None, :]
    target = y + row[:, None] * n + column[None, :]
    tl.store(target, total.to(y.dtype.element_ty), inside)


def forward(
    x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None, keep: bool
) -> tuple[Tensor, None]:
    """Return y, contiguous."""
    n, flat, more, weight = weight.shape[0], as_rows(x), as_rows(skip), as_rows(weight)
    y = x.new_empty(*x.shape[:-1], n)
    if y.numel():
        rows, k = flat.shape
        skip_k = more.shape[1]
        chosen = config("cat_linear", x, tiles(rows, n))
        grid = cdiv(n, chosen["BLOCK_N"]), cdiv(rows, chosen["BLOCK_M"])
        launch(
            _cat_linear_kernel, grid,
            flat, more, weight, None if bias is None else bias.contiguous(), y,
            rows, n, k, skip_k, flat.stride(0), more.stride(0), weight.stride(0),
            EVEN=k % chosen["BLOCK_K"] == 0 and skip_k % chosen["BLOCK_K"] == 0, **chosen,
        )  # fmt: skip
    return y, None


BACKEND = replace(triton_backend(forward=forward, backward=backward), slower=slower_in_fp32)
