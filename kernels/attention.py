"""Scaled dot-product attention on strided (N, L, H, D) tensors.

    P   = softmax(scale * Q K^T + mask)       over the S keys, per sample and head
    out = P V                                 Vaswani et al. 2017, eq. 1; scale = 1 / sqrt(D)

Bytes that must move: Q, K, V in and out once, (2 * L + 2 * S) * N * H * D * itemsize; the L x S
matrix never has to leave the chip. FLOPs: 4 * N * H * L * S * D (two products of 2 * L * S * D).

The reference is PyTorch's `scaled_dot_product_attention` on fp32 (fp64) tensors: on a CPU it tiles,
so it is up to 4 times faster than softmax(QK^T)V written out (1024 keys, d = 40, one core) and
needs no L x S memory, and its result for one sample does not depend on the others in the batch. The
written-out formula stands in the tests, in fp64.

The Triton kernels hold a tile of queries and walk over the keys with an online softmax (Milakov and
Gimelshein 2018; Dao 2023), or, where all keys fit on the chip (a text of 77 tokens), hold the keys
and walk over the queries with a softmax in one pass. The scale is folded into the exponent,
p = exp2(c * s - m) with c = scale * log2(e), and what is kept for the backward pass is
log2(sum exp2(c * s)) per query, in fp32, +inf for a query that may see no key.

A head dim is not padded to a power of two: it is cut into pieces that are, 40 = 32 + 8 columns of
V and of the output where the matrix unit takes 8 (mma.sync), 32 + 16 where it takes 16 (wgmma,
tcgen05, MFMA). The sum over the head dim in Q K^T goes in steps of 16 everywhere. Columns beyond D
are zeros that are not read.

fp32 goes through three TF32 products on NVIDIA (about 22 bits of each factor) and as it is on AMD.
A head of 512, and fp32, is too wide to be kept: CHUNK columns of the rows at a time are read for
each product, and SPLIT programs share the D output columns, each with all the scores.

Bytes moved, in units of N * H * D * itemsize, with BLOCK_M queries and BLOCK_N keys a tile:

    forward, streaming     2 L + 2 S ceil(L / BLOCK_M)
    forward, keys on chip  2 L + 2 S programs    as many programs a head as fill the GPU, `_context`
    backward, row sums     2 L
    backward, dK and dV    2 L ceil(S / BLOCK_N) + 4 S
    backward, dQ           3 L + 2 S ceil(L / BLOCK_M)

and 4 bytes a query for each of its numbers (8 for fp32, which keeps the sum in two): one in the
forward pass; one, 2 ceil(S / BLOCK_N), and 2 in the backward pass. Few keys, many queries: dK and
dV are also written and read once in fp32 for each stretch of the queries. Rows read in chunks:

    forward     L + SPLIT (L ceil(S / BLOCK_N) + S ceil(L / BLOCK_M)) + S ceil(L / BLOCK_M)

A mask is read once for every score. Re-reads of K and V are what the L2 is for: one head of 4096
keys of 40 is 0.66 MB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.kernels import _attention_cuda
from fastdiff.kernels._triton import (
    INTERPRETED,
    Config,
    Tunable,
    cdiv,
    config,
    constexpr_function,
    define_tunable,
    gpu_of,
    jit,
    launch,
    next_power_of_2,
    register,
    tl,
)
from fastdiff.kernels._triton import why_not as why_not_tensors
from fastdiff.kernels.dispatch import check_floating, compute_dtype, define_op


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The op in plain PyTorch; see `attention`."""
    if extra_k is not None and extra_v is not None:
        k, v = torch.cat([k, extra_k], 1), torch.cat([v, extra_v], 1)
    if q.numel() == 0 or k.numel() == 0:
        return q.new_zeros(q.shape) + 0 * (k.sum() + v.sum()).to(q.dtype)
    dtype = compute_dtype(q)
    if mask is not None:
        mask = mask.reshape(*[1] * (4 - mask.ndim), *mask.shape)
        mask = mask if mask.dtype == torch.bool else mask.to(dtype)
    q_heads, k_heads, v_heads = (t.to(dtype).transpose(1, 2) for t in (q, k, v))  # (N, H, ., D)
    with _without_autocast(q.device.type):
        out = F.scaled_dot_product_attention(q_heads, k_heads, v_heads, mask, scale=scale)
    return out.transpose(1, 2).to(q.dtype).contiguous()  # (N, L, H, D)


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Autocast would take the fp32 products back to half precision."""
    if not _autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


@torch.compiler.assume_constant_result  # torch 2.11's Dynamo cannot trace the call
def _autocast_available(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


# Device functions. A tile of rows is a tuple of pieces, one per width, since the sides of a Triton
# tile are powers of two. `inside` marks the rows that exist, as (rows, 1). Strides are tuples
# (sample, token, head) in units of UNIT numbers: a product with 8 tells the compiler that rows
# start at 16 bytes. MASK is 0 without a mask, 1 for bytes that tell which keys are seen, 2 for
# numbers that are added.

NO_MASK, SEEN, ADDED = 0, 1, 2


@constexpr_function
def _begin(widths: tuple[int, ...], i: int) -> int:
    """First column of piece i."""
    return sum(widths[:i])


@constexpr_function
def _beyond(widths: tuple[int, ...], i: int, columns: int) -> bool:
    """Piece i has columns that do not exist."""
    return sum(widths[: i + 1]) > columns


@constexpr_function
def _columns(d: int, split: int) -> int:
    """Columns of one of `split` programs: D itself, or a share rounded up to a multiple of 16."""
    return d if split == 1 else (d + 16 * split - 1) // (16 * split) * 16


@constexpr_function
def _known_columns(d: int, split: int) -> int:
    """The same where all programs have as many columns, else 0."""
    share = _columns(d, split)
    return share if share * split == d else 0


@constexpr_function
def _piece(groups: tuple[tuple[int, ...], ...], g: int, j: int) -> int:
    """Which of all pieces is the j-th of group g."""
    return sum(len(group) for group in groups[:g]) + j


@constexpr_function
def _first_key(groups: tuple[tuple[int, ...], ...], g: int, j: int) -> int:
    return sum(sum(group) for group in groups[:g]) + sum(groups[g][:j])


@jit
def _no_pieces() -> tl.tensor:
    return ()


@jit
def _zeros(ROWS: tl.constexpr, WIDTH: tl.constexpr) -> tl.tensor:
    return tl.zeros((ROWS, WIDTH), tl.float32)


@jit
def _zero_pieces(ROWS: tl.constexpr, WIDTHS: tl.constexpr) -> tl.tensor:
    pieces = _no_pieces()
    for i in tl.static_range(len(WIDTHS)):
        pieces += (_zeros(ROWS, WIDTHS[i]),)
    return pieces


@jit
def _rows(
    x: tl.tensor, strides: tl.tensor, n: tl.tensor, h: tl.tensor, row: tl.tensor, UNIT: tl.constexpr
) -> tl.tensor:
    """Where rows of one sample and head begin, (rows, 1)."""
    head = x + (n * strides[0] + h * strides[2]) * UNIT
    return head + (row.to(tl.int64)[:, None] * strides[1]) * UNIT


@jit
def _load(
    rows: tl.tensor,
    inside: tl.tensor,
    limit: tl.tensor,
    KNOWN: tl.constexpr,
    WIDTHS: tl.constexpr,
    GUARD: tl.constexpr,
) -> tl.tensor:
    """The pieces of rows, 0 from column `limit` on, of which the first KNOWN are there for sure.

    GUARD: some rows may not exist; 0 there too.
    """
    pieces = _no_pieces()
    for i in tl.static_range(len(WIDTHS)):
        column = _begin(WIDTHS, i) + tl.arange(0, WIDTHS[i])[None, :]
        if _beyond(WIDTHS, i, KNOWN):
            pieces += (tl.load(rows + column, inside & (column < limit), other=0.0),)
        elif GUARD:
            pieces += (tl.load(rows + column, inside, other=0.0),)
        else:
            pieces += (tl.load(rows + column),)
    return pieces


@jit
def _store(
    rows: tl.tensor,
    inside: tl.tensor,
    pieces: tl.tensor,
    factor: tl.tensor,
    limit: tl.tensor,
    WIDTHS: tl.constexpr,
) -> None:
    for i in tl.static_range(len(WIDTHS)):
        column = _begin(WIDTHS, i) + tl.arange(0, WIDTHS[i])[None, :]
        values = (pieces[i] * factor).to(rows.dtype.element_ty)
        tl.store(rows + column, values, inside & (column < limit))


@jit
def _product(a: tl.tensor, b: tl.tensor, total: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """total + a b^T, summed over the pieces."""
    for i in tl.static_range(len(a)):
        total = tl.dot(a[i], tl.trans(b[i]), total, input_precision=PRECISION)
    return total


@jit
def _streamed_product(
    a: tl.tensor,
    a_inside: tl.tensor,
    b: tl.tensor,
    b_inside: tl.tensor,
    total: tl.tensor,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """The same of rows that are too wide to be kept: CHUNK columns at a time from memory."""
    for start in range(0, D, CHUNK):
        column = start + tl.arange(0, CHUNK)[None, :]
        if D % CHUNK == 0:
            left = tl.load(a + column, a_inside, other=0.0)
            right = tl.load(b + column, b_inside, other=0.0)
        else:
            left = tl.load(a + column, a_inside & (column < D), other=0.0)
            right = tl.load(b + column, b_inside & (column < D), other=0.0)
        total = tl.dot(left, tl.trans(right), total, input_precision=PRECISION)
    return total


@jit
def _accumulate(
    total: tl.tensor, factor: tl.tensor, a: tl.tensor, b: tl.tensor, PRECISION: tl.constexpr
) -> tl.tensor:
    """total * factor + a b, piece by piece.

    fp32 is added outside the matrix unit, by an fma that the compiler does not merge into the
    product: the unit truncates its sums (Ootomo and Yokota 2022), which thousands of keys would
    show.
    """
    pieces = _no_pieces()
    for i in tl.static_range(len(total)):
        if a.dtype == tl.float32:
            product = tl.dot(a, b[i], input_precision=PRECISION)
            pieces += (tl.fma(total[i], tl.zeros_like(product) + factor, product),)
        else:
            pieces += (tl.dot(a, b[i], total[i] * factor),)
    return pieces


@jit
def _scaled(pieces: tl.tensor, factor: tl.tensor) -> tl.tensor:
    scaled = _no_pieces()
    for i in tl.static_range(len(pieces)):
        scaled += (pieces[i] * factor,)
    return scaled


@jit
def _weights(
    scores: tl.tensor, top: tl.tensor, unit: tl.tensor, FULL_PRECISION: tl.constexpr
) -> tl.tensor:
    """exp2(unit * (scores - top)), by one fma where half precision follows.

    Scores of some hundreds have errors of 1e-5 in fp32; the difference to the largest has not.
    """
    return tl.exp2((scores - top) * unit if FULL_PRECISION else scores * unit - top * unit)


@jit
def _keep_sums(
    lse: tl.tensor,
    tops: tl.tensor,
    at: tl.tensor,
    top: tl.tensor,
    weight: tl.tensor,
    unit: tl.tensor,
    inside: tl.tensor,
) -> None:
    """What the backward pass needs: log2 of the sum of exp2, fp32 in two numbers."""
    some = weight > 0
    log = tl.where(some, tl.log2(weight), float("inf"))
    if tops is None:
        tl.store(lse + at, top * unit + log, inside)
    else:
        tl.store(lse + at, log, inside)
        tl.store(tops + at, tl.where(some, top, 0.0), inside)


@jit
def _sums_of(
    lse: tl.tensor, tops: tl.tensor, at: tl.tensor, inside: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """What `_keep_sums` kept; inf, so that P is 0, for queries that do not exist."""
    log = tl.load(lse + at, inside, other=float("inf"))
    top = 0.0
    if tops is not None:
        top = tl.load(tops + at, inside, other=0.0)
    return log, top


@jit
def _weights_again(
    scores: tl.tensor,
    log: tl.tensor,
    top: tl.tensor,
    unit: tl.tensor,
    FULL_PRECISION: tl.constexpr,
) -> tl.tensor:
    """P in the backward pass."""
    return tl.exp2(((scores - top) * unit if FULL_PRECISION else scores * unit) - log)


@jit
def _mask_at(
    mask: tl.tensor,
    strides: tl.tensor,
    n: tl.tensor,
    h: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
) -> tl.tensor:
    head = mask + n * strides[0] + h * strides[1]
    return head + row.to(tl.int64) * strides[2] + column.to(tl.int64) * strides[3]


@jit
def _masked(scores: tl.tensor, at: tl.tensor, inside: tl.tensor, MASK: tl.constexpr) -> tl.tensor:
    """Scores in log2 units under the mask that stands at `at`.

    A finite mask stays finite, as fp32's smallest number times log2(e) would not: a query whose
    every key has it sees them all alike.
    """
    value = tl.load(at, inside, other=0)
    if MASK == 1:
        scores = tl.where(value != 0, scores, float("-inf"))
    else:
        added = value.to(tl.float32)
        finite = tl.maximum(added * 1.4426950408889634, -3e38)
        scores += tl.where(added == float("-inf"), added, finite)
    return scores


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
    UNIT: tl.constexpr,
    SCORE_WIDTHS: tl.constexpr,
    OUT_WIDTHS: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """One tile of queries, and of D / SPLIT output columns, over all keys.

    The loop over the keys stands once and is compiled up to four times: keys and extra keys, whole
    tiles without bounds and the last one with.
    """
    COLUMNS: tl.constexpr = _columns(D, SPLIT)
    KNOWN: tl.constexpr = _known_columns(D, SPLIT)
    tiles = tl.cdiv(length, BLOCK_M)
    head = tl.program_id(0) // (tiles * SPLIT)
    part = tl.program_id(0) // tiles % SPLIT
    limit = D if SPLIT == 1 else D - part * COLUMNS
    n, h = (head // heads).to(tl.int64), head % heads
    row = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (row < length)[:, None]
    q_rows = _rows(q, q_strides, n, h, row, UNIT)
    if CHUNK == 0:
        tile = _load(q_rows, inside, D, D, SCORE_WIDTHS, True)
    unit = factor if MASK == 0 else 1.0

    total = _zero_pieces(BLOCK_M, OUT_WIDTHS)
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
                k_rows = _rows(a_k, k_step, n, h, column, UNIT)
                scores = _zeros(BLOCK_M, BLOCK_N)
                if CHUNK == 0:
                    k_tile = _load(k_rows, real, D, D, SCORE_WIDTHS, tail)
                    scores = _product(tile, k_tile, scores, PRECISION)
                else:
                    scores = _streamed_product(
                        q_rows, inside, k_rows, real, scores, D, CHUNK, PRECISION
                    )
                here = (column < count)[None, :]
                if MASK != 0:
                    at = _mask_at(a_mask, mask_strides, n, h, row[:, None], column[None, :])
                    scores = _masked(scores * factor, at, inside & here, MASK)
                if tail:
                    scores = tl.where(here, scores, float("-inf"))
                new_top = tl.maximum(top, tl.max(scores, 1))
                p = _weights(scores, new_top[:, None], unit, tops is not None)
                shrink = tl.exp2((top - new_top) * unit)
                weight = weight * shrink + tl.sum(p, 1)
                top = new_top
                v_rows = _rows(a_v, v_step, n, h, column, UNIT) + part * COLUMNS
                v_tile = _load(v_rows, real, limit, KNOWN, OUT_WIDTHS, tail)
                p = p.to(v.dtype.element_ty)
                total = _accumulate(total, shrink[:, None], p, v_tile, PRECISION)

    some = weight > 0
    share = tl.where(some, 1.0 / tl.where(some, weight, 1.0), 0.0)
    out_rows = out + ((n * length + row.to(tl.int64)[:, None]) * heads + h) * D + part * COLUMNS
    _store(out_rows, inside, total, share[:, None], limit, OUT_WIDTHS)
    if part == 0:
        at = (n * heads + h) * length + row
        _keep_sums(lse, tops, at, top, weight, unit, row < length)


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
    UNIT: tl.constexpr,
    KEY_GROUPS: tl.constexpr,
    SCORE_WIDTHS: tl.constexpr,
    OUT_WIDTHS: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> None:
    """Every `programs`-th tile of queries over keys that stay on the chip.

    77 keys are one group of 64 + 16, whose softmax takes one pass; groups follow one another by the
    online softmax.
    """
    head = tl.program_id(0) // programs
    n, h = (head // heads).to(tl.int64), head % heads
    k_tiles, v_tiles = _no_pieces(), _no_pieces()
    for g in tl.static_range(len(KEY_GROUPS)):
        for j in tl.static_range(len(KEY_GROUPS[g])):
            column = _first_key(KEY_GROUPS, g, j) + tl.arange(0, KEY_GROUPS[g][j])
            real = (column < keys)[:, None]
            k_rows = _rows(k, k_strides, n, h, column, UNIT)
            v_rows = _rows(v, v_strides, n, h, column, UNIT)
            k_tiles += (_load(k_rows, real, D, D, SCORE_WIDTHS, True),)
            v_tiles += (_load(v_rows, real, D, D, OUT_WIDTHS, True),)
    unit = factor if MASK == 0 else 1.0
    first = tl.program_id(0) % programs * BLOCK_M
    for start in range(first, length, programs * BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        inside = (row < length)[:, None]
        tile = _load(_rows(q, q_strides, n, h, row, UNIT), inside, D, D, SCORE_WIDTHS, True)
        total = _zero_pieces(BLOCK_M, OUT_WIDTHS)
        top = tl.full((BLOCK_M,), -3.3e38, tl.float32)
        weight = tl.zeros((BLOCK_M,), tl.float32)
        for g in tl.static_range(len(KEY_GROUPS)):
            new_top, group = top, _no_pieces()
            for j in tl.static_range(len(KEY_GROUPS[g])):
                column = _first_key(KEY_GROUPS, g, j) + tl.arange(0, KEY_GROUPS[g][j])
                here = (column < keys)[None, :]
                scores = _zeros(BLOCK_M, KEY_GROUPS[g][j])
                scores = _product(tile, k_tiles[_piece(KEY_GROUPS, g, j)], scores, PRECISION)
                if MASK != 0:
                    where = _mask_at(mask, mask_strides, n, h, row[:, None], column[None, :])
                    scores = _masked(scores * factor, where, inside & here, MASK)
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
                p = _weights(group[j], top[:, None], unit, tops is not None)
                weight += tl.sum(p, 1)
                p = p.to(v.dtype.element_ty)
                v_tile = v_tiles[_piece(KEY_GROUPS, g, j)]
                total = _accumulate(total, 1.0, p, v_tile, PRECISION)
        some = weight > 0
        share = tl.where(some, 1.0 / tl.where(some, weight, 1.0), 0.0)
        out_rows = out + ((n * length + row.to(tl.int64)[:, None]) * heads + h) * D
        _store(out_rows, inside, total, share[:, None], D, OUT_WIDTHS)
        numbers = (n * heads + h) * length + row
        _keep_sums(lse, tops, numbers, top, weight, unit, row < length)


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
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """sum_d dout * out, which is sum_s P dP, per query: (N, L, H, D) to (N, H, L)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n, l, h = row // (length * heads), row // heads % length, row % heads
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows)[:, None] & (column < D)
    source = (n * dout_strides[0] + l * dout_strides[1] + h * dout_strides[2]) * UNIT
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
    UNIT: tl.constexpr,
    WIDTHS: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """dK and dV of one tile of keys, and of D / SPLIT columns, from a stretch of the queries.

    Everything is transposed, (keys, queries), so that both products with P and dS take them from
    registers. Stretch i is written to slice i of dk and dv, (stretches, N, S, H, D).
    """
    COLUMNS: tl.constexpr = _columns(D, SPLIT)
    KNOWN: tl.constexpr = _known_columns(D, SPLIT)
    tiles = tl.cdiv(keys, BLOCK_N)
    stretches = tl.cdiv(length, stretch)
    tile, rest = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    part, rest = rest % SPLIT, rest // SPLIT
    limit = D if SPLIT == 1 else D - part * COLUMNS
    piece, head = rest % stretches, rest // stretches
    n, h = (head // heads).to(tl.int64), head % heads
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    real = (column < keys)[:, None]
    k_rows = _rows(k, k_strides, n, h, column, UNIT)
    v_rows = _rows(v, v_strides, n, h, column, UNIT)
    if CHUNK == 0:
        k_tile = _load(k_rows, real, D, D, WIDTHS, True)
        v_tile = _load(v_rows, real, D, D, WIDTHS, True)

    unit = factor if MASK == 0 else 1.0
    dk_total, dv_total = _zero_pieces(BLOCK_N, WIDTHS), _zero_pieces(BLOCK_N, WIDTHS)
    first = piece * stretch
    for start in range(first, tl.minimum(first + stretch, length), BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        inside = (row < length)[:, None]
        q_rows = _rows(q, q_strides, n, h, row, UNIT)
        dout_rows = _rows(dout, dout_strides, n, h, row, UNIT)
        q_tile = _load(q_rows + part * COLUMNS, inside, limit, KNOWN, WIDTHS, True)
        if tops is not None:  # rounded as in the forward pass, or P of a sharp softmax is not 1
            scores = _zeros(BLOCK_M, BLOCK_N)
            scores = _streamed_product(q_rows, inside, k_rows, real, scores, D, CHUNK, PRECISION)
            scores = tl.trans(scores)
        elif CHUNK == 0:
            scores = _product(k_tile, q_tile, _zeros(BLOCK_N, BLOCK_M), PRECISION)
        else:
            scores = _zeros(BLOCK_N, BLOCK_M)
            scores = _streamed_product(k_rows, real, q_rows, inside, scores, D, CHUNK, PRECISION)
        there = (row < length)[None, :]
        if MASK != 0:
            at = _mask_at(mask, mask_strides, n, h, row[None, :], column[:, None])
            scores = _masked(scores * factor, at, real & there, MASK)
        numbers = ((n * heads + h) * length + row)[None, :]
        log, top = _sums_of(lse, tops, numbers, there)
        p = _weights_again(scores, log, top, unit, tops is not None)
        dout_tile = _load(dout_rows + part * COLUMNS, inside, limit, KNOWN, WIDTHS, True)
        dv_total = _accumulate(dv_total, 1.0, p.to(q.dtype.element_ty), dout_tile, PRECISION)
        dp = _zeros(BLOCK_N, BLOCK_M)
        if CHUNK == 0:
            dp = _product(v_tile, dout_tile, dp, PRECISION)
        else:
            dp = _streamed_product(v_rows, real, dout_rows, inside, dp, D, CHUNK, PRECISION)
        ds = p * (dp - tl.load(sums + numbers, there, other=0.0))
        dk_total = _accumulate(dk_total, 1.0, ds.to(q.dtype.element_ty), q_tile, PRECISION)

    at = (piece * samples + n) * keys + column.to(tl.int64)[:, None]
    at = (at * heads + h) * D + part * COLUMNS
    _store(dk + at, real, dk_total, scale, limit, WIDTHS)
    _store(dv + at, real, dv_total, 1.0, limit, WIDTHS)


@jit
def _queries_gradient_kernel(
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
    UNIT: tl.constexpr,
    WIDTHS: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """dQ of one tile of queries, and of D / SPLIT columns; dS as (N, H, L, S + T) if wanted."""
    COLUMNS: tl.constexpr = _columns(D, SPLIT)
    KNOWN: tl.constexpr = _known_columns(D, SPLIT)
    tiles = tl.cdiv(length, BLOCK_M)
    head = tl.program_id(0) // (tiles * SPLIT)
    part = tl.program_id(0) // tiles % SPLIT
    limit = D if SPLIT == 1 else D - part * COLUMNS
    n, h = (head // heads).to(tl.int64), head % heads
    row = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (row < length)[:, None]
    q_rows = _rows(q, q_strides, n, h, row, UNIT)
    dout_rows = _rows(dout, dout_strides, n, h, row, UNIT)
    if CHUNK == 0:
        q_tile = _load(q_rows, inside, D, D, WIDTHS, True)
        dout_tile = _load(dout_rows, inside, D, D, WIDTHS, True)
    unit = factor if MASK == 0 else 1.0
    numbers = ((n * heads + h) * length + row)[:, None]
    row_sum = tl.load(sums + numbers, inside, other=0.0)
    log, top = _sums_of(lse, tops, numbers, inside)

    total = _zero_pieces(BLOCK_M, WIDTHS)
    for source in tl.static_range(1 if extra_k is None else 2):
        a_k, k_step = (extra_k, extra_k_strides) if source else (k, k_strides)
        a_v, v_step = (extra_v, extra_v_strides) if source else (v, v_strides)
        a_mask, count = (extra_mask, extra_keys) if source else (mask, keys)
        for start in range(0, count, BLOCK_N):
            column = start + tl.arange(0, BLOCK_N)
            real = (column < count)[:, None]
            here = (column < count)[None, :]
            k_rows = _rows(a_k, k_step, n, h, column, UNIT)
            v_rows = _rows(a_v, v_step, n, h, column, UNIT)
            k_tile = _load(k_rows + part * COLUMNS, real, limit, KNOWN, WIDTHS, True)
            scores, dp = _zeros(BLOCK_M, BLOCK_N), _zeros(BLOCK_M, BLOCK_N)
            if CHUNK == 0:
                scores = _product(q_tile, k_tile, scores, PRECISION)
                dp = _product(dout_tile, _load(v_rows, real, D, D, WIDTHS, True), dp, PRECISION)
            else:
                scores = _streamed_product(
                    q_rows, inside, k_rows, real, scores, D, CHUNK, PRECISION
                )
                dp = _streamed_product(dout_rows, inside, v_rows, real, dp, D, CHUNK, PRECISION)
            if MASK != 0:
                at = _mask_at(a_mask, mask_strides, n, h, row[:, None], column[None, :])
                scores = _masked(scores * factor, at, inside & here, MASK)
            p = _weights_again(scores, log, top, unit, tops is not None)
            p = tl.where(here, p, 0.0)
            ds = p * (dp - row_sum)
            if dscores is not None:
                before = keys if source else 0
                all_keys = keys + (0 if extra_k is None else extra_keys)
                at = numbers * all_keys + before + column[None, :]
                tl.store(dscores + at, ds, inside & here)
            total = _accumulate(total, 1.0, ds.to(q.dtype.element_ty), k_tile, PRECISION)

    dq_rows = dq + ((n * length + row.to(tl.int64)[:, None]) * heads + h) * D + part * COLUMNS
    _store(dq_rows, inside, total, scale, limit, WIDTHS)


# Launchers

HEAD_DIMS = (24, 32, 40, 48, 64, 72, 80, 96, 128, 144, 160, 192, 256, 512)
"""Those of real models, each with a config; another takes that of the next one."""
WIDEST, SINGLE_HEAD = 256, 512
CONTEXTS = (80, 160, 336)
"""Keys of 77, 154 and 256 + 77 tokens; what fits on the chip has its config for each."""
CONTEXT_DIMS = (40, 64, 80, 160)
BACKWARD_DIMS = (40, 64, 80, 128, 160, 256, 512)
FULL_PRECISION_DIMS = (64, 256, 512)
MMA_SYNC = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_120", "sm_121")
"""The architectures whose matrix unit is driven by mma.sync."""
STREAMS: Config = {"BLOCK_M": 0, "num_warps": 4, "num_stages": 1}
"""In place of a config for keys on the chip: they do not fit there."""
PROGRAMS = 512
"""What fills a GPU: about four programs on each of its 80 to 150 multiprocessors."""
LOG2_E = 1.4426950408889634


def _next(value: int, known: tuple[int, ...]) -> int | None:
    return next((each for each in known if each >= value), None)


def _pieces(columns: int, smallest: int = 8) -> tuple[int, ...]:
    """Powers of two, falling, whose sum is `columns` rounded up to a multiple of the smallest."""
    columns = cdiv(columns, smallest) * smallest
    return tuple(1 << bit for bit in reversed(range(columns.bit_length())) if columns >> bit & 1)


def _groups(keys: int) -> tuple[tuple[int, ...], ...]:
    """Keys whose softmax is taken in one pass: up to 128 + 32, for which the registers suffice."""
    groups: tuple[tuple[int, ...], ...] = ()
    while keys > 160:
        groups += ((128,),)
        keys -= 128
    return (*groups, _pieces(keys, 16))


def _out_widths(columns: int, x: Tensor) -> tuple[int, ...]:
    """Pieces of V: mma.sync takes 8 columns; wgmma, tcgen05 and AMD's unit take 16."""
    takes_8 = x.dtype != torch.float32 and gpu_of(x.device).architecture in MMA_SYNC
    return _pieces(columns, 8 if takes_8 else 16)


def _precision(x: Tensor) -> str:
    """How fp32 tiles are multiplied: three TF32 products on NVIDIA's matrix unit, as PyTorch's
    memory-efficient attention does; AMD's multiplies fp32 as it is, and so does the interpreter."""
    split = gpu_of(x.device).architecture.startswith("sm_") and not INTERPRETED
    return "tf32x3" if split and x.dtype == torch.float32 else "ieee"


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _strides(x: Tensor | None, unit: int) -> tuple[int, int, int] | None:
    return None if x is None else (x.stride(0) // unit, x.stride(1) // unit, x.stride(2) // unit)


def _unit(*tensors: Tensor | None) -> int:
    """8 if all rows begin at multiples of 8 numbers, else 1."""
    strides = [s for x in tensors if x is not None for s in x.stride()[:3]]
    return 8 if all(stride % 8 == 0 for stride in strides) else 1


Masks = tuple[Tensor | None, Tensor | None]
"""What a kernel sees: a mask as a view of (N, H, L, S) and one of (N, H, L, T)."""


def _masks(mask: Tensor | None, q: Tensor, keys: int, extra_keys: int) -> Masks:
    if mask is None:
        return None, None
    n, length, heads, _ = q.shape
    full = mask.expand(n, heads, length, keys + extra_keys)
    full = full.view(torch.uint8) if mask.dtype == torch.bool else full
    return full[..., :keys], full[..., keys:] if extra_keys else None


def _kind(mask: Tensor | None) -> int:
    if mask is None:
        return NO_MASK
    return SEEN if mask.dtype == torch.uint8 else ADDED


def _stride_of(mask: Tensor | None) -> tuple[int, ...] | None:
    return None if mask is None else mask.stride()


def _shape_class(q: Tensor, known: tuple[int, ...]) -> str:
    d = q.shape[3]
    if q.dtype == torch.float32:
        return f"fp32/{_next(d, FULL_PRECISION_DIMS)}"
    return f"self/{_next(d, known)}"


def _tiles(name: str, q: Tensor, mask: Tensor | None) -> Config:
    """The config; half as many keys a tile under a mask, for which the registers are needed."""
    known = HEAD_DIMS if name == "attention" else BACKWARD_DIMS
    chosen = {"CHUNK": 0, "SPLIT": 1, **config(name, q, _shape_class(q, known))}
    if mask is not None:
        chosen["BLOCK_N"] = max(16, chosen["BLOCK_N"] // 2)
    return chosen


def _room_for_sums(q: Tensor) -> Tensor:
    n, length, heads, _ = q.shape
    numbers = 2 if q.dtype == torch.float32 else 1
    return torch.empty(numbers, n, heads, length, dtype=torch.float32, device=q.device)


def _split_sums(lse: Tensor) -> tuple[Tensor, Tensor | None]:
    return lse[0], lse[1] if len(lse) == 2 else None


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The output and, per query, log2 of the sum of exp2(log2(e) * scores), (1, N, H, L).

    For fp32 in two numbers, the log2 relative to the largest score and that score: (2, N, H, L).
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = _room_for_sums(q)
    if q.numel() == 0 or k.shape[1] + (0 if extra_k is None else extra_k.shape[1]) == 0:
        return out.zero_(), lse.fill_(torch.inf)
    q, k, v = _dense(q), _dense(k), _dense(v)
    if extra_k is not None and extra_v is not None:
        extra_k, extra_v = _dense(extra_k), _dense(extra_v)
    on_chip = _on_chip(q, k, extra_k)
    if on_chip is not None:
        _context(q, k, v, mask, out, lse, scale, on_chip)
    else:
        _streaming(q, k, v, extra_k, extra_v, mask, out, lse, scale)
    return out, lse


def _on_chip(q: Tensor, k: Tensor, extra_k: Tensor | None) -> Config | None:
    """The config of the kernel that keeps all keys on the chip, if they fit."""
    keys, d = _next(k.shape[1], CONTEXTS), _next(q.shape[3], CONTEXT_DIMS)
    if extra_k is not None or keys is None or d is None or q.dtype == torch.float32:
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
    unit, masks = _unit(q, k, v), _masks(mask, q, keys, 0)
    launch(
        _context_kernel,
        (programs * n * heads,),
        q,
        k,
        v,
        masks[0],
        out,
        *_split_sums(lse),
        *(_strides(x, unit) for x in (q, k, v)),
        _stride_of(masks[0]),
        length,
        keys,
        heads,
        programs,
        scale * LOG2_E,
        D=d,
        UNIT=unit,
        KEY_GROUPS=_groups(keys),
        SCORE_WIDTHS=_pieces(d, 16),
        OUT_WIDTHS=_out_widths(d, v),
        MASK=_kind(masks[0]),
        PRECISION=_precision(q),
        **chosen,
    )


def _streaming(
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
    unit, masks = _unit(q, k, v, extra_k, extra_v), _masks(mask, q, keys, extra_keys)
    chosen = _tiles("attention", q, masks[0])
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
        *_split_sums(lse),
        *(_strides(x, unit) for x in (q, k, v, extra_k, extra_v)),
        _stride_of(masks[0]),
        length,
        keys,
        extra_keys,
        heads,
        scale * LOG2_E,
        D=d,
        UNIT=unit,
        SCORE_WIDTHS=_pieces(d, 16),
        OUT_WIDTHS=_out_widths(_columns(d, chosen["SPLIT"]), v),
        MASK=_kind(masks[0]),
        PRECISION=_precision(q),
        **chosen,
    )


def _attention_backward(
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
    """dq, dk, dv, dextra_k, dextra_v, dmask; of size 0 where there is nothing to differentiate."""
    n, length, heads, _ = q.shape
    keys, extra_keys = k.shape[1], 0 if extra_k is None else extra_k.shape[1]
    dq, dk, dv, dextra_k, dextra_v, dmask = _gradients(
        q, k, v, extra_k, extra_v, mask, mask_gradient
    )
    if q.numel() == 0 or keys + extra_keys == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), dextra_k.zero_(), dextra_v.zero_(), dmask.zero_()
    dout, q, k, v = _dense(dout), _dense(q), _dense(k), _dense(v)
    if extra_k is not None and extra_v is not None:
        extra_k, extra_v = _dense(extra_k), _dense(extra_v)
    unit, masks = _unit(dout, q, k, v, extra_k, extra_v), _masks(mask, q, keys, extra_keys)
    sums = _row_sums(dout, out, unit)
    for some_k, some_v, some_mask, some_dk, some_dv in (
        (k, v, masks[0], dk, dv),
        (extra_k, extra_v, masks[1], dextra_k, dextra_v),
    ):
        if some_k is not None and some_v is not None:
            _keys_gradient(
                (dout, q, some_k, some_v),
                some_mask,
                (*_split_sums(lse), sums),
                (some_dk, some_dv),
                scale,
                unit,
            )
    dscores = None
    if mask_gradient:
        dscores = sums.new_empty(n, heads, length, keys + extra_keys)
    _queries_gradient(
        (dout, q, k, v, extra_k, extra_v),
        masks,
        (*_split_sums(lse), sums),
        dq,
        dscores,
        scale,
        unit,
    )
    if keys + extra_keys == 1:  # the softmax of one score is 1, whatever the score
        for gradient in (dq, dk, dextra_k):
            gradient.zero_()
    if mask is not None and dscores is not None:
        dmask = dscores.sum_to_size(mask.shape).to(mask.dtype)
    return dq, dk, dv, dextra_k, dextra_v, dmask


def _gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    mask: Tensor | None,
    mask_gradient: bool,
) -> tuple[Tensor, ...]:
    """Room for the gradients, contiguous."""

    def like(x: Tensor | None) -> Tensor:
        return torch.empty((0,) if x is None else x.shape, dtype=q.dtype, device=q.device)

    if mask is None or not mask_gradient:
        dmask = like(None)
    else:
        dmask = torch.empty(mask.shape, dtype=mask.dtype, device=q.device)
    return (*(like(x) for x in (q, k, v, extra_k, extra_v)), dmask)


def _row_sums(dout: Tensor, out: Tensor, unit: int) -> Tensor:
    n, length, heads, d = out.shape
    sums = torch.empty(n, heads, length, dtype=torch.float32, device=out.device)
    rows, columns = n * length * heads, next_power_of_2(d)
    per_program = max(1, 4096 // columns)
    launch(
        _row_sums_kernel,
        (cdiv(rows, per_program),),
        dout,
        out,
        sums,
        _strides(dout, unit),
        length,
        heads,
        rows,
        D=d,
        UNIT=unit,
        ROWS=per_program,
        COLUMNS=columns,
    )
    return sums


def _keys_gradient(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    mask: Tensor | None,
    numbers: tuple[Tensor, Tensor | None, Tensor],
    gradients: tuple[Tensor, Tensor],
    scale: float,
    unit: int,
) -> None:
    """dK and dV. Few keys do not fill the GPU: then the queries are cut into stretches, whose sums
    are added in order."""
    _, q, k, _ = tensors
    (n, length, heads, d), keys = q.shape, k.shape[1]
    if keys == 0:
        return
    chosen = _tiles("attention_backward_keys", q, mask)
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
        *(_strides(x, unit) for x in tensors),
        _stride_of(mask),
        length,
        keys,
        heads,
        n,
        stretch,
        scale * LOG2_E,
        scale,
        D=d,
        UNIT=unit,
        WIDTHS=_pieces(_columns(d, chosen["SPLIT"]), 16),
        MASK=_kind(mask),
        PRECISION=_precision(q),
        **chosen,
    )
    if stretches > 1:
        for gradient, parts in zip(gradients, partial, strict=True):
            gradient.copy_(parts.sum(0))


def _queries_gradient(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    masks: Masks,
    numbers: tuple[Tensor, Tensor | None, Tensor],
    dq: Tensor,
    dscores: Tensor | None,
    scale: float,
    unit: int,
) -> None:
    _, q, k, _, extra_k, _ = tensors
    n, length, heads, d = q.shape
    chosen = _tiles("attention_backward_queries", q, masks[0])
    launch(
        _queries_gradient_kernel,
        (cdiv(length, chosen["BLOCK_M"]) * chosen["SPLIT"] * n * heads,),
        *tensors,
        *masks,
        *numbers,
        dq,
        dscores,
        *(_strides(x, unit) for x in tensors),
        _stride_of(masks[0]),
        length,
        k.shape[1],
        0 if extra_k is None else extra_k.shape[1],
        heads,
        scale * LOG2_E,
        scale,
        D=d,
        UNIT=unit,
        WIDTHS=_pieces(_columns(d, chosen["SPLIT"]), 16),
        MASK=_kind(masks[0]),
        PRECISION=_precision(q),
        **chosen,
    )


# What the configs are tuned and compiled for

REAL_SHAPES = {
    24: (2, 1024, 8),
    32: (2, 4096, 14),
    40: (2, 4096, 8),
    48: (2, 1024, 8),
    64: (2, 4096, 10),
    72: (2, 256, 16),
    80: (2, 1024, 8),
    96: (2, 1024, 8),
    128: (2, 1024, 8),
    144: (2, 256, 8),
    160: (2, 256, 8),
    192: (2, 256, 4),
    256: (8, 256, 1),
    512: (1, 4096, 1),
}
"""Head dim -> (N, L, H) of a model with it: SD 1.5, SDXL, LDM, DiT, IDDPM, DDPM, the VAE."""


def _packed(shape_class: str, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    d = int(shape_class.partition("/")[2])
    n, length, heads = REAL_SHAPES[d]
    return torch.empty(n, length, 3, heads, d, dtype=dtype, device=device).unbind(2)


def _candidates(shape_class: str, dtype: torch.dtype) -> Iterator[Config]:
    kept: list[Config] = [{}] if dtype != torch.float32 else []
    streamed = [{"CHUNK": 32, "SPLIT": split} for split in (1, 2, 4, 8)]
    d = int(shape_class.partition("/")[2])
    for m, n in ((64, 32), (64, 64), (128, 32), (128, 64), (128, 128), (32, 64), (32, 32)):
        for warps in (4, 8):
            for stages in (1, 2, 3):
                for option in streamed if d == SINGLE_HEAD or not kept else kept:
                    tile = {"BLOCK_M": m, "BLOCK_N": n, **option}
                    yield {**tile, "num_warps": warps, "num_stages": stages}


def _calls(shape_class: str, dtype: torch.dtype, device: str) -> list[Callable[[], Any]]:
    q, k, v = _packed(shape_class, dtype, device)
    out, lse = torch.empty(q.shape, dtype=dtype, device=device), _room_for_sums(q)
    calls: list[Callable[[], Any]] = [lambda: _streaming(q, k, v, None, None, None, out, lse, 0.1)]
    if shape_class == "self/64":
        mask = torch.empty(k.shape[1], dtype=torch.bool, device=device)
        text = torch.empty(2, q.shape[0], 80, *q.shape[2:], dtype=dtype, device=device)
        calls.append(lambda: _streaming(q, k, v, None, None, mask, out, lse, 0.1))
        calls.append(lambda: _streaming(q, k, v, text[0], text[1], None, out, lse, 0.1))
    return calls


def _keys_calls(shape_class: str, dtype: torch.dtype, device: str) -> list[Callable[[], Any]]:
    q, k, v = _packed(shape_class, dtype, device)
    dout = torch.empty(q.shape, dtype=dtype, device=device)
    lse = _room_for_sums(q)
    numbers = (*_split_sums(lse), lse[0])
    text = torch.empty(2, q.shape[0], 77, *q.shape[2:], dtype=dtype, device=device)
    room = (torch.empty_like(dout), torch.empty_like(dout)), (text[0], text[1])
    calls: list[Callable[[], Any]] = [
        lambda: _keys_gradient((dout, q, k, v), None, numbers, room[0], 0.1, 8)
    ]
    if shape_class == "self/64":
        seen = torch.empty(77, dtype=torch.uint8, device=device)
        mask = seen.expand(q.shape[0], q.shape[2], q.shape[1], 77)
        calls.append(lambda: _keys_gradient((dout, q, *text), mask, numbers, room[1], 0.1, 8))
        calls.append(lambda: _row_sums(dout, q.contiguous(), 8))
    return calls


def _queries_calls(shape_class: str, dtype: torch.dtype, device: str) -> list[Callable[[], Any]]:
    q, k, v = _packed(shape_class, dtype, device)
    dout, dq = torch.empty(2, *q.shape, dtype=dtype, device=device)
    lse = _room_for_sums(q)
    numbers = (*_split_sums(lse), lse[0])
    no_mask = None, None
    calls: list[Callable[[], Any]] = [
        lambda: _queries_gradient((dout, q, k, v, None, None), no_mask, numbers, dq, None, 0.1, 8)
    ]
    if shape_class == "self/64":
        text = torch.empty(2, q.shape[0], 80, *q.shape[2:], dtype=dtype, device=device)
        masks = _masks(torch.empty(k.shape[1] + 80, dtype=dtype, device=device), q, k.shape[1], 80)
        dscores = torch.empty(*lse[0].shape, k.shape[1] + 80, device=device)
        calls.append(
            lambda: _queries_gradient(
                (dout, q, k, v, text[0], text[1]), masks, numbers, dq, dscores, 0.1, 8
            )
        )
    return calls


def _context_candidates(shape_class: str, dtype: torch.dtype) -> Iterator[Config]:
    yield STREAMS
    for m in (64, 128):
        for warps in (4, 8):
            for stages in (1, 2):
                yield {"BLOCK_M": m, "num_warps": warps, "num_stages": stages}


def _context_calls(shape_class: str, dtype: torch.dtype, device: str) -> list[Callable[[], Any]]:
    keys, d = (int(number) for number in shape_class.split("/"))
    n, length, heads = REAL_SHAPES[d]
    q = torch.empty(n, length, heads, d, dtype=dtype, device=device)
    k, v = torch.empty(2, n, keys - 3, heads, d, dtype=dtype, device=device)
    calls = [lambda: _attention(q, k, v, None, None, None, 0.1)]
    if shape_class == "80/64":
        mask = torch.empty(n, 1, 1, keys - 3, dtype=torch.bool, device=device)
        calls.append(lambda: _attention(q, k, v, None, None, mask, 0.1))
    return calls


HALF = (torch.float16, torch.bfloat16)


def _has_dtype(shape_class: str, dtype: torch.dtype) -> bool:
    return shape_class.startswith("fp32") == (dtype == torch.float32)


FULL_PRECISION = tuple(f"fp32/{d}" for d in FULL_PRECISION_DIMS)
define_tunable(
    Tunable(
        name="attention",
        shape_classes=(*(f"self/{d}" for d in HEAD_DIMS), *FULL_PRECISION),
        candidates=_candidates,
        calls=_calls,
        takes=_has_dtype,
    )
)
define_tunable(
    Tunable(
        name="attention_context",
        shape_classes=tuple(f"{keys}/{d}" for keys in CONTEXTS for d in CONTEXT_DIMS),
        candidates=_context_candidates,
        calls=_context_calls,
        dtypes=HALF,
    )
)
for _name, _gradient_calls in (("keys", _keys_calls), ("queries", _queries_calls)):
    define_tunable(
        Tunable(
            name=f"attention_backward_{_name}",
            shape_classes=(*(f"self/{d}" for d in BACKWARD_DIMS), *FULL_PRECISION),
            candidates=_candidates,
            calls=_gradient_calls,
            takes=_has_dtype,
        )
    )

# Registration

attention_triton = torch.library.custom_op(
    "fastdiff::attention_triton", _attention, mutates_args=()
)
attention_backward_triton = torch.library.custom_op(
    "fastdiff::attention_backward_triton", _attention_backward, mutates_args=()
)


@attention_triton.register_fake
def _attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), _room_for_sums(q)


@attention_backward_triton.register_fake
def _attention_backward_fake(
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
) -> tuple[Tensor, ...]:
    return _gradients(q, k, v, extra_k, extra_v, mask, mask_gradient)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.scale = scale


def _differentiate(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, out, lse = ctx.saved_tensors
    found = attention_backward_triton(dout, *inputs, out, lse, ctx.scale, ctx.needs_input_grad[5])
    gradients = zip(found, ctx.needs_input_grad, strict=False)
    return (*(x if needed else None for x, needed in gradients), None)


attention_triton.register_autograd(_differentiate, setup_context=_keep)


def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    scale = q.shape[3] ** -0.5 if scale is None else scale
    out: Tensor = attention_triton(q, k, v, extra_k, extra_v, mask, scale)[0]
    return out


def _why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> str | None:
    d = q.shape[3]
    if d % 8 or (d > WIDEST and d != SINGLE_HEAD):
        return (
            f"it takes head dims that are multiples of 8 up to {WIDEST}, and {SINGLE_HEAD}, "
            f"got {d}; pad the heads with zeros and pass scale={d}**-0.5"
        )
    if scale is not None and not scale > 0:
        return f"it takes a scale > 0, got {scale}; negate q"
    return why_not_tensors(q, mask)


_op = define_op("attention", attention_reference)
register(_op, _triton, _why_not)
_attention_cuda.register(_op, attention_backward_triton)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    mask: Tensor | None,
) -> None:
    check_floating("attention", "q", q)
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(
            "attention: q and k must be (N, L, H, D) and (N, S, H, D), "
            f"got {tuple(q.shape)} and {tuple(k.shape)}; split the heads first"
        )
    n, length, heads, dim = q.shape
    keys = k.shape[1]
    if k.shape != (n, keys, heads, dim) or v.shape != k.shape:
        raise ValueError(
            f"attention: k and v must be (N, S, H, D) with N={n}, H={heads}, D={dim} as in q, "
            f"got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if q.dtype != k.dtype or q.dtype != v.dtype:
        raise ValueError(
            f"attention: q, k, v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if (extra_k is None) != (extra_v is None):
        raise ValueError("attention: extra_k and extra_v come together, got one of them")
    if extra_k is not None and extra_v is not None:
        extra = extra_k.shape[1] if extra_k.ndim == 4 else 0
        if extra_k.shape != (n, extra, heads, dim) or extra_v.shape != extra_k.shape:
            raise ValueError(
                f"attention: extra_k and extra_v must be (N, T, H, D) with N={n}, H={heads}, "
                f"D={dim} as in q, got {tuple(extra_k.shape)} and {tuple(extra_v.shape)}"
            )
        if extra_k.dtype != q.dtype or extra_v.dtype != q.dtype:
            raise ValueError(
                f"attention: extra_k and extra_v must have the dtype of q, {q.dtype}, "
                f"got {extra_k.dtype} and {extra_v.dtype}"
            )
        keys += extra
    if mask is not None:
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise ValueError(
                f"attention: mask must be bool or floating point, got {mask.dtype}; "
                "use mask.bool() if 1 marks the keys that may be seen"
            )
        full = (n, heads, length, keys)
        last = zip(reversed(mask.shape), reversed(full), strict=False)
        if mask.ndim > 4 or any(have not in (1, want) for have, want in last):
            raise ValueError(
                f"attention: mask must broadcast to (N, H, L, S) = {full}, got {tuple(mask.shape)}"
                + ("" if extra_k is None else "; S counts the extra keys, which come last")
            )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Scaled dot-product attention: ``softmax(scale * q k^T + mask) v`` per sample and head.

    Args:
        q: (N, L, H, D), fp64/fp32/fp16/bf16, any strides (a view of a packed QKV is fine).
        k, v: (N, S, H, D), the dtype of q, any strides.
        extra_k, extra_v: (N, T, H, D), keys and values that are seen after those of k and v, as if
            concatenated to them (GLIDE's text tokens beside the image's).
        mask: broadcasts to (N, H, L, S + T); bool, True where a key may be seen, or floating point,
            added to the score. A query that may see no key gets zeros.
        scale: factor of the scores; None is 1 / sqrt(D).

    Returns:
        (N, L, H, D), contiguous, in the dtype of q. Differentiable in all tensors but a
        bool mask. The gradient of a mask needs N * H * L * (S + T) fp32 numbers on the way.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    Vaswani et al. 2017, eq. 1.
    """
    _check(q, k, v, extra_k, extra_v, mask)
    result: Tensor = _op(q, k, v, extra_k=extra_k, extra_v=extra_v, mask=mask, scale=scale)
    return result
