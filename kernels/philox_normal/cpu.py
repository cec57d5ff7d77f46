"""The CPU kernel of `philox_normal`, in csrc/cpu/philox_normal.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import compiled
from ..cpu import cpu_backend, room

MASK32 = 0xFFFFFFFF


def forward(
    seeds: Tensor,
    shape: Sequence[int],
    step: Tensor | None,
    number: int,
    stream: int,
    keep: bool,
) -> tuple[Tensor, None]:
    """Return the noise."""
    out = room(len(seeds), *shape)
    if out.numel():
        seeds = seeds.contiguous()
        sizes = len(seeds), out.numel() // len(seeds)
        step_ = number if step is None else int(step)
        pointers = seeds.data_ptr(), out.data_ptr()
        compiled.native.philox_normal(*pointers, *sizes, step_ & MASK32, stream)
    return out, None


BACKEND = cpu_backend(forward=forward, dtypes=(torch.int64,))
