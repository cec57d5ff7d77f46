"""The backward pass of `group_norm_silu` and `add_group_norm_silu` in Triton.

Let g be the gradient before the activation, n the normalized x, a and b the scale and shift that
follow the norm (`affine`), and take means over a group's channels and space:

    dx = (g * a - mean(g * a) - n * mean(g * a * n)) / sqrt(v + eps) + dtotal
    da = sum over space of g * n,   db = sum over space of g

Everything except x, the mean and 1 / sqrt(v + eps) is recomputed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..triton import cdiv, jit, launch, sigmoid, tl
from ..views import all_contiguous, memory_format_of
from .triton_tiles import (
    affine,
    film_scale,
    group_totals,
    large_regime,
    mean_and_rstd,
    shape_of,
    slices,
    small_regime,
)


@jit
def _gradient(
    dy: tl.tensor,
    centered: tl.tensor,
    scale: tl.tensor,
    shift: tl.tensor,
    place: tl.tensor,
    inside: tl.tensor,
    SILU: tl.constexpr,
) -> tl.tensor:
    """The gradient before the activation, 0 outside; the norm is centered * scale + shift."""
    gradient = tl.load(dy + place, inside, other=0.0).to(tl.float32)
    if SILU:
        result = centered * scale[None, :] + shift[None, :]
        gate = sigmoid(result)
        gradient *= gate * (1.0 + result * (1.0 - gate))
    return gradient


@jit
def _store_parameter_gradients(
    weight: tl.tensor,
    bias: tl.tensor,
    scale_shift: tl.tensor,
    dscale_shift: tl.tensor,
    shares: tl.tensor,
    dscale: tl.tensor,
    dshift: tl.tensor,
    sample: tl.tensor,
    channel: tl.tensor,
    channels: tl.tensor,
    known: tl.tensor,
    SHARES: tl.constexpr,
) -> None:
    """Store one sample's share of dweight and dbias, and its dscale_shift.

    dscale and dshift are the gradients of the scale and shift of `affine`.
    """
    if dscale_shift is not None:
        target = dscale_shift + sample * (2 * channels) + channel
        dtype = dscale_shift.dtype.element_ty
        tl.store(target + channels, dshift.to(dtype), known)
        dfilm = dscale
        if weight is not None:
            dfilm = dscale * tl.load(weight + channel, known, other=0.0).to(tl.float32)
        if bias is not None:
            dfilm += dshift * tl.load(bias + channel, known, other=0.0).to(tl.float32)
        tl.store(target, dfilm.to(dtype), known)
    if shares is not None:
        film = film_scale(scale_shift, sample, channel, channels, known)
        target = shares + sample * (SHARES * channels) + channel
        tl.store(target, dscale * film, known)
        tl.store(target + channels, dshift * film, known)


@jit
def _small_backward_kernel(
    dy: tl.tensor,
    dtotal: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    scale_shift: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    dx: tl.tensor,
    dscale_shift: tl.tensor,
    dchannel_add: tl.tensor,
    shares: tl.tensor,
    space: tl.tensor,
    channels: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SHARES: tl.constexpr,
    SILU: tl.constexpr,
) -> None:
    """The backward pass of `_small_kernel`, over the same channels."""
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
    numbers = tl.load(x + base + place, inside, other=0.0).to(tl.float32)
    group = sample * (channels // SIZE) + channel // SIZE
    center = tl.load(mean + group, known, other=0.0)
    inverse = tl.load(rstd + group, known, other=0.0)
    scale, shift = affine(weight, bias, scale_shift, sample, channel, channels, known)

    normed = (numbers - center[None, :]) * inverse[None, :]
    gradient = _gradient(dy + base, normed, scale, shift, place, inside, SILU)
    dscale = tl.sum(gradient * normed, 0)
    dshift = tl.sum(gradient, 0)
    count = space * (1.0 * SIZE)
    along = group_totals(scale * dscale, SIZE, GROUPS, COLUMNS) / count
    level = group_totals(scale * dshift, SIZE, GROUPS, COLUMNS) / count
    result = gradient * (scale * inverse)[None, :] - normed * (along * inverse)[None, :]
    result -= (level * inverse)[None, :]
    if dtotal is not None:
        result += tl.load(dtotal + base + place, inside, other=0.0).to(tl.float32)
    tl.store(dx + base + place, result.to(dx.dtype.element_ty), inside)

    _store_parameter_gradients(
        weight,
        bias,
        scale_shift,
        dscale_shift,
        shares,
        dscale,
        dshift,
        sample,
        channel,
        channels,
        known,
        SHARES,
    )
    if dchannel_add is not None or SHARES == 3:
        added = tl.sum(tl.where(inside, result, 0.0), 0)
        if dchannel_add is not None:
            target = dchannel_add + sample * channels + channel
            tl.store(target, added.to(dchannel_add.dtype.element_ty), known)
        if SHARES == 3:
            tl.store(shares + sample * (SHARES * channels) + 2 * channels + channel, added, known)


@jit
def _sums_backward_kernel(
    dy: tl.tensor,
    dtotal: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    scale_shift: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    sums: tl.tensor,
    space: tl.tensor,
    channels: tl.tensor,
    size: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    chunks: tl.tensor,
    steps: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SUMS: tl.constexpr,
    SILU: tl.constexpr,
) -> None:
    """Per channel, the sums over one chunk of space from which all gradients are computed.

    They are the sums of g * n and of g and, with SUMS == 4, of n and of dtotal (for the gradient of
    channel_add), where g is the gradient before the activation and n the normalized x.
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
    group = sample * (channels // size) + channel // size
    center = tl.load(mean + group, known, other=0.0)
    inverse = tl.load(rstd + group, known, other=0.0)
    scale, shift = affine(weight, bias, scale_shift, sample, channel, channels, known)
    dscale = tl.zeros((ROWS, COLUMNS), tl.float32)
    dshift = tl.zeros((ROWS, COLUMNS), tl.float32)
    if SUMS == 4:
        norms = tl.zeros((ROWS, COLUMNS), tl.float32)
        passed = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(steps):
        inside = (begin + step * ROWS + row < space)[:, None] & known[None, :]
        numbers = tl.load(x + base + place, inside, other=0.0).to(tl.float32)
        normed = (numbers - center[None, :]) * inverse[None, :]
        gradient = _gradient(dy + base, normed, scale, shift, place, inside, SILU)
        dscale += gradient * normed
        dshift += gradient
        if SUMS == 4:
            norms += tl.where(inside, normed, 0.0)
            if dtotal is not None:
                passed += tl.load(dtotal + base + place, inside, other=0.0).to(tl.float32)
        base += ROWS * row_stride
    target = sums + (sample * chunks + chunk) * (SUMS * channels) + channel
    tl.store(target, tl.sum(dscale, 0), known)
    tl.store(target + channels, tl.sum(dshift, 0), known)
    if SUMS == 4:
        tl.store(target + 2 * channels, tl.sum(norms, 0), known)
        tl.store(target + 3 * channels, tl.sum(passed, 0), known)


@jit
def _chunk_total(
    source: tl.tensor,
    stride: tl.tensor,
    chunks: tl.tensor,
    channel: tl.tensor,
    known: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """Add up one of the sums of `_sums_backward_kernel` over all chunks, in order."""
    total = tl.zeros((COLUMNS,), tl.float32)
    for block in range(0, chunks, ROWS):
        chunk = (block + tl.arange(0, ROWS)).to(tl.int64)
        inside = (chunk < chunks)[:, None] & known[None, :]
        here = source + chunk[:, None] * stride + channel[None, :]
        total += tl.sum(tl.load(here, inside, other=0.0), 0)
    return total


@jit
def _finalize_backward_kernel(
    sums: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    scale_shift: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    table: tl.tensor,
    dscale_shift: tl.tensor,
    dchannel_add: tl.tensor,
    shares: tl.tensor,
    space: tl.tensor,
    channels: tl.tensor,
    chunks: tl.tensor,
    CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SUMS: tl.constexpr,
    SHARES: tl.constexpr,
) -> None:
    """Add up the chunks: write the table that dx needs, and one sample's parameter gradients."""
    tiles = tl.cdiv(channels, CHANNELS)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    begin = (tl.program_id(0) % tiles) * CHANNELS
    column = tl.arange(0, COLUMNS)
    stride = SUMS * channels
    source = sums + sample * chunks * stride
    count = space * (1.0 * SIZE)
    along = tl.zeros((COLUMNS,), tl.float32)
    level = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, CHANNELS, COLUMNS):
        channel = begin + start + column
        known = (start + column < CHANNELS) & (channel < channels)
        scale, _ = affine(weight, bias, scale_shift, sample, channel, channels, known)
        dscale = _chunk_total(source, stride, chunks, channel, known, ROWS, COLUMNS)
        dshift = _chunk_total(source + channels, stride, chunks, channel, known, ROWS, COLUMNS)
        along += scale * dscale
        level += scale * dshift
        _store_parameter_gradients(
            weight,
            bias,
            scale_shift,
            dscale_shift,
            shares,
            dscale,
            dshift,
            sample,
            channel,
            channels,
            known,
            SHARES,
        )
    along = group_totals(along, SIZE, GROUPS, COLUMNS) / count
    level = group_totals(level, SIZE, GROUPS, COLUMNS) / count

    inner = (column < CHANNELS) & (begin + column < channels)
    group = sample * (channels // SIZE) + (begin + column) // SIZE
    center = tl.load(mean + group, inner, other=0.0)
    inverse = tl.load(rstd + group, inner, other=0.0)
    for start in range(0, CHANNELS, COLUMNS):
        channel = begin + start + column
        known = (start + column < CHANNELS) & (channel < channels)
        scale, shift = affine(weight, bias, scale_shift, sample, channel, channels, known)
        target = table + sample * (5 * channels) + channel
        tl.store(target, center, known)
        tl.store(target + channels, scale * inverse, known)
        tl.store(target + 2 * channels, shift, known)
        tl.store(target + 3 * channels, level * inverse, known)
        tl.store(target + 4 * channels, along * inverse * inverse, known)
        if SUMS == 4:
            dshift = _chunk_total(source + channels, stride, chunks, channel, known, ROWS, COLUMNS)
            norms = source + 2 * channels
            norms_total = _chunk_total(norms, stride, chunks, channel, known, ROWS, COLUMNS)
            passed = source + 3 * channels
            added = inverse * (scale * dshift - level * space - along * norms_total)
            added += _chunk_total(passed, stride, chunks, channel, known, ROWS, COLUMNS)
            if dchannel_add is not None:
                own = dchannel_add + sample * channels + channel
                tl.store(own, added.to(dchannel_add.dtype.element_ty), known)
            if SHARES == 3:
                share = shares + sample * (SHARES * channels) + 2 * channels + channel
                tl.store(share, added, known)


@jit
def _apply_backward_kernel(
    dy: tl.tensor,
    dtotal: tl.tensor,
    x: tl.tensor,
    table: tl.tensor,
    dx: tl.tensor,
    space: tl.tensor,
    channels: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SILU: tl.constexpr,
) -> None:
    """Compute dx from last to first, since the ends of x and dy are still in the L2."""
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
    source = table + sample * (5 * channels) + channel
    center = tl.load(source, known, other=0.0)
    scale = tl.load(source + channels, known, other=0.0)
    shift = tl.load(source + 2 * channels, known, other=0.0)
    level = tl.load(source + 3 * channels, known, other=0.0)
    along = tl.load(source + 4 * channels, known, other=0.0)
    centered = numbers - center[None, :]
    gradient = _gradient(dy + base, centered, scale, shift, place, inside, SILU)
    result = gradient * scale[None, :] - level[None, :] - centered * along[None, :]
    if dtotal is not None:
        result += tl.load(dtotal + base + place, inside, other=0.0).to(tl.float32)
    tl.store(dx + base + place, result.to(dx.dtype.element_ty), inside)


@jit
def _over_samples_kernel(
    shares: tl.tensor,
    dweight: tl.tensor,
    dbias: tl.tensor,
    dchannel_add: tl.tensor,
    samples: tl.tensor,
    channels: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SHARES: tl.constexpr,
) -> None:
    """Add up the samples' shares of a gradient, in order."""
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    known = channel < channels
    stride = SHARES * channels
    if dweight is not None:
        sum_ = _chunk_total(shares, stride, samples, channel, known, ROWS, COLUMNS)
        tl.store(dweight + channel, sum_.to(dweight.dtype.element_ty), known)
    if dbias is not None:
        source = shares + channels
        sum_ = _chunk_total(source, stride, samples, channel, known, ROWS, COLUMNS)
        tl.store(dbias + channel, sum_.to(dbias.dtype.element_ty), known)
    if dchannel_add is not None:
        source = shares + 2 * channels
        sum_ = _chunk_total(source, stride, samples, channel, known, ROWS, COLUMNS)
        tl.store(dchannel_add + channel, sum_.to(dchannel_add.dtype.element_ty), known)


Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _empty_gradients(
    total: Tensor, parameters: Sequence[Tensor | None], needs: Sequence[bool]
) -> Gradients:
    dx = torch.empty_like(total, memory_format=memory_format_of(total))
    dweight, dbias, dchannel_add, dscale_shift = (
        torch.empty_like(p, memory_format=torch.contiguous_format)
        if p is not None and need
        else total.new_empty(0)
        for p, need in zip(parameters, needs, strict=True)
    )
    return dx, dweight, dbias, dchannel_add, dscale_shift


def backward(
    dy: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    channel_add: Tensor | None,
    residual: None,
    scale_shift: Tensor | None,
    eps: float,
    activation: str,
    statistics: Tensor,
    needs: Sequence[bool],
) -> Gradients:
    """Return the gradients of total, weight, bias, channel_add and scale_shift.

    Of the last four, those that `needs` does not ask for are empty tensors.
    """
    mean, rstd = mean_and_rstd(statistics)
    layout = memory_format_of(total)
    total, dy = (t.contiguous(memory_format=layout) for t in (total, dy))
    dtotal = None if dtotal is None else dtotal.contiguous(memory_format=layout)
    parameters = weight, bias, channel_add, scale_shift
    gradients = _empty_gradients(total, parameters, needs[1:])
    if total.numel() == 0:
        for gradient in gradients:
            gradient.zero_()
        return gradients
    dx = gradients[0]
    dweight, dbias, dchannel_add, dscale_shift = (g if g.numel() else None for g in gradients[1:])
    weight, bias, scale_shift = all_contiguous(weight, bias, scale_shift)
    shape = shape_of(total, num_groups)
    sizes = shape.space, shape.channels
    silu = {"SILU": activation == "silu"}
    # parameters shared by all samples: one partial gradient per sample first, then their sum
    shared_add = dchannel_add if dchannel_add is not None and dchannel_add.ndim == 1 else None
    sample_add = dchannel_add if shared_add is None else None
    width = 3 if shared_add is not None else 2
    shares = None
    if dweight is not None or dbias is not None or shared_add is not None:
        shares = total.new_empty(len(total), width, shape.channels, dtype=torch.float32)
    counted = {"SHARES": width}
    share = 1 if dtotal is None else 2
    small = small_regime("group_norm_silu_backward", total, shape, share=share)
    if small is not None:
        programs, constants = small
        inputs = dy, dtotal, total, weight, bias, scale_shift, mean, rstd
        outputs = dx, dscale_shift, sample_add, shares
        numbers = *sizes, *shape.strides
        constants |= counted | silu
        launch(_small_backward_kernel, (programs,), *inputs, *outputs, *numbers, **constants)
    else:
        plan = large_regime("group_norm_silu_backward", total, shape)
        count = {"SUMS": 2 if dchannel_add is None else 4}
        sums = total.new_empty(
            plan.samples, plan.chunks, count["SUMS"], shape.channels, dtype=torch.float32
        )
        table = total.new_empty(plan.samples, 5, shape.channels, dtype=torch.float32)
        for start in range(0, len(total), plan.samples):
            stop = min(start + plan.samples, len(total))
            n = stop - start
            dy_, dtotal_, x_, scale_shift_, mean_, rstd_ = slices(
                start, stop, dy, dtotal, total, scale_shift, mean, rstd
            )
            dx_, dscale_shift_, sample_add_, shares_ = slices(
                start, stop, dx, dscale_shift, sample_add, shares
            )
            launch(
                _sums_backward_kernel,
                (n * plan.programs,),
                *(dy_, dtotal_ if count["SUMS"] == 4 else None, x_, weight, bias, scale_shift_),
                *(mean_, rstd_, sums, *sizes, shape.size, *shape.strides),
                *(plan.chunks, plan.steps),
                **plan.tile,
                **count,
                **silu,
            )
            launch(
                _finalize_backward_kernel,
                (n * plan.finalize_programs,),
                *(sums, weight, bias, scale_shift_, mean_, rstd_, table),
                *(dscale_shift_, sample_add_, shares_, *sizes, plan.chunks),
                **plan.finalize,
                **count,
                **counted,
            )
            launch(
                _apply_backward_kernel,
                (n * plan.apply_programs,),
                *(dy_, dtotal_, x_, table, dx_, *sizes, *shape.strides),
                **plan.apply_tile,
                **silu,
            )
    if shares is not None:
        tile = {"ROWS": 16, "COLUMNS": 64}
        launch(
            _over_samples_kernel,
            (cdiv(shape.channels, tile["COLUMNS"]),),
            *(shares, dweight, dbias, shared_add, len(total), shape.channels),
            **tile,
            **counted,
        )
    return gradients
