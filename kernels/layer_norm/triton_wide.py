"""Triton kernels of `layer_norm` for rows too wide for registers, in tiles of BLOCK columns."""

from __future__ import annotations

from ..triton import jit, tl, two_sum, with_tile


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
    """A row's mean in two parts, and 1 / sqrt(v + eps); sums are relative to its first number."""
    place = tl.arange(0, BLOCK)
    first = tl.sum(_row_tile(x, residual, total, 0, d, 1))
    above = 0.0
    squares = 0.0
    for start in range(0, d, BLOCK):
        inside = start + place < d
        shifted = _row_tile(x, residual, total, start, d, BLOCK) - first
        count = tl.minimum(d - start, BLOCK)
        above, squares = with_tile(shifted, inside, count, start, above, squares)
    mean, rest = two_sum(first, above)
    return mean, rest, tl.div_rn(1.0, tl.sqrt_rn(squares / d + eps))


@jit
def layer_norm_wide_kernel(
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
def layer_norm_wide_backward_kernel(
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
    """Compute dx for one row, and store its statistics for `wide_shares_kernel`."""
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
def wide_shares_kernel(
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
    """Partial dweight and dbias over every num_programs-th row, for one tile of columns."""
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
