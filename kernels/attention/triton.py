"""`attention` with the Triton kernels of triton_forward.py and triton_backward.py."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..triton import triton_backend
from . import triton_forward
from .statistics import statistics_like
from .triton_backward import attention_backward
from .triton_forward import attention_forward
from .triton_tiles import SINGLE_HEAD, WIDEST, WIDEST_MASK, room_for_sums


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    mask: Tensor | None,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the output and, if `keep`, the softmax sums of each query."""
    statistics = statistics_like(q).zero_() if keep else None
    return attention_forward(q, k, v, extra_k, extra_v, mask, scale, statistics)[0], statistics


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    mask: Tensor | None,
    scale: float,
    out: Tensor,
    statistics: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Return dq, dk, dv, dextra_k, dextra_v, dmask."""
    inputs = q, k, v, extra_k, extra_v, mask
    sums = room_for_sums(q, mask, statistics)
    return attention_backward(dout, *inputs, out, sums, scale, needs[5])


def why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    mask: Tensor | None,
    scale: float,
) -> str | None:
    """Why the kernels cannot run this call, or None if they can."""
    d = q.shape[3]
    if d % 8 or (d > WIDEST and d != SINGLE_HEAD):
        return (
            f"it supports head dims that are multiples of 8 up to {WIDEST}, and {SINGLE_HEAD}, "
            f"got {d}; pad the heads with zeros and pass scale={d}**-0.5"
        )
    if not scale > 0:
        return f"it supports a scale > 0, got {scale}; negate q instead"
    keys = k.shape[1] + (0 if extra_k is None else extra_k.shape[1])
    if mask is not None and q.shape[1] * keys > WIDEST_MASK:
        return (
            f"with a mask it supports up to {WIDEST_MASK} scores per head, "
            f"got {q.shape[1]} x {keys}; split the queries"
        )
    return None


BACKEND = triton_backend(
    forward=forward, backward=backward, why_not=why_not, settings=lambda: triton_forward.PROGRAMS
)
