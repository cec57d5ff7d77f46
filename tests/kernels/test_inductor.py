"""Graphs with our ops, compiled by Inductor, the default backend of torch.compile."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff import kernels
from tests.kernels import cases

pytestmark = pytest.mark.slow


def block(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Pointwise work before, between and after two ops, for the compiler to fuse."""
    h = kernels.layer_norm(x * 2 + 1, weight, bias)
    return kernels.geglu(torch.cat([h, F.silu(h)], dim=-1)) + x


@pytest.mark.parametrize("backend", cases.BACKENDS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_inductor_compiles_around_our_ops(backend: str, direction: str) -> None:
    device = cases.device_of(backend)
    leaves = [
        t.to(device).requires_grad_(direction == "backward")
        for t in (torch.randn(3, 5, 32), torch.randn(32), torch.randn(32))
    ]

    def run(function: Callable[..., Tensor]) -> list[Tensor]:
        y = function(*leaves)
        if direction == "forward":
            return [y]
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    torch._dynamo.reset()
    with warnings.catch_warnings(), kernels.backend(backend):
        warnings.simplefilter("ignore")  # Inductor itself imports deprecated parts of PyTorch
        expected = run(block)
        got = run(torch.compile(block, fullgraph=True))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
