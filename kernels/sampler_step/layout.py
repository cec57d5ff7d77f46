"""How the GPU kernels of `sampler_step` walk images, and which calls they refuse."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

LARGEST = 2**31 - 1
"""Elements of an image, counted in 32 bits (images together may have more)."""


def why_not(x: Tensor, *others: Any) -> str | None:
    """Why the kernels cannot run this call, or None if they can."""
    if x.numel() and x[0].numel() > LARGEST:
        return f"an image may have 2^31 - 1 elements, got {x[0].numel()}"
    names = ("prediction", "history", "table", "rows", "seeds", "cond", "uncond", "denoised")
    for name, tensor in zip((*names, "finite"), others, strict=False):
        if isinstance(tensor, Tensor) and tensor.device != x.device:
            return f"{name} must be on the device of x, {x.device}, got {tensor.device}"
    return None


def _folded(x: Tensor, lead: int) -> tuple[int, int] | None:
    """Strides of dimension `lead` (channels) and of all that follow as one; None where those have
    no single stride."""
    space, unit = 1, None
    for size, stride in zip(x.shape[:lead:-1], x.stride()[:lead:-1], strict=True):
        if size == 1:
            continue
        if unit is None:
            unit = stride
        elif stride != unit * space:
            return None
        space *= size
    return x.stride(lead), 1 if unit is None else unit


def strides_of(x: Tensor, lead: int) -> tuple[Tensor, tuple[int, int], bool]:
    """x, or a dense copy where its space does not fold; (channel, space) strides; whether an image
    is in order, without a gap."""
    found = _folded(x, lead)
    if found is None:
        x = x.contiguous()
        found = _folded(x, lead)
        assert found is not None
    space = math.prod(x.shape[lead + 1 :])
    dense = (space == 1 or found[1] == 1) and (x.shape[lead] == 1 or found[0] == space)
    return x, found, dense


def by_memory(
    prediction: Tensor, c: int, space: int, f_c: int, f_s: int
) -> tuple[int, int, int, int]:
    """How to walk an image along its memory, in any order of its numbers: the size of the inner
    dimension, strides of images, outer and inner dimension."""
    sizes = (c, f_s, f_c) if f_c < f_s else (space, f_c, f_s)
    return sizes[0], prediction.stride(0), sizes[1], sizes[2]
