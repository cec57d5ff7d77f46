"""The forward pass of `attention` in Triton: kernels and launchers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..triton import cdiv, constexpr_function, jit, launch, tl
from ..tuning import Config, config, gpu_of
from .triton_tiles import (
    LOG2_E,
    PROGRAMS,
    accumulate,
    aligned,
    columns_of,
    keep_sums,
    kind_of,
    known_columns,
    load_pieces,
    mask_at,
    mask_strides_of,
    masked,
    masks_of,
    next_of,
    no_pieces,
    pieces_of,
    precision_of,
    product,
    room_for_sums,
    rows_of,
    split_sums,
    store_pieces,
    streamed_product,
    strides_of,
    tiles_for,
    weights,
    zero_pieces,
    zeros,
)


@constexpr_function
def _piece(groups: tuple[tuple[int, ...], ...], g: int, j: int) -> int:
    """Index among all pieces of the j-th piece of group g."""
    return sum(len(group) for group in groups[:g]) + j


@constexpr_function
def _first_key(groups: tuple[tuple[int, ...], ...], g: int, j: int) -> int:
    return sum(sum(group) for group in groups[:g]) + sum(groups[g][:j])


@jit
def _scaled(pieces: tl.tensor, factor: tl.tensor) -> tl.tensor:
    scaled = no_pieces()
    for i in tl.static_range(len(pieces)):
        scaled += (pieces[i] * factor,)
    return scaled


@jit
def _forward_kernel(  # noqa: PLR0915
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    extra_k: tl.tensor,
    extra_v: tl.tensor,
    mask: tl.tensor,
    extra_mask: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    tops: tl.tensor,
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
    D: tl.constexpr,
    SCORE_WIDTHS: tl.constexpr,
    OUT_WIDTHS: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Compute one tile of queries and D / SPLIT output columns over all keys.

    The loop over the keys is written once and compiled up to four times: for keys and extra keys,
    each for whole tiles without bounds checks and for the last tile with them.
    """
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
    if CHUNK == 0:
        tile = load_pieces(q_rows, inside, D, D, SCORE_WIDTHS, True)
    unit = factor if MASK == 0 else 1.0

    total = zero_pieces(BLOCK_M, OUT_WIDTHS)
    top = tl.full((BLOCK_M,), -3.3e38, tl.float32)  # finite, so that no difference is inf - inf
    weight = tl.zeros((BLOCK_M,), tl.float32)
    for source in tl.static_range(1 if extra_k is None else 2):
        a_k, k_step = (extra_k, extra_k_strides) if source else (k, k_strides)
        a_v, v_step = (extra_v, extra_v_strides) if source else (v, v_strides)
        a_mask, count = (extra_mask, extra_keys) if source else (mask, keys)
        whole = count // BLOCK_N * BLOCK_N
        for tail in tl.static_range(2):
            first, last = (whole, count) if tail else (0, whole)
            for start in tl.range(first, last, BLOCK_N, num_stages=1 if tail else None):
                column = start + tl.arange(0, BLOCK_N)
                real = (column < count)[:, None]
                k_rows = rows_of(a_k, k_step, n, h, column)
                scores = zeros(BLOCK_M, BLOCK_N)
                if CHUNK == 0:
                    k_tile = load_pieces(k_rows, real, D, D, SCORE_WIDTHS, tail)
                    scores = product(tile, k_tile, scores, PRECISION)
                else:
                    scores = streamed_product(
                        q_rows, inside, k_rows, real, scores, D, CHUNK, PRECISION
                    )
                here = (column < count)[None, :]
                if MASK != 0:
                    at = mask_at(a_mask, mask_strides, n, h, row[:, None], column[None, :])
                    scores = masked(scores * factor, at, inside & here, MASK)
                if tail:
                    scores = tl.where(here, scores, float("-inf"))
                new_top = tl.maximum(top, tl.max(scores, 1))
                p = weights(scores, new_top[:, None], unit, tops is not None)
                shrink = tl.exp2((top - new_top) * unit)
                weight = weight * shrink + tl.sum(p, 1)
                top = new_top
                v_rows = rows_of(a_v, v_step, n, h, column) + part * COLUMNS
                v_tile = load_pieces(v_rows, real, limit, KNOWN, OUT_WIDTHS, tail)
                p = p.to(v.dtype.element_ty)
                total = accumulate(total, shrink[:, None], p, v_tile, PRECISION)

    some = weight > 0
    share = tl.where(some, 1.0 / tl.where(some, weight, 1.0), 0.0)
    out_rows = out + ((n * length + row.to(tl.int64)[:, None]) * heads + h) * D + part * COLUMNS
    store_pieces(out_rows, inside, total, share[:, None], limit, OUT_WIDTHS)
    if part == 0:
        at = (n * heads + h) * length + row
        keep_sums(lse, tops, at, top, weight, unit, row < length)


