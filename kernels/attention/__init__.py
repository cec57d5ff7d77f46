"""Scaled dot-product attention on strided (N, L, H, D) tensors.

    P   = softmax(scale * Q K^T + mask)       over the S keys, per sample and head
    out = P V                                 Vaswani et al. 2017, eq. 1; scale = 1 / sqrt(D)

Bytes that must move: Q, K, V and the output once each, (2 * L + 2 * S) * N * H * D * itemsize; the
L x S matrix never has to leave the chip. FLOPs: 4 * N * H * L * S * D (two products of
2 * L * S * D).

The reference is PyTorch's `scaled_dot_product_attention` on fp32 (fp64) tensors. On a CPU it works
in tiles, so it is up to 4 times faster than a literal softmax(QK^T)V (1024 keys, d = 40, one core)
and needs no L x S memory, and its result for one sample does not depend on the others in the batch.
`attention_formula` is the literal version; tests evaluate it in fp64.

The Triton kernels hold a tile of queries and iterate over the keys with an online softmax (Milakov
and Gimelshein 2018; Dao 2023). If all keys fit on the chip (a text of 77 tokens), they hold the
keys instead and iterate over the queries with a one-pass softmax. The scale is folded into the
exponent, p = exp2(c * s - m) with c = scale * log2(e). The backward pass gets
log2(sum exp2(c * s)) per query, in fp32, +inf for a query that may attend to no key.

A head dim is not padded to a power of two but split into pieces that are powers of two. 40 columns
of V and of the output are 32 + 8 if the matrix unit handles 8 columns (mma.sync), 32 + 16 if it
needs 16 (wgmma, tcgen05, MFMA). The sum over the head dim in Q K^T always runs in steps of 16.
Columns beyond D count as zeros and are not read.

fp32 is computed as three TF32 products on NVIDIA (about 22 bits of each factor) and natively on
AMD. A head dim of 512, and any fp32 head, is too wide to keep on the chip: each product reads CHUNK
columns of the rows at a time, and SPLIT programs share the D output columns, each computing all
scores.

Bytes moved, in units of N * H * D * itemsize, with tiles of BLOCK_M queries and BLOCK_N keys:

    forward, streaming     2 L + 2 S ceil(L / BLOCK_M)
    forward, keys on chip  2 L + 2 S programs    as many programs a head as fill the GPU, `_context`
    backward, row sums     2 L
    backward, dK and dV    2 L ceil(S / BLOCK_N) + 4 S
    backward, dQ           3 L + 2 S ceil(L / BLOCK_M), twice for a mask's gradient in fp16, bf16

Each number kept per query adds 4 bytes per access (8 for the sum in fp32 or under an additive mask,
which is stored as two numbers): 1 access in the forward pass; 1, 2 ceil(S / BLOCK_N) and 2 in the
three backward kernels. With few keys and many queries, dK and dV are also written and read once in
fp32 for each stretch of queries. When rows are read in chunks:

    forward     L + SPLIT (L ceil(S / BLOCK_N) + S ceil(L / BLOCK_M)) + S ceil(L / BLOCK_M)

Tensors whose rows are not aligned to 16 bytes are copied first. A mask is read once for every
score. Repeated reads of K and V hit the L2: one head with 4096 keys of dim 40 is 0.66 MB.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_floating, check_number, compute_dtype, without_autocast
from ..op import Op, Work, reference_gradients
from ..tracing import constant_in_graphs
from ..tuning import gpu_of
from . import cpu, cuda, library, triton
from .statistics import statistics_like

CONTEXT = 336
"""Most keys that count as a text (the longest class of the Triton kernel for contexts)."""
WARP_GROUPS = ("sm_90", "sm_100", "sm_103")
"""Architectures on which Triton's attention uses warp-group matrix instructions, but the CUDA
kernel only those of one warp (mma.sync), which took FlashAttention-2 to a third of an H100's peak
(Shah et al. 2024)."""
LIBRARY_DIMS = (64, 128)
"""Head dims that cuDNN and FlashAttention 3 are built for, where theirs are the kernels to beat."""


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
    with without_autocast(q.device.type):
        out = F.scaled_dot_product_attention(q_heads, k_heads, v_heads, mask, scale=scale)
    return out.transpose(1, 2).to(q.dtype).contiguous()  # (N, L, H, D)


def attention_formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The paper's formula, evaluated in fp64 to check the kernels."""
    if extra_k is not None and extra_v is not None:
        k, v = torch.cat([k, extra_k], 1), torch.cat([v, extra_v], 1)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    scores = torch.einsum("nlhd,nshd->nhls", q, k) * scale
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask
    if scores.shape[3] == 0:
        return q * 0
    weights = torch.exp(scores - scores.amax(3, keepdim=True).clamp(min=-1e300))
    total = weights.sum(3, keepdim=True)
    return torch.einsum("nhls,nshd->nlhd", weights / total.where(total > 0, 1.0), v)


