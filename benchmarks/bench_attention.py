"""Attention: q, k, v in, out out; 4 N H L S D operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import shapes
from benchmarks.harness import Work, compare
from fastdiff import kernels


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("nlhd,nshd->nhls", q, k) * q.shape[3] ** -0.5
    return torch.einsum("nhls,nshd->nlhd", scores.softmax(3), v)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def declared(q: Tensor, k: Tensor) -> Work:
    return Work(bytes=2 * (q.nbytes + k.nbytes), flops=4 * q.numel() * k.shape[1])


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
