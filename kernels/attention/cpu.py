"""The CPU kernels of `attention`, in csrc/cpu/attention.cpp.

The forward pass saves two fp32 numbers per query: the largest score and the sum of exp. The
backward pass computes P once for dQ and again for dK and dV. That takes seven products of
2 * L * S * D instead of five, but no sum depends on the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import compiled
from ..cpu import DTYPES, address, cpu_backend, room
from .statistics import statistics_like

Strided = tuple[int, int, int, int]

WIDE, MANY_KEYS = 256, 160


def _dense(x: Tensor | None) -> Tensor | None:
    """x with a contiguous head dim; copies only if needed."""
    return x if x is None or x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _strided(x: Tensor | None) -> Strided:
    """Address of x, and its strides over samples, rows and heads."""
    if x is None:
        return (0, 0, 0, 0)
    sample, row, head, _ = x.stride()
    return x.data_ptr(), sample, row, head


def _expanded(mask: Tensor | None, full: tuple[int, int, int, int]) -> Tensor | None:
    """The mask as bool or fp32 in its full shape; broadcast dimensions have a stride of 0."""
    if mask is None:
        return None
    return (mask if mask.dtype is torch.bool else mask.float()).expand(full)


class Call:
    """Arguments that both passes hand to the module; keeps temporary copies alive."""

    def __init__(
        self,
        tensors: tuple[Tensor | None, ...],
        mask: Tensor | None,
        scale: float,
    ) -> None:
        q, k, _, extra_k, _ = tensors
        assert q is not None
        assert k is not None
        n, length, heads, d = q.shape
        self.keys, self.extra_keys = k.shape[1], 0 if extra_k is None else extra_k.shape[1]
        self.full = (n, heads, length, self.keys + self.extra_keys)
        self.empty = q.numel() == 0 or self.full[3] == 0
        self.tensors = tuple(map(_dense, tensors))
        self.mask = _expanded(mask, self.full)
        self.first = DTYPES[q.dtype], [_strided(x) for x in self.tensors], self._masked()
        sizes = [n, length, heads, self.keys, self.extra_keys, d, torch.get_num_threads()]
        self.last = sizes, scale

    def _masked(self) -> tuple[int, ...]:
        if self.mask is None:
            return (0,) * 6
        return (self.mask.data_ptr(), int(self.mask.dtype is torch.bool), *self.mask.stride())


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
    """Return the output and, if `keep`, the largest score and the sum of exp of each query."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    statistics = statistics_like(q) if keep else None
    call = Call((q, k, v, extra_k, extra_v), mask, scale)
    if call.empty:
        return out.zero_(), None if statistics is None else statistics.zero_()
    compiled.native.attention(*call.first, out.data_ptr(), address(statistics), *call.last)
    return out, statistics


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
) -> tuple[Tensor | None, ...]:
    """Return dq, dk, dv, dextra_k, dextra_v, dmask."""
    tensors = q, k, v, extra_k, extra_v
    gradients = [None if x is None else x.new_empty(x.shape) for x in tensors]
    call = Call(tensors, mask, scale)
    if call.empty:
        zeros = (None if g is None else g.zero_() for g in gradients)
        return *zeros, mask.new_zeros(mask.shape) if mask is not None and needs[5] else None
    dscores = room(*call.full) if needs[5] else None
    dense_dout = _dense(dout)
    compiled.native.attention_backward(
        *call.first,
        out.data_ptr(),
        statistics.data_ptr(),
        *call.last,
        _strided(dense_dout),
        [address(gradient) for gradient in gradients],
        address(dscores),
    )
    if mask is None or dscores is None:
        return *gradients, None
    return *gradients, dscores.sum_to_size(mask.shape).to(mask.dtype)


def slower(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    mask: Tensor | None,
    scale: float,
) -> str | None:
    """Where PyTorch's kernel is at least as fast; measurements in docs/decisions/kernels.md."""
    tensors = q, k, v, extra_k, extra_v, mask
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return "the reference is faster when a gradient is needed"
    keys = k.shape[1] + (0 if extra_k is None else extra_k.shape[1])
    if q.dtype is torch.float32 and q.shape[3] > WIDE and keys > MANY_KEYS:
        return (
            f"in fp32 the reference is faster for head dims above {WIDE} with more than "
            f"{MANY_KEYS} keys, got {q.shape[3]} and {keys}"
        )
    return None


BACKEND = cpu_backend(forward=forward, backward=backward, slower=slower)
