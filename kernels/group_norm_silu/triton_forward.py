"""The forward pass of `group_norm_silu` and `add_group_norm_silu` in Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from ..triton import jit, launch, merged, sigmoid, tl
from ..views import all_contiguous, memory_format_of, rows_apart
from .triton_tiles import (
    affine,
    group_totals,
    large_regime,
    mean_and_rstd,
    shape_of,
    slices,
    small_regime,
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
) -> tl.tensor:
    """Load x in fp32; with addends, store their sum to `total` and return it as rounded there.

    Values that are not read again are evicted from the L2 first.
    """
    if total is None:
        numbers = tl.load(x + base + place, inside, other=0.0).to(tl.float32)
    else:
        numbers = tl.load(x + base + place, inside, other=0.0, eviction_policy="evict_first")
        numbers = numbers.to(tl.float32)
    if channel_add is not None:
        numbers += tl.load(channel_add + channel_place, known, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        addend = tl.load(residual + base + place, inside, other=0.0, eviction_policy="evict_first")
        numbers += addend.to(tl.float32)
    if total is not None:
        rounded = numbers.to(total.dtype.element_ty)
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
    SILU: tl.constexpr,
) -> None:
    """Compute y for CHANNELS channels (whole groups) of one sample, entirely in registers."""
    tiles = tl.cdiv(channels, CHANNELS)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    begin = tl.program_id(0) % tiles * CHANNELS
    column = tl.arange(0, COLUMNS)
    channel = begin + column
    row = tl.arange(0, ROWS)
    known = (column < CHANNELS) & (channel < channels)
    inside = (row < space)[:, None] & known[None, :]
    base = sample * space * channels + begin * column_stride
    place = row[:, None] * row_stride + column[None, :] * column_stride
    channel_place = sample * channel_add_stride + channel
    numbers = _load_sum(x, residual, channel_add, total, base, place, inside, channel_place, known)
    scale, shift = affine(weight, bias, scale_shift, sample, channel, channels, known)

    count = space * (1.0 * SIZE)
    if channel_add is not None:
        numbers = tl.where(inside, numbers, 0.0)
    center = group_totals(tl.sum(numbers, 0), SIZE, GROUPS, COLUMNS) / count
    centered = tl.where(inside, numbers - center[None, :], 0.0)
    # the rounding error of the mean, which matters when the mean is large against the deviation
    rest = group_totals(tl.sum(centered, 0), SIZE, GROUPS, COLUMNS) / count
    squares = group_totals(tl.sum(centered * centered, 0), SIZE, GROUPS, COLUMNS)
    inverse = _inverse_sqrt(tl.maximum(squares / count - rest * rest, 0.0) + eps)
    scale *= inverse
    result = centered * scale[None, :] + (shift - rest * scale)[None, :]
    if SILU:
        result *= sigmoid(result)
    tl.store(y + base + place, result.to(y.dtype.element_ty), inside)

    first = known & (column % SIZE == 0)
    group = sample * (channels // SIZE) + channel // SIZE
    tl.store(mean + group, center + rest, first)
    tl.store(rstd + group, inverse, first)


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
) -> None:
    """Mean and sum of centered squares of each channel over one chunk of `steps` tiles of space.

    Each element of the tile keeps running moments (Welford); its rows are merged at the end (Chan).
    """
    tiles = tl.cdiv(channels, COLUMNS)
    tile = tl.program_id(0) % tiles
    chunk = tl.program_id(0) // tiles % chunks
    sample = (tl.program_id(0) // tiles // chunks).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    channel = tile * COLUMNS + column
    known = channel < channels
    begin = chunk * steps * ROWS
    row = tl.arange(0, ROWS)
    base = sample * space * channels + tile.to(tl.int64) * COLUMNS * column_stride
    base += begin.to(tl.int64) * row_stride
    place = row[:, None] * row_stride + column[None, :] * column_stride
    channel_place = sample * channel_add_stride + channel
    mean = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(steps):
        inside = (begin + step * ROWS + row < space)[:, None] & known[None, :]
        numbers = _load_sum(
            x, residual, channel_add, total, base, place, inside, channel_place, known
        )
        delta = tl.where(inside, numbers - mean, 0.0)
        mean += delta * (1.0 / (step + 1))
        squares += delta * (numbers - mean)
        base += ROWS * row_stride

    left = tl.maximum(space - begin - row + ROWS - 1, 0) // ROWS
    counts = tl.minimum(left, steps).to(tl.float32)[:, None]  # values seen by each row
    count = tl.minimum(space - begin, steps * ROWS).to(tl.float32)
    mean, squares = merged(counts, mean, squares, count)
    target = moments + (sample * chunks + chunk) * (2 * channels) + channel
    tl.store(target, mean, known)
    tl.store(target + channels, squares, known)


@jit
def _finalize_kernel(
    moments: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    scale_shift: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    table: tl.tensor,
    space: tl.tensor,
    channels: tl.tensor,
    chunks: tl.tensor,
    chunk_rows: tl.tensor,
    eps: tl.tensor,
    CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Merge the chunks' moments (Chan) group by group; fold affine and FiLM into the table.

    A program handles CHANNELS channels (whole groups) of one sample; that is more than COLUMNS if a
    group is wider.
    """
    tiles = tl.cdiv(channels, CHANNELS)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    begin = (tl.program_id(0) % tiles) * CHANNELS
    column = tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    source = moments + sample * chunks * (2 * channels)
    count = space * (1.0 * SIZE)

    sums = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, CHANNELS, COLUMNS):
        channel = begin + start + column
        known = (start + column < CHANNELS) & (channel < channels)
        for block in range(0, chunks, ROWS):
            chunk = (block + row).to(tl.int64)
            inside = (chunk < chunks)[:, None] & known[None, :]
            here = source + chunk[:, None] * (2 * channels) + channel
            centers = tl.load(here, inside, other=0.0)
            counts = tl.minimum(space - chunk * chunk_rows, chunk_rows).to(tl.float32)
            sums += tl.sum(tl.where(inside, centers * counts[:, None], 0.0), 0)
    center = group_totals(sums, SIZE, GROUPS, COLUMNS) / count

    sums = tl.zeros((COLUMNS,), tl.float32)
    squares = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, CHANNELS, COLUMNS):
        channel = begin + start + column
        known = (start + column < CHANNELS) & (channel < channels)
        for block in range(0, chunks, ROWS):
            chunk = (block + row).to(tl.int64)
            inside = (chunk < chunks)[:, None] & known[None, :]
            here = source + chunk[:, None] * (2 * channels) + channel
            counts = tl.minimum(space - chunk * chunk_rows, chunk_rows).to(tl.float32)[:, None]
            deviation = tl.load(here, inside, other=0.0) - center[None, :]
            deviation = tl.where(inside, deviation, 0.0)
            sums += tl.sum(deviation * counts, 0)
            within = tl.load(here + channels, inside, other=0.0)
            squares += tl.sum(within + deviation * deviation * counts, 0)
    rest = group_totals(sums, SIZE, GROUPS, COLUMNS) / count
    variance = group_totals(squares, SIZE, GROUPS, COLUMNS) / count - rest * rest
    inverse = _inverse_sqrt(tl.maximum(variance, 0.0) + eps)
    merged = center + rest
    rest -= merged - center  # the rounding error of `merged`

    for start in range(0, CHANNELS, COLUMNS):
        channel = begin + start + column
        known = (start + column < CHANNELS) & (channel < channels)
        scale, shift = affine(weight, bias, scale_shift, sample, channel, channels, known)
        scale *= inverse
        target = table + sample * (3 * channels) + channel
        tl.store(target, merged, known)
        tl.store(target + channels, scale, known)
        tl.store(target + 2 * channels, shift - rest * scale, known)
    first = (column < CHANNELS) & (column % SIZE == 0) & (begin + column < channels)
    group = sample * (channels // SIZE) + (begin + column) // SIZE
    tl.store(mean + group, merged, first)
    tl.store(rstd + group, inverse, first)


@jit
def _apply_kernel(
    x: tl.tensor,
    table: tl.tensor,
    y: tl.tensor,
    space: tl.tensor,
    channels: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SILU: tl.constexpr,
) -> None:
    """y = silu((x - mean) * scale + shift), from last to first: the end of x is still in the L2."""
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    tiles = tl.cdiv(channels, COLUMNS)
    blocks = tl.cdiv(space, ROWS)
    sample = (program // tiles // blocks).to(tl.int64)
    tile = program % tiles
    begin = program // tiles % blocks * ROWS
    column = tl.arange(0, COLUMNS)
    channel = tile * COLUMNS + column
    row = tl.arange(0, ROWS)
    known = channel < channels
    inside = (begin + row < space)[:, None] & known[None, :]
    base = sample * space * channels + tile.to(tl.int64) * COLUMNS * column_stride
    base += begin.to(tl.int64) * row_stride
    place = row[:, None] * row_stride + column[None, :] * column_stride
    numbers = tl.load(x + base + place, inside, other=0.0, eviction_policy="evict_first")
    numbers = numbers.to(tl.float32)
    source = table + sample * (3 * channels) + channel
    center = tl.load(source, known, other=0.0)
    scale = tl.load(source + channels, known, other=0.0)
    shift = tl.load(source + 2 * channels, known, other=0.0)
    result = (numbers - center[None, :]) * scale[None, :] + shift[None, :]
    if SILU:
        result *= sigmoid(result)
    tl.store(y + base + place, result.to(y.dtype.element_ty), inside)


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
        programs, constants = small
        inputs = x, residual, channel_add, weight, bias, scale_shift
        outputs = y, stored, mean, rstd
        numbers = *sizes, *shape.strides, add_stride, eps
        launch(_small_kernel, (programs,), *inputs, *outputs, *numbers, **constants, **silu)
        return (y, total), statistics

    plan = large_regime("group_norm_silu", x, shape)
    moments = x.new_empty(plan.samples, plan.chunks, 2, shape.channels, dtype=torch.float32)
    table = x.new_empty(plan.samples, 3, shape.channels, dtype=torch.float32)
    for start in range(0, len(x), plan.samples):
        stop = min(start + plan.samples, len(x))
        n = stop - start
        x_, residual_, stored_, total_, y_, scale_shift_, mean_, rstd_ = slices(
            start, stop, x, residual, stored, total, y, scale_shift, mean, rstd
        )
        add_ = channel_add
        if channel_add is not None and channel_add.ndim == 2:
            add_ = channel_add[start:stop]
        launch(
            _moments_kernel,
            (n * plan.programs,),
            *(x_, residual_, add_, stored_, moments),
            *(*sizes, *shape.strides, add_stride, plan.chunks, plan.steps),
            **plan.tile,
        )
        launch(
            _finalize_kernel,
            (n * plan.finalize_programs,),
            *(moments, weight, bias, scale_shift_, mean_, rstd_, table),
            *(*sizes, plan.chunks, plan.chunk_rows, eps),
            **plan.finalize,
        )
        launch(
            _apply_kernel,
            (n * plan.apply_programs,),
            *(total_, table, y_, *sizes, *shape.strides),
            **plan.apply_tile,
            **silu,
        )
    return (y, total), statistics
