"""`attention` through the CUDA kernels of csrc/attention.cuh: fp16 and bf16, head dims that are
multiples of 8 up to 160.

The forward pass is one launch. Rows that are dense and begin at multiples of 16 bytes, as those of
a packed QKV do, are read where they are; others are copied first. Gradients on a GPU are Triton's
(`attention_backward_triton`), which needs the output and the log-sum-exp that this forward pass
leaves behind; without triton, under the emulation, and where a mask is wider than Triton takes,
they are the formula written out in fp32, with L x S numbers per sample and head.

No GPU has run these kernels yet, and nothing is known of their speed.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff.kernels import _cuda
from fastdiff.kernels._attention import WIDEST_MASK, room_for_sums, split_sums
from fastdiff.kernels._triton import triton
from fastdiff.kernels.dispatch import Op

WIDEST = 160
ON_CHIP = 160
"""The most keys that stay in shared memory (80 where heads are wider than 80); 0 in tests: none."""

_cuda.declare("attention", "ipiqqqqiippppppipfippp")
_Strides = ctypes.c_int64 * 19


def why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> str | None:
    """What stands against these arguments, or None."""
    d = q.shape[3]
    if d % 8 or d > WIDEST:
        return f"it takes head dims that are multiples of 8 up to {WIDEST}, got {d}"
    if scale is not None and not scale > 0:
        return f"it takes a scale > 0, got {scale}; negate q"
    return _cuda.elsewhere(q, k=k, v=v, extra_k=extra_k, extra_v=extra_v, mask=mask)


def _in_place_or_copied(x: Tensor | None) -> Tensor | None:
    """x with dense rows that begin at multiples of 16 bytes (8 numbers), which cp.async reads.

    The kernels keep the stride of a token in 32 bits.
    """
    if x is None:
        return None
    strides = [s for s, size in zip(x.stride()[:3], x.shape[:3], strict=True) if size > 1]
    dense = x.stride(3) == 1 and x.stride(1) < 2**31
    if dense and x.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in strides):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The output (N, L, H, D) and, per query, what Triton's backward pass takes (`room_for_sums`).

    That is log2 of the sum of exp2(log2(e) * scores), (1, N, H, L) in fp32, inf for a query that
    may see no key; under an added mask in two numbers, relative to the largest score and that
    score, (2, N, H, L).
    """
    out, lse = torch.empty(q.shape, dtype=q.dtype, device=q.device), room_for_sums(q, mask)
    n, length, heads, d = q.shape
    keys, extra_keys = k.shape[1], 0 if extra_k is None else extra_k.shape[1]
    if q.numel() == 0 or keys + extra_keys == 0:
        return out.zero_(), lse.fill_(torch.inf)
    tensors = [_in_place_or_copied(x) for x in (q, k, v, extra_k, extra_v)]
    strides = [s for x in tensors for s in ((0, 0, 0) if x is None else x.stride()[:3])]
    if mask is not None:
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask.float()
        strides += mask.expand(n, heads, length, keys + extra_keys).stride()
    steps, (sums, tops) = _Strides(*strides), split_sums(lse)
    _cuda.launch(
        "attention", q, _cuda.DTYPES[q.dtype], n, length, keys, extra_keys, heads, d,
        *(_cuda.address(x) for x in tensors), _cuda.address(mask),
        mask is not None and mask.dtype == torch.uint8, ctypes.addressof(steps),
        scale * math.log2(math.e), ON_CHIP, out.data_ptr(), sums.data_ptr(), _cuda.address(tops),
    )  # fmt: skip
    return out, lse


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
    """dq, dk, dv, dextra_k, dextra_v, dmask in plain fp32 PyTorch.

    P = softmax(scores), dV = P^T dO, dP = dO V^T, dS = P * (dP - sum P * dP), dQ = scale * dS K,
    dK = scale * dS^T Q. Of lse only the queries are taken that see no key.
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
        dp = dp - dp[..., :1]  # changes no dS, and keeps the digits where all values are large
        ds = p * (dp - (p * dp).sum(-1, keepdim=True))
        dq, dk, dv = scale * ds @ k, scale * ds.mT @ q, p.mT @ dout
    dq, dk, dv = (x.transpose(1, 2).to(dtype) for x in (dq, dk, dv))
    additive = mask is not None and mask.dtype != torch.bool
    dmask = ds.sum_to_size(mask.shape).to(mask.dtype) if mask is not None and additive else None
    if extra_k is None:
        return dq, dk, dv, None, None, dmask
    return dq, dk[:, :keys], dv[:, :keys], dk[:, keys:], dv[:, keys:], dmask


attention_cuda = torch.library.custom_op(
    "fastdiff::attention_cuda", attention_forward, mutates_args=()
)


@attention_cuda.register_fake
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), room_for_sums(q, mask)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.scale = scale


def register(op: Op, triton_backward: Callable[..., tuple[Tensor, ...]]) -> None:
    """Enter the CUDA implementation of `attention`.

    triton_backward: `attention_backward_triton`, which lies in a module that imports this one.
    """

    def differentiate(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, extra_k, extra_v, mask, _, lse = ctx.saved_tensors
        keys = k.shape[1] + (0 if extra_k is None else extra_k.shape[1])
        narrow = mask is None or q.shape[1] * keys <= WIDEST_MASK
        found: tuple[Tensor | None, ...]
        if dout.is_cuda and triton is not None and narrow:
            wanted = ctx.needs_input_grad[5]
            found = triton_backward(dout, *ctx.saved_tensors, ctx.scale, wanted)
        else:
            found = gradients_written_out(dout, q, k, v, extra_k, extra_v, mask, lse, ctx.scale)
        gradients = zip(found, ctx.needs_input_grad, strict=False)
        return (*(x if needed else None for x, needed in gradients), None)

    attention_cuda.register_autograd(differentiate, setup_context=_keep)
    _cuda.register(
        op, _public(attention_forward), _public(attention_cuda), why_not,
        dtypes=(torch.float16, torch.bfloat16),
    )  # fmt: skip


def _public(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    """The function as `attention` is called."""

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        extra_k: Tensor | None = None,
        extra_v: Tensor | None = None,
        mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        scale = max(1, q.shape[3]) ** -0.5 if scale is None else scale
        return function(q, k, v, extra_k, extra_v, mask, scale)[0]

    return run
