"""`attention` with the CUDA kernels of csrc/cuda/attention.cuh: fp16 and bf16, head dims that are
multiples of 8 up to 160.

The forward pass is one launch. Rows that are dense and aligned to 16 bytes, such as those of a
packed QKV, are read in place; others are copied first. On a GPU, gradients come from Triton
(`attention_backward`), which uses the output and the log-sum-exp saved by this forward pass.
Without triton, under the emulation, and when a mask is wider than Triton supports, they come from
the formula written out in fp32, with L x S numbers per sample and head.

These kernels have not run on a GPU yet, so their speed is unknown.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import cuda
from ..triton import triton
from .statistics import statistics_like
from .triton_backward import attention_backward
from .triton_tiles import WIDEST_MASK, room_for_sums, split_sums

WIDEST = 160
ON_CHIP = 160
"""Most keys kept in shared memory (80 for head dims above 80); tests set 0 to keep none there."""
HOPPER_FROM = 512
"""Fewest queries for the kernel of sm_90a, whose blocks of 128 queries each take a whole
multiprocessor; -1: never. Not a matter of the batch, so that bits do not depend on it."""

cuda.declare("attention", "ipiqqqqiippppppipfiippp")
_Strides = ctypes.c_int64 * 19


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
    if d % 8 or d > WIDEST:
        return f"it supports head dims that are multiples of 8 up to {WIDEST}, got {d}"
    if not scale > 0:
        return f"it supports a scale > 0, got {scale}; negate q instead"
    return None


def _in_place_or_copied(x: Tensor | None) -> Tensor | None:
    """x with dense rows aligned to 16 bytes (8 elements), as cp.async requires.

    The kernels hold the stride between tokens in 32 bits.
    """
    if x is None:
        return None
    strides = [s for s, size in zip(x.stride()[:3], x.shape[:3], strict=True) if size > 1]
    dense = x.stride(3) == 1 and x.stride(1) < 2**31
    if dense and x.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in strides):
        return x
    return x.clone(memory_format=torch.contiguous_format)


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
    """Return the output (N, L, H, D) and the statistics that Triton's backward pass expects.

    Per query that is log2 of the sum of exp2(log2(e) * scores), inf for a query that may attend to
    no key. Under an additive mask it is two numbers: the same relative to the largest score, and
    that score (see `room_for_sums`).
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    statistics = statistics_like(q).zero_() if keep else None
    lse = room_for_sums(q, mask, statistics)
    n, length, heads, d = q.shape
    keys, extra_keys = k.shape[1], 0 if extra_k is None else extra_k.shape[1]
    if q.numel() == 0 or keys + extra_keys == 0:
        lse.fill_(torch.inf)
        return out.zero_(), statistics
    tensors = [_in_place_or_copied(x) for x in (q, k, v, extra_k, extra_v)]
    strides = [s for x in tensors for s in ((0, 0, 0) if x is None else x.stride()[:3])]
    if mask is not None:
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask.float()
        strides += mask.expand(n, heads, length, keys + extra_keys).stride()
    steps, (sums, tops) = _Strides(*strides), split_sums(lse)
    cuda.launch(
        "attention", q, cuda.DTYPES[q.dtype], n, length, keys, extra_keys, heads, d,
        *(cuda.address(x) for x in tensors), cuda.address(mask),
        mask is not None and mask.dtype == torch.uint8, steps,
        scale * math.log2(math.e), ON_CHIP, HOPPER_FROM, out.data_ptr(), sums.data_ptr(),
        cuda.address(tops),
    )  # fmt: skip
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
    """Return dq, dk, dv, dextra_k, dextra_v, dmask, from Triton or from the formula written out."""
    inputs = q, k, v, extra_k, extra_v, mask
    sums = room_for_sums(q, mask, statistics)
    keys = k.shape[1] + (0 if extra_k is None else extra_k.shape[1])
    narrow = mask is None or q.shape[1] * keys <= WIDEST_MASK
    if dout.is_cuda and triton is not None and narrow:
        return attention_backward(dout, *inputs, out, sums, scale, needs[5])
    return gradients_written_out(dout, *inputs, sums, scale)


def gradients_written_out(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    mask: Tensor | None,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor | None, ...]:
    """Compute dq, dk, dv, dextra_k, dextra_v, dmask in fp32 with plain PyTorch.

    P = softmax(scores), dV = P^T dO, dP = dO V^T, dS = P * (dP - sum P * dP), dQ = scale * dS K,
    dK = scale * dS^T Q. lse only shows which queries may attend to no key.
    """
    keys, dtype = k.shape[1], q.dtype
    if extra_k is not None and extra_v is not None:
        k, v = torch.cat([k, extra_k], 1), torch.cat([v, extra_v], 1)
    q, k, v, dout = (x.float().transpose(1, 2) for x in (q, k, v, dout))  # (N, H, ., D)
    with torch.autocast(q.device.type, enabled=False):
        scores = scale * q @ k.mT  # (N, H, L, S)
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, -torch.inf)
        elif mask is not None:
            scores = scores + mask.float()
        p = scores.softmax(-1).masked_fill((lse[0] == torch.inf)[..., None], 0)
        dp = dout @ v.mT
        dp = dp - dp[..., :1]  # leaves dS unchanged; keeps precision where all values are large
        ds = p * (dp - (p * dp).sum(-1, keepdim=True))
        dq, dk, dv = scale * ds @ k, scale * ds.mT @ q, p.mT @ dout
    dq, dk, dv = (x.transpose(1, 2).to(dtype).contiguous() for x in (dq, dk, dv))
    additive = mask is not None and mask.dtype != torch.bool
    dmask = ds.sum_to_size(mask.shape).to(mask.dtype) if mask is not None and additive else None
    if extra_k is None:
        return dq, dk, dv, None, None, dmask
    parts = dk[:, :keys], dv[:, :keys], dk[:, keys:], dv[:, keys:]
    return dq, *(part.clone(memory_format=torch.contiguous_format) for part in parts), dmask


BACKEND = cuda.cuda_backend(
    forward=forward,
    backward=backward,
    why_not=why_not,
    dtypes=(torch.float16, torch.bfloat16),
    settings=lambda: (ON_CHIP, HOPPER_FROM),
)
