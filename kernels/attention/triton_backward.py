"""The backward pass of `attention` in Triton: kernels and launchers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..triton import cdiv, jit, launch, next_power_of_2, tl
from .triton_tiles import (
    LOG2_E,
    PROGRAMS,
    Masks,
    accumulate,
    aligned,
    columns_of,
    kept_sums,
    kind_of,
    known_columns,
    load_pieces,
    mask_at,
    mask_strides_of,
    masked,
    masks_of,
    pieces_of,
    precision_of,
    product,
    rows_of,
    split_sums,
    store_pieces,
    streamed_product,
    strides_of,
    tiles_for,
    weights_again,
    zero_pieces,
    zeros,
)


@jit
def _row_sums_kernel(
    dout: tl.tensor,
    out: tl.tensor,
    sums: tl.tensor,
    dout_strides: tl.tensor,
    length: tl.tensor,
    heads: tl.tensor,
    rows: tl.tensor,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Per query, sum_d dout * out, which equals sum_s P dP: (N, L, H, D) to (N, H, L)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n, l, h = row // (length * heads), row // heads % length, row % heads
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows)[:, None] & (column < D)
    source = (n * dout_strides[0] + l * dout_strides[1] + h * dout_strides[2]) * 8
    wide = tl.float64 if out.dtype.element_ty == tl.float32 else tl.float32  # dP - sum cancels
    gradient = tl.load(dout + source[:, None] + column, inside, other=0.0).to(wide)
    value = tl.load(out + row[:, None] * D + column, inside, other=0.0).to(wide)
    tl.store(
        sums + (n * heads + h) * length + l, tl.sum(gradient * value, 1).to(tl.float32), row < rows
    )


@jit
def _keys_gradient_kernel(  # noqa: PLR0915
    dout: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    mask: tl.tensor,
    lse: tl.tensor,
    tops: tl.tensor,
    sums: tl.tensor,
    dk: tl.tensor,
    dv: tl.tensor,
    dout_strides: tl.tensor,
    q_strides: tl.tensor,
    k_strides: tl.tensor,
    v_strides: tl.tensor,
    mask_strides: tl.tensor,
    length: tl.tensor,
    keys: tl.tensor,
    heads: tl.tensor,
    samples: tl.tensor,
    stretch: tl.tensor,
    factor: tl.tensor,
    scale: tl.tensor,
    D: tl.constexpr,
    WIDTHS: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Compute dK and dV for one tile of keys and D / SPLIT columns, from a stretch of queries.

    Everything is transposed, (keys, queries), so that both products read P and dS from registers.
    Stretch i is written to slice i of dk and dv, (stretches, N, S, H, D).
    """
    COLUMNS: tl.constexpr = columns_of(D, SPLIT)
    KNOWN: tl.constexpr = known_columns(D, SPLIT)
    tiles = tl.cdiv(keys, BLOCK_N)
    stretches = tl.cdiv(length, stretch)
    tile, rest = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    part, rest = rest % SPLIT, rest // SPLIT
    limit = D if SPLIT == 1 else D - part * COLUMNS
    piece, head = rest % stretches, rest // stretches
    n, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    real = (column < keys)[:, None]
    k_rows = rows_of(k, k_strides, n, h, column)
    v_rows = rows_of(v, v_strides, n, h, column)
    if CHUNK == 0:
        k_tile = load_pieces(k_rows, real, D, D, WIDTHS, True)
        v_tile = load_pieces(v_rows, real, D, D, WIDTHS, True)

    unit = factor if MASK == 0 else 1.0
    dk_total, dv_total = zero_pieces(BLOCK_N, WIDTHS), zero_pieces(BLOCK_N, WIDTHS)
    first = piece * stretch
    for start in range(first, tl.minimum(first + stretch, length), BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        inside = (row < length)[:, None]
        q_rows = rows_of(q, q_strides, n, h, row)
        dout_rows = rows_of(dout, dout_strides, n, h, row)
        q_tile = load_pieces(q_rows + part * COLUMNS, inside, limit, KNOWN, WIDTHS, True)
        if q.dtype.element_ty == tl.float32:  # round as forward does, or a sharp softmax has P != 1
            scores = zeros(BLOCK_M, BLOCK_N)
            scores = streamed_product(q_rows, inside, k_rows, real, scores, D, CHUNK, PRECISION)
            scores = tl.trans(scores)
        elif CHUNK == 0:
            scores = product(k_tile, q_tile, zeros(BLOCK_N, BLOCK_M), PRECISION)
        else:
            scores = zeros(BLOCK_N, BLOCK_M)
            scores = streamed_product(k_rows, real, q_rows, inside, scores, D, CHUNK, PRECISION)
        there = (row < length)[None, :]
        if MASK != 0:
            at = mask_at(mask, mask_strides, n, h, row[None, :], column[:, None])
            scores = masked(scores * factor, at, real & there, MASK)
        numbers = ((n * heads + h) * length + row)[None, :]
        log, top = kept_sums(lse, tops, numbers, there)
        p = weights_again(scores, log, top, unit, tops is not None)
        dout_tile = load_pieces(dout_rows + part * COLUMNS, inside, limit, KNOWN, WIDTHS, True)
        dv_total = accumulate(dv_total, 1.0, p.to(q.dtype.element_ty), dout_tile, PRECISION)
        dp = zeros(BLOCK_N, BLOCK_M)
        if CHUNK == 0:
            dp = product(v_tile, dout_tile, dp, PRECISION)
        else:
            dp = streamed_product(v_rows, real, dout_rows, inside, dp, D, CHUNK, PRECISION)
        ds = p * (dp - tl.load(sums + numbers, there, other=0.0))
        dk_total = accumulate(dk_total, 1.0, ds.to(q.dtype.element_ty), q_tile, PRECISION)

    at = (piece * samples + n) * keys + column.to(tl.int64)[:, None]
    at = (at * heads + h) * D + part * COLUMNS
    store_pieces(dk + at, real, dk_total, scale, limit, WIDTHS)
    store_pieces(dv + at, real, dv_total, 1.0, limit, WIDTHS)


@jit
def _queries_gradient_kernel(  # noqa: PLR0915
    dout: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    extra_k: tl.tensor,
    extra_v: tl.tensor,
    mask: tl.tensor,
    extra_mask: tl.tensor,
    lse: tl.tensor,
    tops: tl.tensor,
    sums: tl.tensor,
    dq: tl.tensor,
    dscores: tl.tensor,
    dout_strides: tl.tensor,
    q_strides: tl.tensor,
    k_strides: tl.tensor,
    v_strides: tl.tensor,
    extra_k_strides: tl.tensor,
    extra_v_strides: tl.tensor,
    mask_strides: tl.tensor,
    length: tl.tensor,
    keys: tl.tensor,
    extra_keys: tl.tensor,
    heads: tl.tensor,
    factor: tl.tensor,
    scale: tl.tensor,
    D: tl.constexpr,
    WIDTHS: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Compute dQ for a tile of queries and D / SPLIT columns; optionally dS, (N, H, L, S + T)."""
    COLUMNS: tl.constexpr = columns_of(D, SPLIT)
    KNOWN: tl.constexpr = known_columns(D, SPLIT)
    tiles = tl.cdiv(length, BLOCK_M)
    head = tl.program_id(0) // (tiles * SPLIT)
    part = tl.program_id(0) // tiles % SPLIT
    limit = D if SPLIT == 1 else D - part * COLUMNS
    n, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    row = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (row < length)[:, None]
    q_rows = rows_of(q, q_strides, n, h, row)
    dout_rows = rows_of(dout, dout_strides, n, h, row)
    if CHUNK == 0:
        q_tile = load_pieces(q_rows, inside, D, D, WIDTHS, True)
        dout_tile = load_pieces(dout_rows, inside, D, D, WIDTHS, True)
    unit = factor if MASK == 0 else 1.0
    numbers = ((n * heads + h) * length + row)[:, None]
    row_sum = tl.load(sums + numbers, inside, other=0.0)
    log, top = kept_sums(lse, tops, numbers, inside)

    total = zero_pieces(BLOCK_M, WIDTHS)
    for source in tl.static_range(1 if extra_k is None else 2):
        a_k, k_step = (extra_k, extra_k_strides) if source else (k, k_strides)
        a_v, v_step = (extra_v, extra_v_strides) if source else (v, v_strides)
        a_mask, count = (extra_mask, extra_keys) if source else (mask, keys)
        for start in range(0, count, BLOCK_N):
            column = start + tl.arange(0, BLOCK_N)
            real = (column < count)[:, None]
            here = (column < count)[None, :]
            k_rows = rows_of(a_k, k_step, n, h, column)
            v_rows = rows_of(a_v, v_step, n, h, column)
            k_tile = load_pieces(k_rows + part * COLUMNS, real, limit, KNOWN, WIDTHS, True)
            scores, dp = zeros(BLOCK_M, BLOCK_N), zeros(BLOCK_M, BLOCK_N)
            if CHUNK == 0:
                scores = product(q_tile, k_tile, scores, PRECISION)
                v_tile = load_pieces(v_rows, real, D, D, WIDTHS, True)
                dp = product(dout_tile, v_tile, dp, PRECISION)
            else:
                scores = streamed_product(q_rows, inside, k_rows, real, scores, D, CHUNK, PRECISION)
                dp = streamed_product(dout_rows, inside, v_rows, real, dp, D, CHUNK, PRECISION)
            if MASK != 0:
                at = mask_at(a_mask, mask_strides, n, h, row[:, None], column[None, :])
                scores = masked(scores * factor, at, inside & here, MASK)
            p = weights_again(scores, log, top, unit, tops is not None)
            p = tl.where(here, p, 0.0)
            ds = p * (dp - row_sum)
            if dscores is not None:
                before = keys if source else 0
                all_keys = keys + (0 if extra_k is None else extra_keys)
                at = numbers * all_keys + before + column[None, :]
                tl.store(dscores + at, ds, inside & here)
            total = accumulate(total, 1.0, ds.to(q.dtype.element_ty), k_tile, PRECISION)

    dq_rows = dq + ((n * length + row.to(tl.int64)[:, None]) * heads + h) * D + part * COLUMNS
    store_pieces(dq_rows, inside, total, scale, limit, WIDTHS)


# Launchers


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    mask_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return dq, dk, dv, dextra_k, dextra_v, dmask; an absent input has a gradient of size 0."""
    n, length, heads, _ = q.shape
    keys, extra_keys = k.shape[1], 0 if extra_k is None else extra_k.shape[1]
    dq, dk, dv, dextra_k, dextra_v, dmask = room_for_gradients(
        q, k, v, extra_k, extra_v, mask, mask_gradient
    )
    if q.numel() == 0 or keys + extra_keys == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), dextra_k.zero_(), dextra_v.zero_(), dmask.zero_()
    dout, q, k, v = aligned(dout), aligned(q), aligned(k), aligned(v)
    if extra_k is not None and extra_v is not None:
        extra_k, extra_v = aligned(extra_k), aligned(extra_v)
    masks = masks_of(mask, q, keys, extra_keys)
    sums = row_sums(dout, out)
    numbers = (*split_sums(lse), sums)
    dscores = None
    if mask_gradient:
        dscores = sums.new_empty(n, heads, length, keys + extra_keys)

    def gradient_of_queries() -> None:
        tensors = (dout, q, k, v, extra_k, extra_v)
        queries_gradient(tensors, masks, numbers, dq, dscores, scale)

    if dscores is not None and q.dtype != torch.float32:
        # Our output was rounded, and so were its row sums (PyTorch keeps an fp32 output when a mask
        # needs a gradient). Rows of dS must sum to 0, so their actual sum is the rounding error.
        gradient_of_queries()
        sums += dscores.sum(-1)
    for some_k, some_v, some_mask, some_dk, some_dv in (
        (k, v, masks[0], dk, dv),
        (extra_k, extra_v, masks[1], dextra_k, dextra_v),
    ):
        if some_k is not None and some_v is not None:
            keys_gradient(
                (dout, q, some_k, some_v),
                some_mask,
                numbers,
                (some_dk, some_dv),
                scale,
            )
    gradient_of_queries()
    if keys + extra_keys == 1:  # the softmax of one score is 1, whatever the score
        for gradient in (dq, dk, dextra_k, dscores):
            if gradient is not None:
                gradient.zero_()
    if mask is not None and dscores is not None:
        dmask = dscores.sum_to_size(mask.shape).to(mask.dtype)
    return dq, dk, dv, dextra_k, dextra_v, dmask


def room_for_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    mask: Tensor | None,
    mask_gradient: bool,
) -> tuple[Tensor, ...]:
    """Allocate the gradients, contiguous."""

    def like(x: Tensor | None) -> Tensor:
        return torch.empty((0,) if x is None else x.shape, dtype=q.dtype, device=q.device)

    if mask is None or not mask_gradient:
        dmask = like(None)
    else:
        dmask = torch.empty(mask.shape, dtype=mask.dtype, device=q.device)
    return (*(like(x) for x in (q, k, v, extra_k, extra_v)), dmask)