def _written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """The reference as two products and a softmax, which have derivatives of every order."""
    if extra_k is not None and extra_v is not None:
        k, v = torch.cat([k, extra_k], 1), torch.cat([v, extra_v], 1)
    dtype = compute_dtype(q)
    with without_autocast(q.device.type):
        scores = torch.einsum("nlhd,nshd->nhls", q.to(dtype), k.to(dtype)) * scale
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, float("-inf"))
        elif mask is not None:
            scores = scores + mask.to(dtype)
        unseen = (scores == float("-inf")).all(3, keepdim=True)  # a query that may see no key
        weights = scores.masked_fill(unseen, 0).softmax(3).masked_fill(unseen, 0)
        out = torch.einsum("nhls,nshd->nlhd", weights, v.to(dtype))
    return out.to(q.dtype)


def _again(gradients: Sequence[Tensor | None], *kept: Any) -> tuple[Tensor | None, ...]:
    """PyTorch's fused attention has no second derivative."""
    return reference_gradients(_written_out, kept, gradients, _op.own)


def _arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    mask: Tensor | None,
    scale: float | None,
) -> tuple[Any, ...]:
    scale = max(1, q.shape[3]) ** -0.5 if scale is None else scale
    return q, k, v, extra_k, extra_v, mask, scale


def _fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), statistics_like(q)


def _work(
    q: Tensor, k: Tensor, v: Tensor, extra_k: Tensor | None, *_: Any, backward: bool = False
) -> Work:
    """Backward reads q, k, v, out and dout, writes three gradients, and has 5 products, not 2."""
    n, length, heads, d = q.shape
    keys = k.shape[1] + (0 if extra_k is None else extra_k.shape[1])
    return Work(
        bytes=(4 if backward else 2) * (length + keys) * n * heads * d * q.element_size(),
        flops=(10 if backward else 4) * n * heads * length * keys * d,
    )


def _shape_class(q: Tensor, k: Tensor, *_: Any) -> str:
    """Attention to a text ("context") or to an image ("self"), and the head dim."""
    return f"{'context' if k.shape[1] <= CONTEXT else 'self'}/{q.shape[3]}"


def _unmeasured(q: Tensor, *_: Any) -> str | None:
    if not _has_warp_groups(q.device):
        return None
    return "library" if q.shape[3] in LIBRARY_DIMS else "triton"


@constant_in_graphs
def _has_warp_groups(device: torch.device) -> bool:
    return gpu_of(device).architecture in WARP_GROUPS


def _example(draw: Callable[..., Tensor]) -> dict[str, Any]:
    q, k, v = draw(2, 16, 2, 40), draw(2, 24, 2, 40), draw(2, 24, 2, 40)
    return {"q": q, "k": k, "v": v}


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
        raise ValueError("attention: extra_k and extra_v must be given together, got only one")
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
                "use mask.bool() if nonzero marks the keys to attend to"
            )
        full = (n, heads, length, keys)
        last = zip(reversed(mask.shape), reversed(full), strict=False)
        if mask.ndim > 4 or any(have not in (1, want) for have, want in last):
            raise ValueError(
                f"attention: mask must broadcast to (N, H, L, S) = {full}, got {tuple(mask.shape)}"
                + ("" if extra_k is None else "; S counts the extra keys, which come last")
            )


_op = Op(
    name="attention",
    schema="(Tensor q, Tensor k, Tensor v, Tensor? extra_k, Tensor? extra_v, Tensor? mask, "
    "float scale) -> Tensor",
    check=_check,
    reference=attention_reference,
    formula=attention_formula,
    arguments=_arguments,
    fake=_fake,
    work=_work,
    shape_class=_shape_class,
    unmeasured=_unmeasured,
    example=_example,
    kernels=(cuda.BACKEND, triton.BACKEND, library.BACKEND, cpu.BACKEND),
    statistics=True,
    kept_outputs=(0,),
    again=_again,
    reference_once=True,
)


@_op.exposes
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
        extra_k, extra_v: (N, T, H, D), more keys and values, as if concatenated after k and v
            (in GLIDE, the text tokens next to the image tokens).
        mask: broadcasts to (N, H, L, S + T); bool, True where a query may attend to a key, or
            floating point, added to the scores. A query with every key masked out gets zeros.
        scale: factor of the scores; None means 1 / sqrt(D).

    Returns:
        (N, L, H, D), contiguous, in the dtype of q. Differentiable in all tensors except a
        bool mask. The gradient of a mask takes N * H * L * (S + T) fp32 numbers of memory.

    Raises:
        ValueError: unsupported shapes or dtypes.

    Vaswani et al. 2017, eq. 1.
    """
    result: Tensor = _op(q, k, v, extra_k, extra_v, mask, scale)
    return result
