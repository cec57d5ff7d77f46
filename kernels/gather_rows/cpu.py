"""The CPU kernel of `gather_rows`, in csrc/cpu/gather_rows.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import compiled
from ..cpu import DTYPES, address, cpu_backend
from .layout import inputs_like


def forward(
    x: Tensor,
    samples: Tensor,
    embeddings: Tensor,
    places: Tensor,
    extra: Tensor | None,
    keep: bool,
) -> tuple[tuple[Tensor, Tensor], None]:
    """Return the inputs and the embeddings."""
    inputs = inputs_like(x, samples, embeddings, extra)
    count, width = samples.shape[0], embeddings.shape[1]
    emb = embeddings.new_empty((count, width))
    more = None if extra is None else extra.contiguous()
    dense = x.contiguous(), more, samples.contiguous(), embeddings.contiguous()
    indices = places.contiguous()
    bad = compiled.native.gather_rows(
        DTYPES[embeddings.dtype], x.ndim == 4, *map(address, (*dense, indices, inputs, emb)),
        count, x.shape[0], embeddings.shape[0], x.shape[1], inputs.shape[1] - x.shape[1],
        x.shape[2:].numel(), width,
    )  # fmt: skip
    if bad >= 0:
        raise IndexError(
            f"gather_rows: samples must be in [0, {len(x)}) and places in [0, {len(embeddings)}), "
            f"got {int(samples[bad])} and {int(places[bad])} for row {bad}"
        )
    return (inputs, emb), None


def _slower(
    x: Tensor, samples: Tensor, embeddings: Tensor, places: Tensor, extra: Tensor | None
) -> str | None:
    """The reference also serves a network in fp64."""
    if embeddings.dtype not in DTYPES:
        return f"it supports embeddings in fp32, fp16 and bf16, got {embeddings.dtype}"
    return None


BACKEND = cpu_backend(forward=forward, dtypes=(torch.float32,), slower=_slower)
