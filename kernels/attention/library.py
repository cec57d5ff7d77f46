"""`attention` with the best kernel that PyTorch has for the GPU: cuDNN, FlashAttention, CUTLASS.

FlashAttention 3 and 4 are used if they are installed and activated in PyTorch
(``torch.nn.attention.activate_flash_attention_impl("FA3")``), and then have priority.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..choose import Backend, wants_gradient
from ..op import recording_a_graph
from .statistics import statistics_like

WIDEST = 256
"""Largest head dim that FlashAttention supports."""
FUSED = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
"""Tried in this order; the unfused formula, which would write out all scores, is excluded."""


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
    """Return the output; nothing is saved for the backward pass, so the statistics are zeros."""
    with torch.autocast(q.device.type, enabled=False), _fused(q):
        out = _attention(q, k, v, scale)
    return out, statistics_like(q).zero_() if keep else None


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
    """Return dq, dk, dv from the library's backward pass, after recomputing its forward pass."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    with torch.autocast(q.device.type, enabled=False), recording_a_graph(), _fused(q):
        found = torch.autograd.grad(_attention(q, k, v, scale), (q, k, v), dout)
    return *(gradient.contiguous() for gradient in found), None, None, None


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    if q.numel() == 0 or k.shape[1] == 0:
        return q.new_zeros(q.shape) + 0 * (q.sum() + k.sum() + v.sum())
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (N, H, ., D)
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).contiguous()


def _fused(q: Tensor) -> AbstractContextManager[Any]:
    if not q.is_cuda:
        return nullcontext()
    current = getattr(nn.attention, "current_flash_attention_impl", lambda: None)()
    first = [] if current is None else [SDPBackend.FLASH_ATTENTION]
    return sdpa_kernel([*first, *FUSED], set_priority=True)


def why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    mask: Tensor | None,
    scale: float,
) -> str | None:
    """Why the library's kernels cannot run this call, or None if they can."""
    if mask is not None or extra_k is not None:
        return f"it supports no mask or extra keys, got {'extra_k' if mask is None else 'a mask'}"
    if q.shape[3] % 8 or q.shape[3] > WIDEST:
        return f"it supports head dims that are multiples of 8 up to {WIDEST}, got {q.shape[3]}"
    return None


def slower(*args: Any) -> str | None:
    """Why `auto` prefers another backend, or None."""
    return "its backward pass runs the forward pass again" if wants_gradient(args) else None


BACKEND = Backend(
    name="library",
    forward=forward,
    backward=backward,
    why_not=why_not,
    dtypes=(torch.float16, torch.bfloat16),
    slower=slower,
)
