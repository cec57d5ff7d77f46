"""Device functions and launch helpers shared by the Triton kernels of `attention`.

A tile of rows is a tuple of pieces, one per width, since the sides of a Triton tile are powers of
two. `inside` marks the rows that exist, as (rows, 1). Strides are tuples (sample, token, head) in
units of 8 elements: multiplying by 8 tells the compiler that rows are aligned to 16 bytes. MASK is
0 without a mask, 1 for a bool mask stored as bytes, 2 for an additive mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..triton import INTERPRETED, cdiv, constexpr_function, jit, tl
from ..tuning import Config, config, gpu_of

NO_MASK, SEEN, ADDED = 0, 1, 2

# Device functions


@constexpr_function
def _begin(widths: tuple[int, ...], i: int) -> int:
    """First column of piece i."""
    return sum(widths[:i])


@constexpr_function
def _beyond(widths: tuple[int, ...], i: int, columns: int) -> bool:
    """Whether piece i extends beyond the columns that exist."""
    return sum(widths[: i + 1]) > columns


@constexpr_function
def columns_of(d: int, split: int) -> int:
    """Columns per program: D, or for `split` > 1 an equal share rounded up to a multiple of 16."""
    return d if split == 1 else (d + 16 * split - 1) // (16 * split) * 16


@constexpr_function
def known_columns(d: int, split: int) -> int:
    """`columns_of` if all programs have equally many columns, else 0."""
    share = columns_of(d, split)
    return share if share * split == d else 0


@jit
def no_pieces() -> tl.tensor:
    return ()


@jit
def zeros(ROWS: tl.constexpr, WIDTH: tl.constexpr) -> tl.tensor:
    return tl.zeros((ROWS, WIDTH), tl.float32)


@jit
def zero_pieces(ROWS: tl.constexpr, WIDTHS: tl.constexpr) -> tl.tensor:
    pieces = no_pieces()
    for i in tl.static_range(len(WIDTHS)):
        pieces += (zeros(ROWS, WIDTHS[i]),)
    return pieces


@jit
def rows_of(
    x: tl.tensor, strides: tl.tensor, n: tl.tensor, h: tl.tensor, row: tl.tensor
) -> tl.tensor:
    """Pointers to the rows of one sample and head, (rows, 1)."""
    head = x + (n * strides[0] + h * strides[2]) * 8
    return head + (row.to(tl.int64)[:, None] * strides[1]) * 8


@jit
def load_pieces(
    rows: tl.tensor,
    inside: tl.tensor,
    limit: tl.tensor,
    KNOWN: tl.constexpr,
    WIDTHS: tl.constexpr,
    GUARD: tl.constexpr,
) -> tl.tensor:
    """Load the pieces of rows, with 0 from column `limit` on; the first KNOWN columns always exist.

    GUARD: some rows may not exist, and load as 0 too.
    """
    pieces = no_pieces()
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
def store_pieces(
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
def product(a: tl.tensor, b: tl.tensor, total: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """total + a b^T, summed over the pieces."""
    for i in tl.static_range(len(a)):
        total = tl.dot(a[i], tl.trans(b[i]), total, input_precision=PRECISION)
    return total


@jit
def streamed_product(
    a: tl.tensor,
    a_inside: tl.tensor,
    b: tl.tensor,
    b_inside: tl.tensor,
    total: tl.tensor,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """`product` for rows too wide to keep on the chip: loads CHUNK columns at a time."""
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
def accumulate(
    total: tl.tensor, factor: tl.tensor, a: tl.tensor, b: tl.tensor, PRECISION: tl.constexpr
) -> tl.tensor:
    """total * factor + a b, piece by piece.

    fp32 is added outside the matrix unit, with an fma that the compiler does not merge into the
    product: the unit truncates its sums (Ootomo and Yokota 2022), an error that would become
    visible over thousands of keys.
    """
    pieces = no_pieces()
    for i in tl.static_range(len(total)):
        if a.dtype == tl.float32:
            more = tl.dot(a, b[i], input_precision=PRECISION)
            pieces += (tl.fma(total[i], tl.zeros_like(more) + factor, more),)
        else:
            pieces += (tl.dot(a, b[i], total[i] * factor),)
    return pieces


@jit
def weights(
    scores: tl.tensor, top: tl.tensor, unit: tl.tensor, FULL_PRECISION: tl.constexpr
) -> tl.tensor:
    """exp2(unit * (scores - top)), as a single fma if the result is rounded to half precision.

    Scores in the hundreds carry errors of 1e-5 in fp32; their difference to the largest does not.
    """
    return tl.exp2((scores - top) * unit if FULL_PRECISION else scores * unit - top * unit)


@jit
def keep_sums(
    lse: tl.tensor,
    tops: tl.tensor,
    at: tl.tensor,
    top: tl.tensor,
    weight: tl.tensor,
    unit: tl.tensor,
    inside: tl.tensor,
) -> None:
    """Store log2 of the sum of exp2 for the backward pass, or that relative to top, and top."""
    some = weight > 0
    log = tl.where(some, tl.log2(weight), float("inf"))
    if tops is None:
        tl.store(lse + at, top * unit + log, inside)
    else:
        tl.store(lse + at, log, inside)
        tl.store(tops + at, tl.where(some, top, 0.0), inside)


@jit
def kept_sums(
    lse: tl.tensor, tops: tl.tensor, at: tl.tensor, inside: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Load what `keep_sums` stored; inf for queries that do not exist, so that P is 0."""
    log = tl.load(lse + at, inside, other=float("inf"))
    top = 0.0
    if tops is not None:
        top = tl.load(tops + at, inside, other=0.0)
    return log, top


