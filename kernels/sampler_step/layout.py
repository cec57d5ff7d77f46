"""How the GPU kernels of `sampler_step` traverse images, and which calls they do not support."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import Tensor

LARGEST = 2**31 - 1
"""Most elements of one image, counted in 32 bits (all images together may have more)."""


def why_not(x: Tensor, *others: Any) -> str | None:
    """Why the kernels cannot run this call on one device, or None if they can."""
    if x.numel() > LARGEST and x[0].numel() > LARGEST:
        return f"an image may have at most 2^31 - 1 elements, got {x[0].numel()}"
    return None


@lru_cache(1024)
def _folded(
    shape: tuple[int, ...], strides: tuple[int, ...], lead: int
) -> tuple[tuple[int, int], bool] | None:
    """Strides of dimension `lead` (channels) and of all later dimensions folded into one (space),
    and whether an image is dense and in order; None if the later dimensions do not fold."""
    space, unit = 1, 1
    for size, stride in zip(shape[:lead:-1], strides[:lead:-1], strict=True):
        if size == 1:
            continue
        if space == 1:
            unit = stride
        elif stride != unit * space:
            return None
        space *= size
    channels = strides[lead]
    dense = (space == 1 or unit == 1) and (shape[lead] == 1 or channels == space)
    return (channels, unit), dense


def strides_of(x: Tensor, lead: int) -> tuple[Tensor, tuple[int, int], bool]:
    """x, or a dense copy if its spatial dimensions do not fold; the (channel, space) strides; and
    whether an image is dense and in order."""
    found = _folded(x.shape, x.stride(), lead)
    if found is None:
        x = x.contiguous()
        found = _folded(x.shape, x.stride(), lead)
        assert found is not None
    return x, *found


def by_memory(
    prediction: Tensor, c: int, space: int, f_c: int, f_s: int
) -> tuple[int, int, int, int]:
    """How to traverse an image along memory when element order does not matter: the size of the
    inner dimension, and the strides of the image, outer and inner dimensions."""
    sizes = (c, f_s, f_c) if f_c < f_s else (space, f_c, f_s)
    return sizes[0], prediction.stride(0), sizes[1], sizes[2]