def row_sums(dout: Tensor, out: Tensor) -> Tensor:
    n, length, heads, d = out.shape
    sums = torch.empty(n, heads, length, dtype=torch.float32, device=out.device)
    rows, columns = n * length * heads, next_power_of_2(d)
    per_program = max(1, 4096 // max(columns, 32))  # 256 rows of 16 numbers spilled
    launch(
        _row_sums_kernel,
        (cdiv(rows, per_program),),
        dout,
        out,
        sums,
        strides_of(dout),
        length,
        heads,
        rows,
        D=d,
        ROWS=per_program,
        COLUMNS=columns,
    )
    return sums


def keys_gradient(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    mask: Tensor | None,
    numbers: tuple[Tensor, Tensor | None, Tensor],
    gradients: tuple[Tensor, Tensor],
    scale: float,
) -> None:
    """Compute dK and dV. If there are too few keys to fill the GPU, the queries are split into
    stretches, whose sums are then added in a fixed order."""
    _, q, k, _ = tensors
    (n, length, heads, d), keys = q.shape, k.shape[1]
    if keys == 0:
        return
    chosen = tiles_for("attention_backward_keys", q, mask)
    programs = cdiv(keys, chosen["BLOCK_N"]) * chosen["SPLIT"] * n * heads
    blocks = cdiv(length, chosen["BLOCK_M"])
    wanted = max(1, min(PROGRAMS // programs, blocks // 4))
    stretch = cdiv(blocks, wanted) * chosen["BLOCK_M"]
    stretches = cdiv(length, stretch)
    dk, dv = gradients
    if stretches > 1:
        partial = torch.empty(2, stretches, *dk.shape, dtype=torch.float32, device=q.device)
        dk, dv = partial[0], partial[1]
    launch(
        _keys_gradient_kernel,
        (programs * stretches,),
        *tensors,
        mask,
        *numbers,
        dk,
        dv,
        *(strides_of(x) for x in tensors),
        mask_strides_of(mask),
        length,
        keys,
        heads,
        n,
        stretch,
        scale * LOG2_E,
        scale,
        D=d,
        WIDTHS=pieces_of(columns_of(d, chosen["SPLIT"]), 16),
        MASK=kind_of(mask),
        PRECISION=precision_of(q),
        **chosen,
    )
    if stretches > 1:
        for gradient, parts in zip(gradients, partial, strict=True):
            gradient.copy_(parts.sum(0))


def queries_gradient(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    masks: Masks,
    numbers: tuple[Tensor, Tensor | None, Tensor],
    dq: Tensor,
    dscores: Tensor | None,
    scale: float,
) -> None:
    _, q, k, _, extra_k, _ = tensors
    n, length, heads, d = q.shape
    chosen = tiles_for("attention_backward_queries", q, masks[0])
    launch(
        _queries_gradient_kernel,
        (cdiv(length, chosen["BLOCK_M"]) * chosen["SPLIT"] * n * heads,),
        *tensors,
        *masks,
        *numbers,
        dq,
        dscores,
        *(strides_of(x) for x in tensors),
        mask_strides_of(masks[0]),
        length,
        k.shape[1],
        0 if extra_k is None else extra_k.shape[1],
        heads,
        scale * LOG2_E,
        scale,
        D=d,
        WIDTHS=pieces_of(columns_of(d, chosen["SPLIT"]), 16),
        MASK=kind_of(masks[0]),
        PRECISION=precision_of(q),
        **chosen,
    )
