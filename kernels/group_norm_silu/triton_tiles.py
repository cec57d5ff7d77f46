"""Shared by the Triton kernels of `group_norm_silu` and `add_group_norm_silu`.

To the kernels a tensor is (N, C, S): element (n, c, s) is at n * C * S + c * column_stride + s *
row_stride, where one of the strides is 1. A tile has ROWS positions of space and COLUMNS channels,
so NCHW and NHWC differ only in the proportions of the tile.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd

import torch
from torch import Tensor

from ..triton import cdiv, jit, next_power_of_2, tl
from ..tuning import config
from ..views import memory_format_of


@jit
def group_totals(
    numbers: tl.tensor, SIZE: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr
) -> tl.tensor:
    """For each column, the sum over its group of SIZE columns; there are at most GROUPS groups."""
    if GROUPS == 1:
        totals = tl.sum(numbers, 0) + tl.zeros_like(numbers)
    else:
        group = tl.arange(0, COLUMNS) // SIZE
        member = group[:, None] == tl.arange(0, GROUPS)[None, :]
        of_group = tl.sum(tl.where(member, numbers[:, None], 0.0), 0)
        totals = tl.sum(tl.where(member, of_group[None, :], 0.0), 1)
    return totals


@jit
def sums_of_groups(tile: tl.tensor, member: tl.tensor, GROUPS: tl.constexpr) -> tl.tensor:
    """The sum of a tile over the columns of each group, (GROUPS,).

    member: (columns, GROUPS), whether a column is of a group.
    """
    if GROUPS == 1:
        sums = tl.sum(tile) + tl.zeros((1,), tl.float32)
    else:
        sums = tl.sum(tl.where(member, tl.sum(tile, 0)[:, None], 0.0), 0)
    return sums


@jit
def of_columns(values: tl.tensor, member: tl.tensor) -> tl.tensor:
    """The value of each column's group; 0 for a column of none."""
    return tl.sum(tl.where(member, values[None, :], 0.0), 1)


@jit
def groups_of(
    tile: tl.tensor, SIZE: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr
) -> tl.tensor:
    """The GROUPS groups from that of a tile's first column on; the last may lie outside of it."""
    return tile * COLUMNS // SIZE + tl.arange(0, GROUPS)


