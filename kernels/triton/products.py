"""Device functions of the ops that are matrix products, x (M, K) times W^T for W (N, K)."""

from __future__ import annotations

from .launches import jit, tl


@jit
def tile(rows: tl.tensor, n: tl.tensor, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr) -> tl.tensor:
    """The rows (int64) and columns of this program's tile of the result, both again with the last
    one in the place of those beyond the edge, so that loads need no mask, and the mask of those
    that exist."""
    row = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < rows)[:, None] & (column < n)[None, :]
    return row, column, tl.minimum(row, rows - 1), tl.minimum(column, n - 1), inside


@jit
def product(
    total: tl.tensor,
    x: tl.tensor,
    addend: tl.tensor,
    weight: tl.tensor,
    k: tl.tensor,
    EVEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """total plus (x + addend) W^T over k features, from pointers to the first tile of each: x and
    addend (or None) (BLOCK_M, BLOCK_K), weight (BLOCK_K, BLOCK_N). EVEN: BLOCK_K divides k."""
    inner = tl.arange(0, BLOCK_K)
    for start in range(0, k, BLOCK_K):
        if EVEN:
            a = tl.load(x + start)
            w = tl.load(weight + start)
            if addend is not None:
                a = rounded_sum(a, tl.load(addend + start))
        else:
            left = inner < k - start
            a = tl.load(x + start, left[None, :], other=0.0)
            w = tl.load(weight + start, left[:, None], other=0.0)
            if addend is not None:
                a = rounded_sum(a, tl.load(addend + start, left[None, :], other=0.0))
        total = tl.dot(a, w, total, input_precision="ieee")
    return total


@jit
def rounded_sum(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """a + b, rounded to their dtype once."""
    return (a.to(tl.float32) + b.to(tl.float32)).to(a.dtype)
