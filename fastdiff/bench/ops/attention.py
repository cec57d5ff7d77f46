"""Attention: q, k, v in, out out; 4 N H L S D operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.bench.providers import Arguments, Make, Subject
from fastdiff.bench.record import Work
from fastdiff.bench.shapes import Call, Job


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("nlhd,nshd->nhls", q, k) * q.shape[3] ** -0.5
    return torch.einsum("nhls,nshd->nlhd", scores.softmax(3), v)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def arguments(call: Call, job: Job, make: Make) -> Arguments:
    """Views of one packed projection: q, k and v of self-attention, else k and v."""
    (n, length, heads, d), of_k, _ = call.tensors
    if of_k[1] == length:
        return make(n, length, 3, heads, d).unbind(2), {}
    return (make(n, length, heads, d), *make(n, of_k[1], 2, heads, d).unbind(2)), {}


def work(call: Call, size: int) -> Work:
    of_q, of_k, _ = call.tensors
    q, k = torch.Size(of_q).numel(), torch.Size(of_k).numel()
    return Work(bytes=2 * (q + k) * size, flops=4 * q * of_k[1])


def backward_work(call: Call, size: int) -> Work:
    """q, k, v, out and its gradient in, three gradients out; five products instead of two."""
    of_q, of_k, _ = call.tensors
    q, k = torch.Size(of_q).numel(), torch.Size(of_k).numel()
    return Work(bytes=4 * (q + k) * size, flops=10 * q * of_k[1])


SUBJECTS = (
    Subject(
        op="attention",
        arguments=arguments,
        eager=sdpa,
        written_out=written_out,
        work=work,
        backward_work=backward_work,
        gradients_first=True,
        sdpa=True,
    ),
)