@jit
def numbers_of(
    group: tl.tensor,
    tile: tl.tensor,
    rows: tl.tensor,
    channels: tl.tensor,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """How many numbers of a group are in `rows` rows of a tile, 0 if it is elsewhere."""
    first = tl.maximum(group * SIZE, tile * COLUMNS)
    end = tl.minimum(tl.minimum(group * SIZE + SIZE, tile * COLUMNS + COLUMNS), channels)
    return (tl.maximum(end - first, 0) * rows).to(tl.float32)


@jit
def load_tile(pointers: tl.tensor, inside: tl.tensor, POLICY: tl.constexpr) -> tl.tensor:
    """Load in fp32, 0 outside; inside is None if all is. POLICY: how the L2 evicts it."""
    if inside is None:
        numbers = tl.load(pointers, eviction_policy=POLICY)
    else:
        numbers = tl.load(pointers, inside, other=0.0, eviction_policy=POLICY)
    return numbers.to(tl.float32)


@jit
def film_scale(
    scale_shift: tl.tensor,
    sample: tl.tensor,
    channel: tl.tensor,
    channels: tl.tensor,
    known: tl.tensor,
) -> tl.tensor:
    """1 + scale of each channel."""
    film = known.to(tl.float32)
    if scale_shift is not None:
        source = scale_shift + sample * (2 * channels) + channel
        film = 1.0 + tl.load(source, known, other=0.0).to(tl.float32)
    return film


@jit
def affine(
    weight: tl.tensor,
    bias: tl.tensor,
    scale_shift: tl.tensor,
    sample: tl.tensor,
    channel: tl.tensor,
    channels: tl.tensor,
    known: tl.tensor,
) -> tl.tensor:
    """Weight, bias and FiLM, which follow the norm, as one scale and one shift per channel."""
    film = film_scale(scale_shift, sample, channel, channels, known)
    scale = film
    shift = tl.zeros_like(film)
    if weight is not None:
        scale = film * tl.load(weight + channel, known, other=0.0).to(tl.float32)
    if bias is not None:
        shift = film * tl.load(bias + channel, known, other=0.0).to(tl.float32)
    if scale_shift is not None:
        source = scale_shift + sample * (2 * channels) + channels + channel
        shift += tl.load(source, known, other=0.0).to(tl.float32)
    return scale, shift


# Regimes and tiles


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of (N, C, S) and its layout in memory."""

    samples: int
    channels: int
    space: int
    size: int
    """Channels per group."""
    layout: str

    @property
    def strides(self) -> tuple[int, int]:
        """(row_stride, column_stride)."""
        return (self.channels, 1) if self.layout == "nhwc" else (1, self.space)


def shape_of(x: Tensor, num_groups: int) -> Shape:
    """The shape of a tensor that is dense in its `memory_format_of`."""
    n, c = x.shape[:2]
    space = x[0, 0].numel()
    nhwc = space == 1 or memory_format_of(x) != torch.contiguous_format
    return Shape(
        samples=n,
        channels=c,
        space=space,
        size=c // num_groups,
        layout="nhwc" if nhwc else "nchw",
    )


def whole_groups(
    shape: Shape, rows: int, itemsize: int, *, segment: int, least: int, most: int
) -> int | None:
    """How many groups one program handles, or None if even the smallest tile exceeds `most`.

    In NHWC a row of the tile must consist of whole 16-byte loads (4 groups of 10 bf16 channels, for
    example) and span at least `segment` bytes, or 32 if that is too many. The number of groups is
    then doubled as long as the tile has at most `least` elements.
    """
    size, groups = shape.size, shape.channels // shape.size
    area = lambda count: rows * next_power_of_2(count * size)  # noqa: E731
    step, count = 16 // gcd(16, size * itemsize), 1
    for wanted in (segment, 32):
        if shape.layout == "nhwc":
            count = min(groups, step * cdiv(wanted, step * size * itemsize))
        if area(count) <= most:
            while count * 2 <= groups and area(count * 2) <= least:
                count *= 2
            return count
    return None


def group_constants(shape: Shape, count: int, columns: int) -> dict[str, int]:
    """Constants of a kernel whose programs handle `count` whole groups."""
    return {
        "CHANNELS": count * shape.size,
        "SIZE": shape.size,
        "GROUPS": next_power_of_2(count),
        "COLUMNS": columns,
    }


def small_regime(
    name: str, x: Tensor, shape: Shape, *, share: int = 1
) -> tuple[int, dict[str, int]] | None:
    """Programs and constants of the one-launch regime, or None if a sample is too large.

    share: 1 / share of a program's registers is available for the tile.
    """
    chosen = config(name, x, f"{shape.layout}/small")
    rows = next_power_of_2(shape.space)
    limits = {
        "segment": chosen["SEGMENT"],
        "least": chosen["LEAST"],
        "most": chosen["MOST"] // share,
    }
    count = whole_groups(shape, rows, x.element_size(), **limits)
    if count is None or x[0].numel() >= 2**31:  # offsets in a sample are 32-bit
        return None
    columns = next_power_of_2(count * shape.size)
    warps = next_power_of_2(rows * columns // (32 * chosen["PER_THREAD"]))
    constants = group_constants(shape, count, columns)
    constants |= {"ROWS": rows, "num_warps": min(16, max(4, warps))}
    return shape.samples * cdiv(shape.channels, constants["CHANNELS"]), constants


MOST_SPLIT = 8
"""Programs that compute the same statistics, at most."""


def split_small(
    name: str, x: Tensor, shape: Shape, programs: int, constants: dict[str, int]
) -> tuple[int, dict[str, int]]:
    """Programs and constants of the forward pass's one launch.

    While there are fewer programs than FILL, the rows of the result are split; the statistics are
    not, so no bit of them depends on the number of samples.
    """
    fill = config(name, x, f"{shape.layout}/small")["FILL"]
    rows, columns, split = constants["ROWS"], constants["COLUMNS"], 1
    while programs * split < fill and split < min(rows, MOST_SPLIT):
        split *= 2
    full = rows == shape.space
    whole = full and columns == constants["CHANNELS"] and shape.channels % columns == 0
    return programs * split, constants | {"FULL": full, "WHOLE": whole, "SPLIT": split}


@dataclass(frozen=True, kw_only=True)
class Large:
    """How the large regime splits a sample. Nothing here depends on the number of samples."""

    chunks: int
    steps: int
    """Tiles per chunk."""
    tile: dict[str, int]
    """ROWS, COLUMNS and num_warps of the kernels that compute sums."""
    apply_tile: dict[str, int]
    programs: int
    """Programs that compute the sums of one sample."""
    apply_programs: int
    finalize_programs: int
    finalize: dict[str, int]
    samples: int
    """Samples that pass through all kernels before the next are read, so that they fit the L2."""

    @property
    def chunk_rows(self) -> int:
        return self.steps * self.tile["ROWS"]


def tile_of(shape: Shape, numbers: int, widest: int) -> tuple[int, int]:
    """Rows and columns of a tile of `numbers` elements, as long as possible along memory."""
    if shape.layout == "nchw":
        rows = min(numbers, next_power_of_2(shape.space))
        return rows, min(numbers // rows, next_power_of_2(shape.channels))
    widest = min(widest, next_power_of_2(shape.channels))
    tried = [columns for columns in (widest, widest // 2) if columns]
    columns = min(tried, key=lambda columns: (cdiv(shape.channels, columns) * columns, -columns))
    return min(numbers // columns, next_power_of_2(shape.space)), columns


def large_regime(name: str, x: Tensor, shape: Shape) -> Large:
    chosen = config(name, x, f"{shape.layout}/large")
    rows, columns = tile_of(shape, chosen["TILE"], chosen["COLUMNS"])
    apply_rows, apply_columns = tile_of(shape, chosen["APPLY_TILE"], chosen["COLUMNS"])
    tiles = cdiv(shape.channels, columns)
    blocks = cdiv(shape.space, rows)
    steps = max(cdiv(blocks * tiles, chosen["PROGRAMS"]), cdiv(chosen["CHUNK"], rows))
    chunks = cdiv(blocks, steps)
    merged = replace(shape, layout="nhwc")  # the partial sums are (chunks, C), fp32
    numbers = chosen["FINALIZE"]
    count = whole_groups(merged, 16, 4, segment=64, least=numbers // 2, most=numbers) or 1
    widest = min(next_power_of_2(count * shape.size), numbers)
    warps = {"num_warps": chosen["num_warps"]}
    return Large(
        chunks=chunks,
        steps=steps,
        tile={"ROWS": rows, "COLUMNS": columns, **warps},
        apply_tile={"ROWS": apply_rows, "COLUMNS": apply_columns, **warps},
        programs=chunks * tiles,
        apply_programs=cdiv(shape.space, apply_rows) * cdiv(shape.channels, apply_columns),
        finalize_programs=cdiv(shape.channels, count * shape.size),
        finalize=group_constants(shape, count, widest) | {"ROWS": numbers // widest, **warps},
        samples=max(1, chosen["L2_MIB"] * 2**20 // max(1, x[0].nbytes)),
    )


@dataclass(frozen=True, kw_only=True)
class Parts:
    """How the forward pass splits a sample that no program holds. Nothing here depends on the
    number of samples."""

    chunks: int
    steps: int
    """Tiles of the result per chunk."""
    parts: int
    """Moments of each group to merge."""
    moments: dict[str, int]
    """Constants of the kernel that computes the moments."""
    result: dict[str, int]
    """Constants of the kernel that merges them and computes the result."""
    programs: int
    """Programs of each kernel for one sample."""
    samples: int
    """Samples that pass through both kernels before the next are read, so that they fit the L2."""


def parts_regime(name: str, x: Tensor, shape: Shape) -> Parts:
    chosen = config(name, x, f"{shape.layout}/large")
    rows, columns = tile_of(shape, chosen["TILE"], chosen["COLUMNS"])
    tiles = cdiv(shape.channels, columns)
    unroll = min(chosen["UNROLL"], next_power_of_2(shape.space) // rows)
    while unroll > 1 and cdiv(shape.space, unroll * rows) * tiles < chosen["FILL"]:
        unroll //= 2
    blocks = cdiv(shape.space, unroll * rows)
    chunks = cdiv(blocks, cdiv(blocks * tiles, chosen["PROGRAMS"]))
    touched = [  # tiles that a group lies in
        (first + shape.size - 1) // columns - first // columns + 1
        for first in range(0, shape.channels, shape.size)
    ]
    spanned = [  # groups that a tile has a part of
        (min(first + columns, shape.channels) - 1) // shape.size - first // shape.size + 1
        for first in range(0, shape.channels, columns)
    ]
    groups = next_power_of_2(max(spanned))
    parts = chunks * max(touched)
    constants = {
        "COLUMNS": columns,
        "SIZE": shape.size,
        "GROUPS": groups,
        "PARTS": max(touched),
        "WHOLE": shape.space % (unroll * rows) == 0 and shape.channels % columns == 0,
        "num_warps": chosen["num_warps"],
    }
    merge = min(max(1, chosen["MERGE"] // groups), next_power_of_2(parts))
    return Parts(
        chunks=chunks,
        steps=cdiv(blocks, chunks),
        parts=parts,
        moments=constants | {"ROWS": rows, "UNROLL": unroll},
        result=constants | {"ROWS": unroll * rows, "MERGE": merge, "ONCE": merge >= parts},
        programs=chunks * tiles,
        samples=max(1, chosen["L2_MIB"] * 2**20 // max(1, x[0].nbytes)),
    )


def mean_and_rstd(statistics: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and rstd of each group, (N, G) each and dense: views of the statistics, (N, G, 3)."""
    n, groups, _ = statistics.shape
    mean, rstd, _ = statistics.view(3, n, groups).unbind()
    return mean, rstd


def slices(start: int, stop: int, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t[start:stop] for t in tensors]