@jit
def weights_again(
    scores: tl.tensor,
    log: tl.tensor,
    top: tl.tensor,
    unit: tl.tensor,
    FULL_PRECISION: tl.constexpr,
) -> tl.tensor:
    """Recompute P in the backward pass."""
    return tl.exp2(((scores - top) * unit if FULL_PRECISION else scores * unit) - log)


@jit
def mask_at(
    mask: tl.tensor,
    strides: tl.tensor,
    n: tl.tensor,
    h: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
) -> tl.tensor:
    """Pointers into the mask. Offsets in a head fit 32 bits (see `masks_of`); 64 bits spilled."""
    head = mask + n * strides[0] + h * strides[1]
    return head + (row * strides[2] + column * strides[3])


@jit
def masked(scores: tl.tensor, at: tl.tensor, inside: tl.tensor, MASK: tl.constexpr) -> tl.tensor:
    """Apply the mask loaded from `at` to scores in log2 units.

    A finite mask value stays finite, which fp32's most negative number times log2(e) would not: a
    query whose keys all have that value attends to them equally.
    """
    value = tl.load(at, inside, other=0)
    if MASK == 1:
        scores = tl.where(value != 0, scores, float("-inf"))
    else:
        added = value.to(tl.float32)
        low = tl.where(added == float("-inf"), added, -3e38)
        scores += tl.where(added < -2e38, low, added * 1.4426950408889634)  # NaN stays NaN
    return scores


# Launchers

HEAD_DIMS = (24, 32, 40, 48, 64, 72, 80, 96, 128, 144, 160, 192, 256, 512)
"""Head dims of real models, each with a config; any other takes the config of the next larger."""
WIDEST, SINGLE_HEAD = 256, 512
BACKWARD_DIMS = (40, 64, 80, 128, 160, 256, 512)
FULL_PRECISION_DIMS = (64, 256, 512)
PROGRAMS = 512
"""Programs that fill a GPU: about four on each of its 80 to 150 multiprocessors."""
LOG2_E = 1.4426950408889634


def next_of(value: int, known: tuple[int, ...]) -> int | None:
    return next((each for each in known if each >= value), None)


def pieces_of(columns: int, smallest: int = 8) -> tuple[int, ...]:
    """Descending powers of two that sum to `columns` rounded up to a multiple of `smallest`."""
    columns = cdiv(columns, smallest) * smallest
    return tuple(1 << bit for bit in reversed(range(columns.bit_length())) if columns >> bit & 1)


