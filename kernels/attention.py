"""Scaled dot-product attention on strided (N, L, H, D) tensors.

    P   = softmax(scale * Q K^T + mask)       over the S keys, per sample and head
    out = P V                                 Vaswani et al. 2017, eq. 1; scale = 1 / sqrt(D)

Bytes that must move: Q, K, V in and out once, (2 * L + 2 * S) * N * H * D * itemsize; the L x S
matrix never has to leave the chip. FLOPs: 4 * N * H * L * S * D (two products of 2 * L * S * D).

The reference is PyTorch's `scaled_dot_product_attention` on fp32 (fp64) tensors: on a CPU it tiles,
so it is up to 4 times faster than softmax(QK^T)V written out (1024 keys, d = 40, one core) and
needs no L x S memory, and its result for one sample does not depend on the others in the batch. The
written-out formula stands in the tests, in fp64.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.kernels.dispatch import check_floating, compute_dtype, define_op


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """The op in plain PyTorch; see `attention`."""
    if q.numel() == 0 or k.numel() == 0:
        return q.new_zeros(q.shape) + 0 * (k.sum() + v.sum()).to(q.dtype)
    dtype = compute_dtype(q)
    if mask is not None:
        mask = mask.reshape(*[1] * (4 - mask.ndim), *mask.shape)
        mask = mask if mask.dtype == torch.bool else mask.to(dtype)
    q_heads, k_heads, v_heads = (t.to(dtype).transpose(1, 2) for t in (q, k, v))  # (N, H, ., D)
    with _without_autocast(q.device.type):
        out = F.scaled_dot_product_attention(q_heads, k_heads, v_heads, mask, scale=scale)
    return out.transpose(1, 2).to(q.dtype).contiguous()  # (N, L, H, D)


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Autocast would take the fp32 products back to half precision."""
    if not _autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


@torch.compiler.assume_constant_result  # torch 2.11's Dynamo cannot trace the call
def _autocast_available(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


_op = define_op("attention", attention_reference)


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    check_floating("attention", "q", q)
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(
            "attention: q and k must be (N, L, H, D) and (N, S, H, D), "
            f"got {tuple(q.shape)} and {tuple(k.shape)}; split the heads first"
        )
    n, length, heads, dim = q.shape
    keys = k.shape[1]
    if k.shape != (n, keys, heads, dim) or v.shape != k.shape:
        raise ValueError(
            f"attention: k and v must be (N, S, H, D) with N={n}, H={heads}, D={dim} as in q, "
            f"got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if q.dtype != k.dtype or q.dtype != v.dtype:
        raise ValueError(
            f"attention: q, k, v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if mask is not None:
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise ValueError(
                f"attention: mask must be bool or floating point, got {mask.dtype}; "
                "use mask.bool() if 1 marks the keys that may be seen"
            )
        full = (n, heads, length, keys)
        last = zip(reversed(mask.shape), reversed(full), strict=False)
        if mask.ndim > 4 or any(have not in (1, want) for have, want in last):
            raise ValueError(
                f"attention: mask must broadcast to (N, H, L, S) = {full}, got {tuple(mask.shape)}"
            )


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Scaled dot-product attention: ``softmax(scale * q k^T + mask) v`` per sample and head.

    Args:
        q: (N, L, H, D), fp64/fp32/fp16/bf16, any strides (a view of a packed QKV is fine).
        k, v: (N, S, H, D), the dtype of q, any strides.
        mask: broadcasts to (N, H, L, S); bool, True where a key may be seen, or floating point,
            added to the score. A query that may see no key gets zeros.
        scale: factor of the scores; None is 1 / sqrt(D).

    Returns:
        (N, L, H, D), contiguous, in the dtype of q. Differentiable in q, k, v and an additive mask.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    Vaswani et al. 2017, eq. 1.
    """
    _check(q, k, v, mask)
    result: Tensor = _op(q, k, v, mask=mask, scale=scale)
    return result
