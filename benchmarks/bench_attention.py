"""Attention: q, k, v in, out out; 4 N H L S D operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import shapes
from benchmarks.harness import Work, measure
from fastdiff import kernels

SHAPES = [("digits", 8, 8), ("sd1", 32, 1)]


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("nlhd,nshd->nhls", q, k) * q.shape[3] ** -0.5
    return torch.einsum("nhls,nshd->nlhd", scores.softmax(3), v)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


PROVIDERS: dict[str, Callable[..., Tensor]] = {
    "reference": kernels.attention,
    "eager": written_out,
    "library": sdpa,
}


@pytest.mark.parametrize(("preset", "size", "batch"), SHAPES)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_attention(benchmark: Any, provider: str, preset: str, size: int, batch: int) -> None:
    of_q, of_k, of_v = shapes.largest("attention", preset, size, batch)
    q, k, v = torch.randn(of_q), torch.randn(of_k), torch.randn(of_v)
    work = Work(bytes=2 * (q.nbytes + k.nbytes), flops=4 * q.numel() * k.shape[1])
    with torch.inference_mode(), kernels.backend("reference"):
        measure(
            benchmark,
            lambda: PROVIDERS[provider](q, k, v),
            name="attention",
            shape=f"{preset} {of_q}",
            provider=provider,
            work=work,
        )
