"""Scaled dot-product attention on strided (N, L, H, D) tensors.

    P   = softmax(scale * Q K^T + mask)       over the S keys, per sample and head
    out = P V                                 Vaswani et al. 2017, eq. 1; scale = 1 / sqrt(D)

Bytes that must move: Q, K, V in and out once, (2 * L + 2 * S) * N * H * D * itemsize; the L x S
matrix never has to leave the chip. FLOPs: 4 * N * H * L * S * D (two products of 2 * L * S * D).

The reference is PyTorch's `scaled_dot_product_attention` on fp32 (fp64) tensors: on a CPU it tiles,
so it is up to 4 times faster than softmax(QK^T)V written out (1024 keys, d = 40, one core) and
needs no L x S memory, and its result for one sample does not depend on the others in the batch. The
written-out formula stands in the tests, in fp64.

The Triton kernels hold a tile of queries and walk over the keys with an online softmax (Milakov and
Gimelshein 2018; Dao 2023), or, where all keys fit on the chip (a text of 77 tokens), hold the keys
and walk over the queries with a softmax in one pass. The scale is folded into the exponent,
p = exp2(c * s - m) with c = scale * log2(e), and what is kept for the backward pass is
log2(sum exp2(c * s)) per query, in fp32, +inf for a query that may see no key.

A head dim is not padded to a power of two: it is cut into pieces that are, 40 = 32 + 8 columns of
V and of the output where the matrix unit takes 8 (mma.sync), 32 + 16 where it takes 16 (wgmma,
tcgen05, MFMA). The sum over the head dim in Q K^T goes in steps of 16 everywhere. Columns beyond D
are zeros that are not read.

fp32 goes through three TF32 products on NVIDIA (about 22 bits of each factor) and as it is on AMD.
A head of 512, and fp32, is too wide to be kept: CHUNK columns of the rows at a time are read for
each product, and SPLIT programs share the D output columns, each with all the scores.

Bytes moved, in units of N * H * D * itemsize, with BLOCK_M queries and BLOCK_N keys a tile:

    forward, streaming     2 L + 2 S ceil(L / BLOCK_M)
    forward, keys on chip  2 L + 2 S programs    as many programs a head as fill the GPU, `_context`
    backward, row sums     2 L
    backward, dK and dV    2 L ceil(S / BLOCK_N) + 4 S
    backward, dQ           3 L + 2 S ceil(L / BLOCK_M), twice for a mask's gradient in fp16, bf16

and 4 bytes a query for each of its numbers (8 for the sum of fp32 and under an added mask, which is
kept in two): one in the forward pass; one, 2 ceil(S / BLOCK_N), and 2 in the backward pass. Few
keys, many queries: dK and dV are also written and read once in fp32 for each stretch of the
queries. Rows read in chunks:

    forward     L + SPLIT (L ceil(S / BLOCK_N) + S ceil(L / BLOCK_M)) + S ceil(L / BLOCK_M)

Tensors whose rows do not begin at 16 bytes are copied first. A mask is read once for every score.
Re-reads of K and V are what the L2 is for: one head of 4096 keys of 40 is 0.66 MB.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.kernels import (
    _attention_cuda,
    _attention_tuning,  # noqa: F401 - it enters what is tuned
)
from fastdiff.kernels._attention import SINGLE_HEAD, WIDEST, WIDEST_MASK, room_for_sums
from fastdiff.kernels._attention_backward import attention_backward, room_for_gradients
from fastdiff.kernels._attention_cpu import register_cpu
from fastdiff.kernels._attention_forward import attention_forward
from fastdiff.kernels._triton import register
from fastdiff.kernels._triton import why_not as why_not_tensors
from fastdiff.kernels.dispatch import check_floating, check_number, compute_dtype, define_op


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The op in plain PyTorch; see `attention`."""
    if extra_k is not None and extra_v is not None:
        k, v = torch.cat([k, extra_k], 1), torch.cat([v, extra_v], 1)
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


# The Triton kernels, which are in _attention_forward.py and _attention_backward.py

attention_triton = torch.library.custom_op(
    "fastdiff::attention_triton", attention_forward, mutates_args=()
)
attention_backward_triton = torch.library.custom_op(
    "fastdiff::attention_backward_triton", attention_backward, mutates_args=()
)


