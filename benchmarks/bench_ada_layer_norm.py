"""Adaptive LayerNorm: x in, y out; the tokens of DiT-S and DiT-XL at 256 x 256 pixels, guided."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.harness import compare
from fastdiff import kernels
from fastdiff.bench.ops.ada_layer_norm import eager
from fastdiff.kernels.ada_layer_norm import ada_layer_norm


@pytest.mark.parametrize(("network", "width"), [("DiT-S", 384), ("DiT-XL", 1152)])
@pytest.mark.parametrize("provider", ["auto", "reference", "eager"])
def test_ada_layer_norm(benchmark: Any, provider: str, network: str, width: int) -> None:
    x, own = torch.randn(2, 256, width), torch.randn(2, 2 * width)
    scale, shift = own.chunk(2, dim=1)

    def ours(name: str) -> Any:
        def run() -> torch.Tensor:
            with kernels.backend(name):
                return ada_layer_norm(x, scale, shift)

        return run

    compare(
        benchmark,
        provider,
        {
            "auto": ours("auto"),
            "reference": ours("reference"),
            "eager": lambda: eager(x, scale, shift),
        },
        (),
        name="ada_layer_norm",
        job=network,
        shape=str(tuple(x.shape)),
        work=kernels.OPS["ada_layer_norm"].work(x, scale, shift, 1e-6),
    )
