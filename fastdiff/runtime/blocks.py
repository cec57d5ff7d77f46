"""Blocks of a fixed number of rows, so that a sample is bit-identical alone and in any batch.

Convolutions and matrix products on a CPU do not guarantee that: for another batch size, oneDNN
picks another kernel with another order of summation. At a fixed batch size the results do not
depend on the position in the batch or, in channels_last, on the number of threads (measured:
docs/decisions/runtime.md). So on a CPU a network always sees blocks of one fixed size, where the
last block is padded with copies of its last row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

BLOCK_PIXELS = 512
"""Pixels of x per network call on a CPU: enough to make the overhead of a call small."""

Item = TypeVar("Item")


class RowBlocks(NamedTuple):
    """Rows per evaluation of a denoiser; if the two are equal, both kinds share blocks."""

    guided: int
    """For samples with two rows, unconditional and conditional."""
    single: int
    """For samples with one row."""


def row_blocks(sides: Sequence[int], device: torch.device) -> RowBlocks | None:
    """The blocks that a denoiser is evaluated in; None: the whole batch at once.

    They depend only on the size of a sample. At 8x8 a block has 16 rows: 8 guided samples, 16
    others, or a mix. Above 256 pixels, where one image keeps all cores busy, a guided sample is a
    block of 2 and any other a block of 1, so that no row is wasted.

    sides: (H, W) or any other number of spatial sides; () for points.
    """
    if device.type != "cpu":
        return None
    samples = _samples(math.prod(sides))
    return RowBlocks(2 * samples, 2 * samples if samples > 1 else 1)


def block_size(height: int, width: int, device: torch.device) -> int | None:
    """Images per evaluation of an autoencoder, given only the size of one latent; None: all.

    8 at 8x8, 1 above 256 pixels. Other devices process the whole batch at once, where equal seeds
    agree only up to rounding, not bit for bit.
    """
    return _samples(height * width) if device.type == "cpu" else None


def _samples(pixels: int) -> int:
    return min(8, max(1, BLOCK_PIXELS // pixels))


def in_blocks(function: Callable[[Tensor], Tensor], block: int | None, x: Tensor) -> Tensor:
    """Call ``function`` on blocks of exactly ``block`` rows of x and concatenate the results.

    x: (N, C, *spatial); see :func:`gather` for the layout of a block. ``function`` must return one
    row per row. If ``block`` is None, it is called once on all rows.
    """
    rows = range(len(x))
    blocks = filled(rows, block) if block is not None else [list(rows)]
    parts = [function(gather(x, torch.tensor(piece, device=x.device))) for piece in blocks]
    return torch.cat(parts)[: len(x)]


def filled(items: Sequence[Item], size: int) -> list[list[Item]]:
    """Split items into lists of exactly ``size``; the last is padded with copies of its last item.

    >>> filled([1, 2, 3], 2)
    [[1, 2], [3, 3]]
    """
    parts = [list(items[start : start + size]) for start in range(0, len(items), size)]
    return [part + part[-1:] * (size - len(part)) for part in parts]


def gather(x: Tensor, index: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Gather rows of x into a new tensor for a network, channels_last if x is 4-D.

    Slices of different batches may have different strides, which also affect which convolution
    runs; the strides of a new tensor depend only on its shape. Differentiable in x.

    x: (N, C, *spatial). index: (n,) int64. dtype: of the result; None: that of x. Returns
    (n, C, *spatial).
    """
    layout = torch.channels_last if x.ndim == 4 else torch.contiguous_format
    piece = torch.empty(
        (len(index), *x.shape[1:]),
        dtype=dtype or x.dtype,
        device=x.device,
        memory_format=layout,
    )
    return piece.copy_(x.index_select(0, index))
