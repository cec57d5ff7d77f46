"""The forward pass of `group_norm_silu` and `add_group_norm_silu` in Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from ..triton import jit, launch, merged, silu, tl
from ..views import all_contiguous, memory_format_of, rows_apart
from .triton_tiles import (
    affine,
    groups_of,
    load_tile,
    mean_and_rstd,
    numbers_of,
    of_columns,
    parts_regime,
    shape_of,
    slices,
    small_regime,
    split_small,
    sums_of_groups,
)


@jit
def _inverse_sqrt(x: tl.tensor) -> tl.tensor:
    """1 / sqrt(x): a GPU's rsqrt is accurate to 2 ulp; one Newton step makes that 1."""
    guess = tl.rsqrt(x)
    better = guess + 0.5 * guess * (1.0 - x * guess * guess)
    return tl.where(guess > 0, better, guess)  # 0 where x is infinite


@jit
def _load_sum(
    x: tl.tensor,
    residual: tl.tensor,
    channel_add: tl.tensor,
    total: tl.tensor,
    base: tl.tensor,
    place: tl.tensor,
    inside: tl.tensor,
    channel_place: tl.tensor,
    known: tl.tensor,
    STORE: tl.constexpr = True,
) -> tl.tensor:
    """Load x in fp32; with addends, store their sum to `total` and return it as rounded there.

    Values that are not read again are evicted from the L2 first.
    """
    numbers = load_tile(x + base + place, inside, "" if total is None else "evict_first")
    if channel_add is not None:
        numbers += tl.load(channel_add + channel_place, known, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        numbers += load_tile(residual + base + place, inside, "evict_first")
    if total is not None:
        rounded = numbers.to(total.dtype.element_ty)
        if STORE:
            tl.store(total + base + place, rounded, inside)
        numbers = rounded.to(tl.float32)
    return numbers


@jit
def _small_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    channel_add: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    scale_shift: tl.tensor,
    y: tl.tensor,
    total: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    space: tl.tensor,
    channels: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    channel_add_stride: tl.tensor,
    eps: tl.tensor,
    CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FULL: tl.constexpr,
    WHOLE: tl.constexpr,
    SPLIT: tl.constexpr,
    SILU: tl.constexpr,
) -> None:
    """Compute y for CHANNELS channels (whole groups) of one sample, entirely in registers.

    SPLIT programs compute the same statistics, and each its share of the rows of y.
    FULL: all rows of the tile are inside, WHOLE: all of the tile is.
    """
    part = tl.program_id(0) % SPLIT
    tiles = tl.cdiv(channels, CHANNELS)
    sample = (tl.program_id(0) // SPLIT // tiles).to(tl.int64)
    begin = tl.program_id(0) // SPLIT % tiles * CHANNELS
    column = tl.arange(0, COLUMNS)
    channel = begin + column
    row = tl.arange(0, ROWS)
    known = (column < CHANNELS) & (channel < channels)
    inside = None if WHOLE else (row < space)[:, None] & known[None, :]
    base = sample * space * channels + begin * column_stride
    place = row[:, None] * row_stride + column[None, :] * column_stride
    channel_place = sample * channel_add_stride + channel
    numbers = _load_sum(
        x, residual, channel_add, total, base, place, inside, channel_place, known, SPLIT == 1
    )
    scale, shift = affine(weight, bias, scale_shift, sample, channel, channels, known)

    # outside of its groups a tile is 0, and so must the deviations be
    member = ((column // SIZE)[:, None] == tl.arange(0, GROUPS)[None, :]) & known[:, None]
    share = 1.0 / (space * (1.0 * SIZE))
    if channel_add is not None and not FULL:
        numbers = tl.where(inside, numbers, 0.0)
    center = sums_of_groups(numbers, member, GROUPS) * share
    of_column = of_columns(center, member)
    centered = numbers - of_column[None, :]
    if not FULL:
        centered = tl.where(inside, centered, 0.0)
    # the rounding error of the mean, which matters when the mean is large against the deviation
    rest = sums_of_groups(centered, member, GROUPS) * share
    squares = sums_of_groups(centered * centered, member, GROUPS)
    inverse = _inverse_sqrt(tl.maximum(squares * share - rest * rest, 0.0) + eps)
    scale *= of_columns(inverse, member)
    shift -= of_columns(rest, member) * scale
    if SPLIT > 1:  # what it loads again is in the L1 or L2
        row = part * (ROWS // SPLIT) + tl.arange(0, ROWS // SPLIT)
        inside = None if WHOLE else (row < space)[:, None] & known[None, :]
        place = row[:, None] * row_stride + column[None, :] * column_stride
        numbers = _load_sum(
            x, residual, channel_add, total, base, place, inside, channel_place, known
        )
        centered = numbers - of_column[None, :]
    result = centered * scale[None, :] + shift[None, :]
    if SILU:
        result = silu(result)
    tl.store(y + base + place, result.to(y.dtype.element_ty), inside)

    group = begin // SIZE + tl.arange(0, GROUPS)
    valid = (tl.arange(0, GROUPS) * SIZE < CHANNELS) & (group * SIZE < channels) & (part == 0)
    target = sample * (channels // SIZE) + group
    tl.store(mean + target, center + rest, valid)
    tl.store(rstd + target, inverse, valid)


@jit
def _store_moments(
    moments: tl.tensor,
    mean: tl.tensor,
    squares: tl.tensor,
    seen: tl.tensor,
    sample: tl.tensor,
    chunk: tl.tensor,
    tile: tl.tensor,
    channel: tl.tensor,
    channels: tl.tensor,
    chunks: tl.tensor,
    COLUMNS: tl.constexpr,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    """Merge the moments of a tile's channels, of `seen` numbers each, by group, and store them."""
    groups = channels // SIZE
    group = groups_of(tile, SIZE, GROUPS, COLUMNS)
    member = ((channel // SIZE)[:, None] == group[None, :]) & (channel < channels)[:, None]
    counts = tl.where(member, seen.to(tl.float32), 0.0)
    count = numbers_of(group, tile, seen, channels, SIZE, COLUMNS)
    squares = tl.where(member, squares[:, None], 0.0)
    mean, squares = merged(counts, mean[:, None], squares, tl.maximum(count, 1.0))

    parts = chunks * PARTS
    target = moments + sample * groups * (2 * parts)
    target += group * (2 * parts) + chunk * PARTS + tile - group * SIZE // COLUMNS
    tl.store(target, mean, count > 0)
    tl.store(target + parts, squares, count > 0)


@jit
def _more_sums(
    x: tl.tensor,
    residual: tl.tensor,
    channel_add: tl.tensor,
    total: tl.tensor,
    base: tl.tensor,
    place: tl.tensor,
    inside: tl.tensor,
    channel_place: tl.tensor,
    known: tl.tensor,
    pivot: tl.tensor,
    sums: tl.tensor,
    squares: tl.tensor,
) -> tl.tensor:
    """Load a tile, and add its distances from the pivots, and their squares."""
    numbers = _load_sum(x, residual, channel_add, total, base, place, inside, channel_place, known)
    apart = numbers - pivot
    if inside is not None:
        apart = tl.where(inside, apart, 0.0)
    return sums + apart, squares + apart * apart


@jit
def _moments_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    channel_add: tl.tensor,
    total: tl.tensor,
    moments: tl.tensor,
    space: tl.tensor,
    channels: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    channel_add_stride: tl.tensor,
    chunks: tl.tensor,
    steps: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNROLL: tl.constexpr,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    PARTS: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    """Mean and sum of centered squares of each group's part in a tile's COLUMNS channels and a
    chunk of space, which is `steps` times UNROLL tiles.

    Each element of the tile sums up its distances from its first number, and their squares. Of n
    numbers x_i around their mean m, sum (x_i - x_1)^2 <= n sum (x_i - m)^2, so the difference that
    is left of the squares loses at most log2(n) bits, and n is the number of tiles. Elements, then
    channels are merged at the end (Chan).
    """
    tiles = tl.cdiv(channels, COLUMNS)
    tile = tl.program_id(0) % tiles
    chunk = tl.program_id(0) // tiles % chunks
    sample = (tl.program_id(0) // tiles // chunks).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    channel = tile * COLUMNS + column
    known = channel < channels
    begin = chunk * steps * (UNROLL * ROWS)
    own = tl.minimum(steps, tl.cdiv(space - begin, UNROLL * ROWS))
    row = tl.arange(0, ROWS)
    base = sample * space * channels + tile.to(tl.int64) * COLUMNS * column_stride
    base += begin.to(tl.int64) * row_stride
    place = row[:, None] * row_stride + column[None, :] * column_stride
    channel_place = sample * channel_add_stride + channel
    inside = None if WHOLE else (begin + row < space)[:, None] & known[None, :]
    pivot = _load_sum(x, residual, channel_add, total, base, place, inside, channel_place, known)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in tl.static_range(1, UNROLL):  # the first tile are the pivots
        inside = None if WHOLE else (begin + i * ROWS + row < space)[:, None] & known[None, :]
        here = base + i * ROWS * row_stride
        sums, squares = _more_sums(
            x,
            residual,
            channel_add,
            total,
            here,
            place,
            inside,
            channel_place,
            known,
            pivot,
            sums,
            squares,
        )
    for _ in range(1, own):
        begin += UNROLL * ROWS
        base += UNROLL * ROWS * row_stride
        for i in tl.static_range(UNROLL):
            mask = None if WHOLE else (begin + i * ROWS + row < space)[:, None] & known[None, :]
            here = base + i * ROWS * row_stride
            sums, squares = _more_sums(
                x,
                residual,
                channel_add,
                total,
                here,
                place,
                mask,
                channel_place,
                known,
                pivot,
                sums,
                squares,
            )

    begin = chunk * steps * (UNROLL * ROWS)
    seen = tl.minimum(space - begin, own * (UNROLL * ROWS))
    counts = (tl.maximum(seen - row + ROWS - 1, 0) // ROWS).to(tl.float32)[:, None]
    shift = sums * (1.0 / tl.maximum(counts, 1.0))
    squares = tl.maximum(squares - sums * shift, 0.0)
    mean, squares = merged(counts, pivot + shift, squares, seen.to(tl.float32))
    _store_moments(
        moments,
        mean,
        squares,
        seen,
        sample,
        chunk,
        tile,
        channel,
        channels,
        chunks,
        COLUMNS,
        SIZE,
        GROUPS,
        PARTS,
    )


@jit
def _parts(
    start: tl.tensor,
    group: tl.tensor,
    space: tl.tensor,
    channels: tl.tensor,
    chunks: tl.tensor,
    chunk_rows: tl.tensor,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    MERGE: tl.constexpr,
) -> tl.tensor:
    """Places of MERGE parts of each group in the moments of a sample, and counts: 0 for none."""
    part = start + tl.arange(0, MERGE)[:, None]
    tile = (group * SIZE // COLUMNS)[None, :] + part % PARTS
    chunk = part // PARTS
    seen = tl.maximum(tl.minimum(space - chunk * chunk_rows, chunk_rows), 0)
    counts = numbers_of(group[None, :], tile, seen, channels, SIZE, COLUMNS)
    return (group * (2 * PARTS * chunks))[None, :] + part, counts


@jit
def _merged_groups(
    moments: tl.tensor,
    group: tl.tensor,
    space: tl.tensor,
    channels: tl.tensor,
    chunks: tl.tensor,
    chunk_rows: tl.tensor,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
    PARTS: tl.constexpr,
    MERGE: tl.constexpr,
    ONCE: tl.constexpr,
) -> tl.tensor:
    """Mean of each group, its rounding error, and variance, merged from the parts (Chan).

    ONCE: MERGE parts are all, so they stay in registers between the two sums.
    """
    share = 1.0 / (space * (1.0 * SIZE))
    parts = chunks * PARTS
    sums = tl.zeros((GROUPS,), tl.float32)
    squares = tl.zeros((GROUPS,), tl.float32)
    if ONCE:
        place, counts = _parts(
            0,
            group,
            space,
            channels,
            chunks,
            chunk_rows,
            SIZE,
            COLUMNS,
            PARTS,
            MERGE,
        )
        means = tl.load(moments + place, counts > 0, other=0.0)
        within = tl.load(moments + parts + place, counts > 0, other=0.0)
        center = tl.sum(counts * means, 0) * share
        apart = means - center[None, :]
        sums += tl.sum(counts * apart, 0)
        squares += tl.sum(within + counts * apart * apart, 0)
    else:
        for start in range(0, parts, MERGE):
            place, counts = _parts(
                start,
                group,
                space,
                channels,
                chunks,
                chunk_rows,
                SIZE,
                COLUMNS,
                PARTS,
                MERGE,
            )
            sums += tl.sum(counts * tl.load(moments + place, counts > 0, other=0.0), 0)
        center = sums * share
        sums = tl.zeros((GROUPS,), tl.float32)
        for start in range(0, parts, MERGE):
            place, counts = _parts(
                start,
                group,
                space,
                channels,
                chunks,
                chunk_rows,
                SIZE,
                COLUMNS,
                PARTS,
                MERGE,
            )
            apart = tl.load(moments + place, counts > 0, other=0.0) - center[None, :]
            within = tl.load(moments + parts + place, counts > 0, other=0.0)
            sums += tl.sum(counts * apart, 0)
            squares += tl.sum(within + counts * apart * apart, 0)
    rest = sums * share
    variance = tl.maximum(squares * share - rest * rest, 0.0)
    mean = center + rest
    return mean, rest - (mean - center), variance


@jit
def _apply_kernel(
    x: tl.tensor,
    moments: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    scale_shift: tl.tensor,
    y: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    space: tl.tensor,
    channels: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    chunks: tl.tensor,
    steps: tl.tensor,
    eps: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MERGE: tl.constexpr,
    ONCE: tl.constexpr,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    PARTS: tl.constexpr,
    WHOLE: tl.constexpr,
    SILU: tl.constexpr,
) -> None:
    """y = silu(norm(x)) for a chunk of `steps` tiles, after its groups' moments are merged.

    Programs and their tiles go from last to first: the end of x is still in the L2.
    """
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    tiles = tl.cdiv(channels, COLUMNS)
    tile = program % tiles
    chunk = program // tiles % chunks
    sample = (program // tiles // chunks).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    channel = tile * COLUMNS + column
    known = channel < channels

    groups = channels // SIZE
    group = groups_of(tile, SIZE, GROUPS, COLUMNS)
    center, rest, variance = _merged_groups(
        moments + sample * groups * (2 * PARTS * chunks),
        group,
        space,
        channels,
        chunks,
        steps * ROWS,
        SIZE,
        COLUMNS,
        GROUPS,
        PARTS,
        MERGE,
        ONCE,
    )
    inverse = _inverse_sqrt(variance + eps)
    begins = (group < groups) & (group * SIZE // COLUMNS == tile) & (chunk == 0)
    tl.store(mean + sample * groups + group, center, begins)
    tl.store(rstd + sample * groups + group, inverse, begins)
    member = (channel // SIZE)[:, None] == group[None, :]
    center = of_columns(center, member)
    scale, shift = affine(weight, bias, scale_shift, sample, channel, channels, known)
    scale *= of_columns(inverse, member)
    shift -= of_columns(rest, member) * scale

    begin = chunk * steps * ROWS
    own = tl.minimum(steps, tl.cdiv(space - begin, ROWS))
    row = tl.arange(0, ROWS)
    base = sample * space * channels + tile.to(tl.int64) * COLUMNS * column_stride
    base += begin.to(tl.int64) * row_stride
    place = row[:, None] * row_stride + column[None, :] * column_stride
    for step in range(own):
        at = (own - 1 - step) * ROWS
        inside = None if WHOLE else (begin + at + row < space)[:, None] & known[None, :]
        here = base + at.to(tl.int64) * row_stride
        numbers = load_tile(x + here + place, inside, "evict_first")
        result = (numbers - center[None, :]) * scale[None, :] + shift[None, :]
        if SILU:
            result = silu(result)
        tl.store(y + here + place, result.to(y.dtype.element_ty), inside)


def forward(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    channel_add: Tensor | None,
    residual: Tensor | None,
    scale_shift: Tensor | None,
    eps: float,
    activation: str,
    keep: bool = False,
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return ((y, total), statistics) for x + channel_add + residual; without addends total is x.

    statistics: (N, G, 3), fp32, in the layout of `mean_and_rstd`. If they are kept for the backward
    pass, every element is initialized.
    """
    layout = memory_format_of(x)
    x = x.contiguous(memory_format=layout)
    y = torch.empty_like(x)
    make = x.new_zeros if keep else x.new_empty
    statistics = make(x.shape[0], num_groups, 3, dtype=torch.float32)
    mean, rstd = mean_and_rstd(statistics)
    adds = channel_add is not None or residual is not None
    total = torch.empty_like(x) if adds else x
    if x.numel() == 0:
        return (y, total), statistics.zero_()
    if residual is not None:
        residual = residual.contiguous(memory_format=layout)
    weight, bias, scale_shift = all_contiguous(weight, bias, scale_shift)
    channel_add, add_stride = rows_apart(channel_add)
    shape = shape_of(x, num_groups)
    sizes = shape.space, shape.channels
    silu = {"SILU": activation == "silu"}
    stored = total if adds else None
    small = small_regime("group_norm_silu", x, shape, share=2 if adds else 1)
    if small is not None:
        programs, constants = split_small("group_norm_silu", x, shape, *small)
        constants |= silu
        inputs = x, residual, channel_add, weight, bias, scale_shift
        outputs = y, stored, mean, rstd
        scalars = *sizes, *shape.strides, add_stride, eps
        launch(_small_kernel, (programs,), *inputs, *outputs, *scalars, **constants)
        return (y, total), statistics

    plan = parts_regime("group_norm_silu", x, shape)
    numbers = *sizes, *shape.strides
    moments = x.new_empty(plan.samples, num_groups, 2, plan.parts, dtype=torch.float32)
    for start in range(0, len(x), plan.samples):
        stop = min(start + plan.samples, len(x))
        x_, residual_, stored_, total_, y_, scale_shift_, mean_, rstd_ = slices(
            start, stop, x, residual, stored, total, y, scale_shift, mean, rstd
        )
        add_ = channel_add
        if channel_add is not None and channel_add.ndim == 2:
            add_ = channel_add[start:stop]
        grid = ((stop - start) * plan.programs,)
        launch(
            _moments_kernel,
            grid,
            *(x_, residual_, add_, stored_, moments),
            *(*numbers, add_stride, plan.chunks, plan.steps),
            **plan.moments,
        )
        launch(
            _apply_kernel,
            grid,
            *(total_, moments, weight, bias, scale_shift_, y_, mean_, rstd_),
            *(*numbers, plan.chunks, plan.steps, eps),
            **plan.result,
            **silu,
        )
    return (y, total), statistics
