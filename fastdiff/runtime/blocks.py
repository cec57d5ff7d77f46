"""Blocks of fixed size, so that a sample has the same bits alone and in any batch.

The same seed must give the same bits alone and at any place of any batch. Convolutions and matrix
products on the CPU do not promise that: oneDNN picks another kernel for another batch size, with
another order of summation. At one and the same batch size they are independent of the place and, in
channels_last, of the number of threads (measured: docs/decisions/runtime.md). So the network on the
CPU always sees blocks of one fixed size; the last block is filled up with copies of its last row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK_PIXELS = 512
"""Pixels of x that the network sees at once on the CPU: enough that a call's overhead is small."""


def block_size(height: int, width: int, device: torch.device) -> int | None:
    """Samples per evaluation, from the size of one sample alone; None: the batch as it comes.

    8 at 8x8, 1 from 32x32 on, where one image fills the cores and a batch would gain nothing. Other
    devices take the whole batch: same seeds agree there up to rounding, not bit for bit.
    """
    if device.type != "cpu":
        return None
    return min(8, max(1, BLOCK_PIXELS // (height * width)))


def in_blocks(
    function: Callable[..., Tensor], block: int | None, x: Tensor, *others: Tensor
) -> Tensor:
    """Call ``function(x, *others)`` on blocks of exactly ``block`` rows and join what it returns.

    x: (N, C, H, W), handed on in channels_last and always with the same strides. others: (N, ...).
    ``function`` returns (k * rows, ...), k parts stacked along the batch, as guidance's two halves
    are; they stay stacked: (k * N, ...).
    """
    rows = len(x) if block is None else block
    parts: list[tuple[Tensor, ...]] = []
    for start in range(0, len(x), rows):
        index = torch.arange(start, start + rows, device=x.device).clamp_(max=len(x) - 1)
        # Copied into a fresh tensor: slices of different batches may come with different strides,
        # and strides too decide which convolution runs.
        piece = x.new_empty((rows, *x.shape[1:])).contiguous(memory_format=torch.channels_last)
        piece.copy_(x[index])
        out = function(piece, *(other[index] for other in others))
        kept = min(rows, len(x) - start)
        parts.append(tuple(half[:kept] for half in out.split(rows)))
    halves = [torch.cat(half) for half in zip(*parts, strict=True)]
    return halves[0] if len(halves) == 1 else torch.cat(halves)
