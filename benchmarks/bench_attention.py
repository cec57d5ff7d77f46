"""Attention: q, k, v in, out out; 4 N H L S D operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import shapes
from benchmarks.gpu import Arguments, Make, Subject
from benchmarks.harness import Work, compare
from benchmarks.shapes import Call, Job
from fastdiff import kernels


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("nlhd,nshd->nhls", q, k) * q.shape[3] ** -0.5
    return torch.einsum("nhls,nshd->nlhd", scores.softmax(3), v)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def declared(q: Tensor, k: Tensor) -> Work:
    return Work(bytes=2 * (q.nbytes + k.nbytes), flops=4 * q.numel() * k.shape[1])


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


SUBJECT = Subject(
    op="attention",
    arguments=arguments,
    eager=sdpa,
    work=work,
    backward_work=backward_work,
    gradients_first=True,
    sdpa=True,
)


@pytest.mark.parametrize("job", shapes.jobs_with("attention"))
@pytest.mark.parametrize("provider", ["reference", "eager", "compile", "library", "sgemm"])
def test_attention(benchmark: Any, provider: str, job: str) -> None:
    of_q, of_k, of_v = shapes.JOBS[job].largest("attention").tensors
    q, k, v = torch.randn(of_q), torch.randn(of_k), torch.randn(of_v)
    compare(
        benchmark,
        provider,
        {"reference": kernels.attention, "eager": written_out, "library": sdpa},
        (q, k, v),
        name="attention",
        job=job,
        shape=str(of_q),
        work=declared(q, k),
    )
