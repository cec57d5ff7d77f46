"""Attention: q, k, v in, out out; 4 N H L S D operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.bench.providers import Arguments, Make, Subject
from fastdiff.bench.shapes import Call, Job


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("nlhd,nshd->nhls", q, k) * q.shape[3] ** -0.5
    return torch.einsum("nhls,nshd->nlhd", scores.softmax(3), v)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def arguments(call: Call, job: Job, make: Make) -> Arguments:
    """Views of one packed projection: q, k and v in self-attention, k and v in cross-attention."""
    (n, length, heads, d), of_k, _ = call.tensors
    if of_k[1] == length:
        return make(n, length, 3, heads, d).unbind(2), {}
    return (make(n, length, heads, d), *make(n, of_k[1], 2, heads, d).unbind(2)), {}


SUBJECTS = (
    Subject(
        op="attention",
        operands=lambda x: (x, x, x),
        arguments=arguments,
        eager=sdpa,
        written_out=written_out,
        gradients_first=True,
        sdpa=True,
    ),
)
