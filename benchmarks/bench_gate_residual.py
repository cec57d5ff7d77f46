"""Gated residual sum with its gradients; the tokens of DiT-S and DiT-XL at 256 x 256 pixels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import compare
from fastdiff import kernels
from fastdiff.bench.ops.gate_residual import eager
from fastdiff.kernels.gate_residual import gate_residual


def library(x: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
    """PyTorch's own fused product and sum; its gradients are not fused."""
    return torch.addcmul(residual, gate[:, None], x)


@pytest.mark.parametrize(("network", "width"), [("DiT-S", 384), ("DiT-XL", 1152)])
@pytest.mark.parametrize("direction", ["forward", "training"])
@pytest.mark.parametrize("provider", ["auto", "reference", "library", "eager"])
def test_gate_residual(
    benchmark: Any, provider: str, direction: str, network: str, width: int
) -> None:
    x, residual, dy = torch.randn(3, 2, 256, width)
    gate = torch.randn(2, 6 * width).chunk(6, dim=1)[2]
    leaves = [t.detach().requires_grad_(direction == "training") for t in (x, gate, residual)]

    def timed(function: Callable[..., Tensor], name: str) -> Any:
        def run() -> Any:
            # `compare` runs in inference mode
            with torch.inference_mode(False), torch.enable_grad(), kernels.backend(name):
                y = function(*leaves)
                return y if direction == "forward" else torch.autograd.grad(y, leaves, dy)

        return run

    work = kernels.OPS["gate_residual"].work
    moved = work(x, gate, residual)
    if direction == "training":
        backward = work(x, gate, residual, backward=True)
        moved = kernels.Work(bytes=moved.bytes + backward.bytes)
    compare(
        benchmark,
        provider,
        {
            "auto": timed(gate_residual, "auto"),
            "reference": timed(gate_residual, "reference"),
            "library": timed(library, "auto"),
            "eager": timed(eager, "auto"),
        },
        (),
        name=f"gate_residual {direction}",
        job=network,
        shape=str(tuple(x.shape)),
        work=moved,
    )