@jit
def _context_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    mask: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    tops: tl.tensor,
    q_strides: tl.tensor,
    k_strides: tl.tensor,
    v_strides: tl.tensor,
    mask_strides: tl.tensor,
    length: tl.tensor,
    keys: tl.tensor,
    heads: tl.tensor,
    programs: tl.tensor,
    factor: tl.tensor,
    D: tl.constexpr,
    KEY_GROUPS: tl.constexpr,
    SCORE_WIDTHS: tl.constexpr,
    OUT_WIDTHS: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> None:
    """Compute every `programs`-th tile of queries over keys that stay on the chip.

    77 keys are one group of 64 + 16, whose softmax takes one pass; several groups are combined by
    an online softmax.
    """
    head = tl.program_id(0) // programs
    n, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    k_tiles, v_tiles = no_pieces(), no_pieces()
    for g in tl.static_range(len(KEY_GROUPS)):
        for j in tl.static_range(len(KEY_GROUPS[g])):
            column = _first_key(KEY_GROUPS, g, j) + tl.arange(0, KEY_GROUPS[g][j])
            real = (column < keys)[:, None]
            k_rows = rows_of(k, k_strides, n, h, column)
            v_rows = rows_of(v, v_strides, n, h, column)
            k_tiles += (load_pieces(k_rows, real, D, D, SCORE_WIDTHS, True),)
            v_tiles += (load_pieces(v_rows, real, D, D, OUT_WIDTHS, True),)
    unit = factor if MASK == 0 else 1.0
    first = tl.program_id(0) % programs * BLOCK_M
    for start in range(first, length, programs * BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        inside = (row < length)[:, None]
        tile = load_pieces(rows_of(q, q_strides, n, h, row), inside, D, D, SCORE_WIDTHS, True)
        total = zero_pieces(BLOCK_M, OUT_WIDTHS)
        top = tl.full((BLOCK_M,), -3.3e38, tl.float32)
        weight = tl.zeros((BLOCK_M,), tl.float32)
        for g in tl.static_range(len(KEY_GROUPS)):
            new_top, group = top, no_pieces()
            for j in tl.static_range(len(KEY_GROUPS[g])):
                column = _first_key(KEY_GROUPS, g, j) + tl.arange(0, KEY_GROUPS[g][j])
                here = (column < keys)[None, :]
                scores = zeros(BLOCK_M, KEY_GROUPS[g][j])
                scores = product(tile, k_tiles[_piece(KEY_GROUPS, g, j)], scores, PRECISION)
                if MASK != 0:
                    where = mask_at(mask, mask_strides, n, h, row[:, None], column[None, :])
                    scores = masked(scores * factor, where, inside & here, MASK)
                if g == len(KEY_GROUPS) - 1 and j == len(KEY_GROUPS[g]) - 1:
                    scores = tl.where(here, scores, float("-inf"))
                new_top = tl.maximum(new_top, tl.max(scores, 1))
                group += (scores,)
            if g > 0:
                shrink = tl.exp2((top - new_top) * unit)
                weight *= shrink
                total = _scaled(total, shrink[:, None])
            top = new_top
            for j in tl.static_range(len(KEY_GROUPS[g])):
                p = weights(group[j], top[:, None], unit, tops is not None)
                weight += tl.sum(p, 1)
                p = p.to(v.dtype.element_ty)
                v_tile = v_tiles[_piece(KEY_GROUPS, g, j)]
                total = accumulate(total, 1.0, p, v_tile, PRECISION)
        some = weight > 0
        share = tl.where(some, 1.0 / tl.where(some, weight, 1.0), 0.0)
        out_rows = out + ((n * length + row.to(tl.int64)[:, None]) * heads + h) * D
        store_pieces(out_rows, inside, total, share[:, None], D, OUT_WIDTHS)
        numbers = (n * heads + h) * length + row
        keep_sums(lse, tops, numbers, top, weight, unit, row < length)


# Launchers

CONTEXTS = (80, 160, 336)
"""Classes for 77, 154 and 256 + 77 tokens; keys that fit on the chip have a config per class."""
CONTEXT_DIMS = (40, 64, 80, 160)
MASKED_CONTEXT, MASKED_CONTEXT_DIM = 80, 80
"""Limits with a mask, which needs registers too: 336 keys of dim 64 spilled 1,480 bytes."""
MMA_SYNC = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_120", "sm_121")
"""Architectures whose matrix unit is programmed with mma.sync."""
STREAMS: Config = {"BLOCK_M": 0, "num_warps": 4, "num_stages": 1}
"""Used in place of an on-chip kernel's config if the keys do not fit: stream them instead."""


def _groups(keys: int) -> tuple[tuple[int, ...], ...]:
    """Groups of keys, each with a one-pass softmax: up to 128 + 32, all that registers can hold."""
    groups: tuple[tuple[int, ...], ...] = ()
    while keys > 160:
        groups += ((128,),)
        keys -= 128
    return (*groups, pieces_of(keys, 16))


def _out_widths(columns: int, x: Tensor) -> tuple[int, ...]:
    """Widths of the pieces of V: mma.sync handles 8 columns; wgmma, tcgen05 and MFMA need 16."""
    takes_8 = x.dtype != torch.float32 and gpu_of(x.device).architecture in MMA_SYNC
    return pieces_of(columns, 8 if takes_8 else 16)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    mask: Tensor | None,
    scale: float,
    room: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the output and, per query, log2 of the sum of exp2(log2(e) * scores), (1, N, H, L).

    For fp32 and under an additive mask there are two numbers per query, (2, N, H, L): the log2
    relative to the largest score, and that score. `room` is memory for them, (2, N, H, L) fp32.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = room_for_sums(q, mask, room)
    if q.numel() == 0 or k.shape[1] + (0 if extra_k is None else extra_k.shape[1]) == 0:
        return out.zero_(), lse.fill_(torch.inf)
    q, k, v = aligned(q), aligned(k), aligned(v)
    if extra_k is not None and extra_v is not None:
        extra_k, extra_v = aligned(extra_k), aligned(extra_v)
    on_chip = _on_chip(q, k, extra_k, mask)
    if on_chip is not None:
        _context(q, k, v, mask, out, lse, scale, on_chip)
    else:
        streaming(q, k, v, extra_k, extra_v, mask, out, lse, scale)
    return out, lse


def _on_chip(q: Tensor, k: Tensor, extra_k: Tensor | None, mask: Tensor | None) -> Config | None:
    """The config of the kernel that keeps all keys on the chip, if they fit."""
    keys, d = next_of(k.shape[1], CONTEXTS), next_of(q.shape[3], CONTEXT_DIMS)
    if extra_k is not None or keys is None or d is None or q.dtype == torch.float32:
        return None
    if mask is not None and (keys > MASKED_CONTEXT or d > MASKED_CONTEXT_DIM):
        return None
    chosen = config("attention_context", q, f"{keys}/{d}")
    return chosen if chosen["BLOCK_M"] else None


def _context(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    chosen: Config,
) -> None:
    (n, length, heads, d), keys = q.shape, k.shape[1]
    tiles = cdiv(length, chosen["BLOCK_M"])
    rounds = cdiv(tiles * n * heads, PROGRAMS)
    programs = cdiv(tiles, rounds)
    masks = masks_of(mask, q, keys, 0)
    launch(
        _context_kernel,
        (programs * n * heads,),
        q,
        k,
        v,
        masks[0],
        out,
        *split_sums(lse),
        *(strides_of(x) for x in (q, k, v)),
        mask_strides_of(masks[0]),
        length,
        keys,
        heads,
        programs,
        scale * LOG2_E,
        D=d,
        KEY_GROUPS=_groups(keys),
        SCORE_WIDTHS=pieces_of(d, 16),
        OUT_WIDTHS=_out_widths(d, v),
        MASK=kind_of(masks[0]),
        PRECISION=precision_of(q),
        **chosen,
    )


def streaming(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> None:
    (n, length, heads, d), keys = q.shape, k.shape[1]
    extra_keys = 0 if extra_k is None else extra_k.shape[1]
    masks = masks_of(mask, q, keys, extra_keys)
    chosen = tiles_for("attention", q, masks[0])
    launch(
        _forward_kernel,
        (cdiv(length, chosen["BLOCK_M"]) * chosen["SPLIT"] * n * heads,),
        q,
        k,
        v,
        extra_k,
        extra_v,
        *masks,
        out,
        *split_sums(lse),
        *(strides_of(x) for x in (q, k, v, extra_k, extra_v)),
        mask_strides_of(masks[0]),
        length,
        keys,
        extra_keys,
        heads,
        scale * LOG2_E,
        D=d,
        SCORE_WIDTHS=pieces_of(d, 16),
        OUT_WIDTHS=_out_widths(columns_of(d, chosen["SPLIT"]), v),
        MASK=kind_of(masks[0]),
        PRECISION=precision_of(q),
        **chosen,
    )