@attention_triton.register_fake
def _attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), room_for_sums(q, mask)


@attention_backward_triton.register_fake
def _attention_backward_fake(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    mask_gradient: bool,
) -> tuple[Tensor, ...]:
    return room_for_gradients(q, k, v, extra_k, extra_v, mask, mask_gradient)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.scale = scale


def _differentiate(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, out, lse = ctx.saved_tensors
    found = attention_backward_triton(dout, *inputs, out, lse, ctx.scale, ctx.needs_input_grad[5])
    gradients = zip(found, ctx.needs_input_grad, strict=False)
    return (*(x if needed else None for x, needed in gradients), None)


attention_triton.register_autograd(_differentiate, setup_context=_keep)


def _triton(
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
    out: Tensor = attention_triton(q, k, v, extra_k, extra_v, mask, scale)[0]
    return out


def _why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> str | None:
    d = q.shape[3]
    if d % 8 or (d > WIDEST and d != SINGLE_HEAD):
        return (
            f"it takes head dims that are multiples of 8 up to {WIDEST}, and {SINGLE_HEAD}, "
            f"got {d}; pad the heads with zeros and pass scale={d}**-0.5"
        )
    if scale is not None and not scale > 0:
        return f"it takes a scale > 0, got {scale}; negate q"
    keys = k.shape[1] + (0 if extra_k is None else extra_k.shape[1])
    if mask is not None and q.shape[1] * keys > WIDEST_MASK:
        return (
            f"under a mask it takes up to {WIDEST_MASK} scores per head, "
            f"got {q.shape[1]} x {keys}; split the queries"
        )
    return why_not_tensors(q, mask)


_op = define_op("attention", attention_reference)
register(_op, _triton, _why_not)
_attention_cuda.register(_op, attention_backward_triton)
register_cpu(_op)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    mask: Tensor | None,
    scale: float | None,
) -> None:
    check_floating("attention", "q", q)
    if scale is not None:
        check_number("attention", "scale", scale)
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
    if (extra_k is None) != (extra_v is None):
        raise ValueError("attention: extra_k and extra_v come together, got one of them")
    if extra_k is not None and extra_v is not None:
        extra = extra_k.shape[1] if extra_k.ndim == 4 else 0
        if extra_k.shape != (n, extra, heads, dim) or extra_v.shape != extra_k.shape:
            raise ValueError(
                f"attention: extra_k and extra_v must be (N, T, H, D) with N={n}, H={heads}, "
                f"D={dim} as in q, got {tuple(extra_k.shape)} and {tuple(extra_v.shape)}"
            )
        if extra_k.dtype != q.dtype or extra_v.dtype != q.dtype:
            raise ValueError(
                f"attention: extra_k and extra_v must have the dtype of q, {q.dtype}, "
                f"got {extra_k.dtype} and {extra_v.dtype}"
            )
        keys += extra
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
                + ("" if extra_k is None else "; S counts the extra keys, which come last")
            )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Scaled dot-product attention: ``softmax(scale * q k^T + mask) v`` per sample and head.

    Args:
        q: (N, L, H, D), fp64/fp32/fp16/bf16, any strides (a view of a packed QKV is fine).
        k, v: (N, S, H, D), the dtype of q, any strides.
        extra_k, extra_v: (N, T, H, D), keys and values that are seen after those of k and v, as if
            concatenated to them (GLIDE's text tokens beside the image's).
        mask: broadcasts to (N, H, L, S + T); bool, True where a key may be seen, or floating point,
            added to the score. A query that may see no key gets zeros.
        scale: factor of the scores; None is 1 / sqrt(D).

    Returns:
        (N, L, H, D), contiguous, in the dtype of q. Differentiable in all tensors but a
        bool mask. The gradient of a mask needs N * H * L * (S + T) fp32 numbers on the way.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    Vaswani et al. 2017, eq. 1.
    """
    _check(q, k, v, extra_k, extra_v, mask, scale)
    options = {"extra_k": extra_k, "extra_v": extra_v, "mask": mask, "scale": scale}
    result: Tensor = _op.run((q, k, v), options)
    return result
