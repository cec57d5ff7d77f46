"""The Triton kernel of `linear_geglu`: one product with two accumulators, values and gates."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..geglu import triton as geglu
from ..triton import cdiv, jit, launch, slower_in_fp32, tile, tl, triton_backend
from ..tuning import config
from ..tuning.products import tiles
from ..views import as_rows
from .composed import backward_by


@jit
def _linear_geglu_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    rows: tl.tensor,
    d: tl.tensor,
    k: tl.tensor,
    x_stride: tl.tensor,
    weight_stride: tl.tensor,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    row, column, of_row, of_column, inside = tile(rows, d, BLOCK_M, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    x_tile = x + of_row[:, None] * x_stride + inner[None, :]
    w_tile = weight + of_column[None, :].to(tl.int64) * weight_stride + inner[:, None]
    to_gate = d.to(tl.int64) * weight_stride
    values = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    gates = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        if EVEN:
            a = tl.load(x_tile + start)
            wv = tl.load(w_tile + start)
            wg = tl.load(w_tile + to_gate + start)
        else:
            left = inner < k - start
            a = tl.load(x_tile + start, left[None, :], other=0.0)
            wv = tl.load(w_tile + start, left[:, None], other=0.0)
            wg = tl.load(w_tile + to_gate + start, left[:, None], other=0.0)
        values = tl.dot(a, wv, values, input_precision="ieee")
        gates = tl.dot(a, wg, gates, input_precision="ieee")
    if bias is not None:
        values += tl.load(bias + of_column).to(tl.float32)[None, :]
        gates += tl.load(bias + d + of_column).to(tl.float32)[None, :]
    gelu = 0.5 * gates * (1.0 + tl.erf(gates * 0.7071067811865476))
    target = y + row[:, None] * d + column[None, :]
    tl.store(target, (values * gelu).to(y.dtype.element_ty), inside)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool) -> tuple[Tensor, None]:
    """Return y, contiguous."""
    d, flat, weight = weight.shape[0] // 2, as_rows(x), as_rows(weight)
    y = x.new_empty(*x.shape[:-1], d)
    if y.numel():
        rows, k = flat.shape
        chosen = config("linear_geglu", x, tiles(rows, d))
        grid = cdiv(d, chosen["BLOCK_N"]), cdiv(rows, chosen["BLOCK_M"])
        sizes = rows, d, k, flat.stride(0), weight.stride(0)
        bias = None if bias is None else bias.contiguous()
        even = k % chosen["BLOCK_K"] == 0
        launch(_linear_geglu_kernel, grid, flat, weight, bias, y, *sizes, EVEN=even, **chosen)
    return y, None


BACKEND = replace(
    triton_backend(forward=forward, backward=backward_by(geglu.backward)), slower=slower_in_fp32
)
