"""The Triton kernel of `gather_rows`."""

from __future__ import annotations

from torch import Tensor

from ..triton import cdiv, jit, launch, next_power_of_2, tl, triton_backend
from . import layout
from .layout import inputs_like

NUMBERS = 1024
"""Numbers of a program's tile."""
LEAST = 16
"""Least positions of a tile."""
LARGEST_TILE = 2**20
"""Most numbers that Triton allows in a tile."""


@jit
def _gather_rows_kernel(
    x: tl.tensor,
    extra: tl.tensor,
    samples: tl.tensor,
    embeddings: tl.tensor,
    places: tl.tensor,
    inputs: tl.tensor,
    emb: tl.tensor,
    count: tl.tensor,
    rows: tl.tensor,
    space: tl.tensor,
    width: tl.tensor,
    tiles: tl.tensor,
    CHANNELS: tl.constexpr,
    MORE: tl.constexpr,
    LAST: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """A tile of one row: the first `tiles` of a row are TILE positions of all channels, the others
    WIDE numbers of its embedding. An index out of range gives NaN."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    if tile < tiles:
        sample = tl.load(samples + row)
        valid = (sample >= 0) & (sample < count)
        place = tile * TILE + tl.arange(0, TILE)[:, None]
        channel = tl.arange(0, COLUMNS)[None, :]
        inside = (place < space) & (channel < CHANNELS + MORE)
        own = inside & (channel < CHANNELS)
        source = x + sample * space * CHANNELS + channel * space + place
        value = tl.load(source, own & valid, other=float("nan"))
        if extra is not None:
            appended = inside & (channel >= CHANNELS)
            source = extra + sample * space * MORE + (channel - CHANNELS) * space + place
            value = tl.where(own, value, tl.load(source, appended & valid, other=float("nan")))
        target = place * (CHANNELS + MORE) + channel if LAST else channel * space + place
        target += inputs + row * space * (CHANNELS + MORE)
        tl.store(target, value.to(inputs.dtype.element_ty), inside)
    else:
        index = tl.load(places + row)
        valid = (index >= 0) & (index < rows)
        column = (tile - tiles) * WIDE + tl.arange(0, WIDE)
        number = tl.load(
            embeddings + index * width + column, (column < width) & valid, other=float("nan")
        )
        tl.store(emb + row * width + column, number, column < width)


def _tile(channels: int) -> tuple[int, int]:
    """Positions and columns of a tile."""
    columns = next_power_of_2(channels)
    return max(LEAST, NUMBERS // columns), columns


def why_not(
    x: Tensor, samples: Tensor, embeddings: Tensor, places: Tensor, extra: Tensor | None
) -> str | None:
    """Why the kernel cannot run this call, or None if it can."""
    reason = layout.why_not(x, samples, embeddings, places, extra)
    channels = x.shape[1] + (0 if extra is None else extra.shape[1])
    tile, columns = _tile(channels)
    if reason is None and tile * columns > LARGEST_TILE:
        reason = f"a row may have at most {LARGEST_TILE // LEAST:,} channels, got {channels:,}"
    tiles = cdiv(x.shape[2:].numel(), tile) + cdiv(embeddings.shape[1], NUMBERS)
    return reason or layout.too_many_tiles(tiles)


def forward(
    x: Tensor,
    samples: Tensor,
    embeddings: Tensor,
    places: Tensor,
    extra: Tensor | None,
    keep: bool = False,
) -> tuple[tuple[Tensor, Tensor], None]:
    """Return the inputs and the embeddings."""
    inputs = inputs_like(x, samples, embeddings, extra)
    width, channels, space = embeddings.shape[1], x.shape[1], x.shape[2:].numel()
    emb = embeddings.new_empty((samples.shape[0], width))
    tile, columns = _tile(inputs.shape[1])
    tiles = cdiv(space, tile) if inputs.numel() else 0
    launch(
        _gather_rows_kernel,
        (samples.shape[0], tiles + cdiv(width, NUMBERS)),
        *(x.contiguous(), None if extra is None else extra.contiguous(), samples.contiguous()),
        *(embeddings.contiguous(), places.contiguous(), inputs, emb),
        *(x.shape[0], embeddings.shape[0], space, width, tiles),
        CHANNELS=channels,
        MORE=inputs.shape[1] - channels,
        LAST=x.ndim == 4,
        TILE=tile,
        COLUMNS=columns,
        WIDE=NUMBERS,
    )
    return (inputs, emb), None


BACKEND = triton_backend(forward=forward, why_not=why_not, one_device=True)
