"""Apply a function of images to overlapping tiles and blend the results linearly."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor


def tiled(
    run: Callable[[Tensor], Tensor],
    x: Tensor,
    shape: tuple[int, int],
    tile: int,
    overlap: int,
    factor_in: int,
    factor_out: int,
) -> Tensor:
    """Run a function on overlapping tiles and blend the results linearly.

    x: (N, C, h * factor_in, w * factor_in). Returns (*shape, h * factor_out, w * factor_out). tile
    and overlap count pixels of (h, w).
    """
    if not 0 <= overlap < tile:
        raise ValueError(
            f"overlap must be in [0, tile), got overlap={overlap} with tile={tile}; "
            "a quarter of the tile is usual"
        )
    height, width = (side // factor_in for side in x.shape[2:])
    if height <= tile and width <= tile:
        return run(x)
    whole = x.new_zeros((*shape, height * factor_out, width * factor_out))
    rows = _tile_weights(height, tile, overlap, factor_out, x)
    columns = _tile_weights(width, tile, overlap, factor_out, x)
    for top, bottom, row_weight in rows:
        for left, right, column_weight in columns:
            vertical, horizontal = (
                [slice(start * factor, end * factor) for factor in (factor_in, factor_out)]
                for start, end in ((top, bottom), (left, right))
            )
            part = run(x[:, :, vertical[0], horizontal[0]])
            part *= row_weight[:, None] * column_weight
            whole[:, :, vertical[1], horizontal[1]] += part
    return whole


def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """First pixel of each tile, evenly spaced so that neighbours share `overlap` or more."""
    if size <= tile:
        return [0]
    count = math.ceil((size - overlap) / (tile - overlap))
    return [round(i * (size - tile) / (count - 1)) for i in range(count)]


def _tile_weights(
    size: int, tile: int, overlap: int, factor: int, like: Tensor
) -> list[tuple[int, int, Tensor]]:
    """(first, end, blending weight per image pixel) of each tile along one side.

    The weight ramps linearly where two neighbours overlap; all weights at a pixel sum to 1.
    """
    starts = tile_starts(size, tile, overlap)
    spans = [(start, min(start + tile, size)) for start in starts]
    ramps = []
    for start, end in spans:
        ramps.append(torch.ones((end - start) * factor, dtype=torch.float64))
    for i, ((_, end), (start, _)) in enumerate(pairwise(spans)):
        shared = (end - start) * factor
        up = (torch.arange(shared, dtype=torch.float64) + 0.5) / max(shared, 1)
        ramps[i][len(ramps[i]) - shared :] *= 1 - up
        ramps[i + 1][:shared] *= up
    total = torch.zeros(size * factor, dtype=torch.float64)
    for (start, end), ramp in zip(spans, ramps, strict=True):
        total[start * factor : end * factor] += ramp
    return [
        (start, end, (ramp / total[start * factor : end * factor]).to(like))
        for (start, end), ramp in zip(spans, ramps, strict=True)
    ]