def precision_of(x: Tensor) -> str:
    """How fp32 tiles are multiplied: as three TF32 products on NVIDIA's matrix unit, like PyTorch's
    memory-efficient attention; AMD's matrix unit and the interpreter multiply fp32 natively."""
    split = gpu_of(x.device).architecture.startswith("sm_") and not INTERPRETED
    return "tf32x3" if split and x.dtype == torch.float32 else "ieee"


def aligned(x: Tensor) -> Tensor:
    """x if its rows are dense and aligned to 16 bytes, else a contiguous copy.

    Loading 2 bytes at a time, once for every tile, would take longer than the copy.
    """
    steps = [step for size, step in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1]
    fits = x.stride(3) == 1 and x.data_ptr() % 16 == 0 and all(step % 8 == 0 for step in steps)
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def strides_of(x: Tensor | None) -> tuple[int, int, int] | None:
    return None if x is None else (x.stride(0) // 8, x.stride(1) // 8, x.stride(2) // 8)


WIDEST_MASK = 2**31 - 1
"""Most elements that one head of a mask may span: offsets are 32-bit."""


def span_of_head(mask: Tensor) -> int:
    """Elements from the first to the last of one head of a mask (N, H, L, S)."""
    return (mask.shape[2] - 1) * mask.stride(2) + (mask.shape[3] - 1) * mask.stride(3)


Masks = tuple[Tensor | None, Tensor | None]
"""The mask as a kernel sees it: a view (N, H, L, S) and, for extra keys, a view (N, H, L, T)."""


def masks_of(mask: Tensor | None, q: Tensor, keys: int, extra_keys: int) -> Masks:
    if mask is None:
        return None, None
    n, length, heads, _ = q.shape
    full = mask.expand(n, heads, length, keys + extra_keys)
    if span_of_head(full) > WIDEST_MASK:
        full = mask.contiguous().expand(full.shape)
    full = full.view(torch.uint8) if mask.dtype == torch.bool else full
    return full[..., :keys], full[..., keys:] if extra_keys else None


def kind_of(mask: Tensor | None) -> int:
    if mask is None:
        return NO_MASK
    return SEEN if mask.dtype == torch.uint8 else ADDED


def mask_strides_of(mask: Tensor | None) -> tuple[int, ...] | None:
    return None if mask is None else mask.stride()


def shape_class_of(q: Tensor, known: tuple[int, ...]) -> str:
    d = q.shape[3]
    if q.dtype == torch.float32:
        return f"fp32/{next_of(d, FULL_PRECISION_DIMS)}"
    return f"self/{next_of(d, known)}"


def class_dim(shape_class: str) -> int:
    """The head dim in the name of a shape class."""
    return int(shape_class.partition("/")[2])


def tiles_for(name: str, q: Tensor, mask: Tensor | None) -> Config:
    """The config to launch with. A mask needs registers, so it halves the rows of the tiles that
    are streamed; the tiles that stay on the chip keep the 64 rows that wgmma needs."""
    known = HEAD_DIMS if name == "attention" else BACKWARD_DIMS
    shape_class = shape_class_of(q, known)
    chosen = {"CHUNK": 0, "SPLIT": 1, **config(name, q, shape_class)}
    columns = cdiv(class_dim(shape_class), chosen["SPLIT"])
    chosen["SPLIT"] = cdiv(q.shape[3], columns)  # no program without columns of its own
    if mask is not None:
        streams = "BLOCK_M" if name == "attention_backward_keys" else "BLOCK_N"
        chosen[streams] = max(16, chosen[streams] // 2)
    return chosen


def room_for_sums(q: Tensor, mask: Tensor | None, room: Tensor | None = None) -> Tensor:
    """Memory for the softmax sums, (numbers, N, H, L) fp32, taken from `room` if that is given.

    Two numbers per query if a score may be too large to be added to a sum: fp32 needs the digits,
    and an additive mask may be -3e38 for all keys of a query.
    """
    n, length, heads, _ = q.shape
    added = mask is not None and mask.dtype != torch.bool
    numbers = 2 if added or q.dtype == torch.float32 else 1
    if room is not None:
        return room[:numbers]
    return torch.empty(numbers, n, heads, length, dtype=torch.float32, device=q.device)


def split_sums(lse: Tensor) -> tuple[Tensor, Tensor | None]:
    return lse[0], lse[1] if len(lse) == 2 else None
