"""The CUDA kernel of `gather_rows`; its launcher is in csrc/cuda/gather_rows.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cuda
from ..triton import cdiv
from . import layout
from .layout import inputs_like

cuda.declare("gather_rows", "ip" + "i" + "ppppppp" + "qqqqqqq" + "i")

THREADS = 256
"""Positions, or numbers of an embedding, of a tile: `kGatherThreads` of the kernel."""


def why_not(
    x: Tensor, samples: Tensor, embeddings: Tensor, places: Tensor, extra: Tensor | None
) -> str | None:
    """Why the kernel cannot run this call, or None if it can."""
    reason = layout.why_not(x, samples, embeddings, places, extra)
    tiles = cdiv(x.shape[2:].numel(), THREADS) + cdiv(embeddings.shape[1], THREADS)
    return reason or layout.too_many_tiles(tiles)


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
    if inputs.numel() or emb.numel():
        dense = [t.contiguous() for t in (x, samples, embeddings, places)]
        more = None if extra is None else extra.contiguous()
        own, index, table, where = (t.data_ptr() for t in dense)
        cuda.launch(
            "gather_rows", x, cuda.DTYPES[embeddings.dtype],
            own, cuda.address(more), index, table, where, inputs.data_ptr(), emb.data_ptr(),
            count, x.shape[0], embeddings.shape[0], x.shape[1], inputs.shape[1] - x.shape[1],
            x.shape[2:].numel(), width, x.ndim == 4,
        )  # fmt: skip
    return (inputs, emb), None


BACKEND = cuda.cuda_backend(forward=forward, why_not=why_not, dtypes=(torch.float32,))
