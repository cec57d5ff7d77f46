"""The layout of the results of `gather_rows`, and the calls that its kernels do not serve."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 2**31 - 1
"""Most elements of one row, counted in 32 bits."""
MOST_TILES = 65_535
"""Most tiles of one row: they lie on the second axis of the grid."""


def inputs_like(x: Tensor, samples: Tensor, embeddings: Tensor, extra: Tensor | None) -> Tensor:
    """Room for the first result, (R, C + C', *spatial)."""
    channels = x.shape[1] + (0 if extra is None else extra.shape[1])
    return torch.empty(
        (samples.shape[0], channels, *x.shape[2:]),
        dtype=embeddings.dtype,
        device=x.device,
        memory_format=torch.channels_last if x.ndim == 4 else torch.contiguous_format,
    )


def why_not(
    x: Tensor, samples: Tensor, embeddings: Tensor, places: Tensor, extra: Tensor | None
) -> str | None:
    """Why the kernels cannot run this call, or None if they can."""
    if embeddings.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        got = str(embeddings.dtype).removeprefix("torch.")
        return f"it supports embeddings in fp32, fp16 and bf16, got {got}"
    channels = x.shape[1] + (0 if extra is None else extra.shape[1])
    elements = channels * x.shape[2:].numel()
    if elements > LARGEST:
        return f"a row may have at most 2^31 - 1 elements, got {elements}"
    return None


def too_many_tiles(tiles: int) -> str | None:
    """Why a grid cannot have this many tiles per row, or None if it can."""
    if tiles > MOST_TILES:
        return f"a row may have at most {MOST_TILES:,} tiles, got {tiles:,}"
    return None
