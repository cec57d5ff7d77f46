"""Tunables of the Triton kernels of `linear_geglu`, `linear_add` and `cat_linear`: candidates, and
calls to time and compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastdiff.bench.tunables.tunable import Tunable, define_tunable
from fastdiff.kernels.cat_linear import triton as cat_linear
from fastdiff.kernels.linear_add import triton as linear_add
from fastdiff.kernels.linear_geglu import triton as linear_geglu
from fastdiff.kernels.tuning import Config

SHAPES = {"large": (2 * 4096, 320), "small": (2 * 64, 1280)}
"""Tokens and features of SD 1.5's first level and of its middle, with guidance."""


def _candidates(shape_class: str, dtype: torch.dtype) -> Iterator[Config]:
    for m, n, warps in ((128, 128, 8), (128, 64, 4), (128, 64, 8), (64, 64, 4), (64, 32, 4)):
        for k, stages in ((64, 2), (64, 3), (64, 4), (32, 3), (32, 4)):
            if dtype.itemsize * k <= 128:
                yield {
                    "BLOCK_M": m,
                    "BLOCK_N": n,
                    "BLOCK_K": k,
                    "num_warps": warps,
                    "num_stages": stages,
                }


def _calls(op: str) -> Callable[[str, torch.dtype, str], list[Callable[[], Any]]]:
    def calls(shape_class: str, dtype: torch.dtype, device: str) -> list[Callable[[], Any]]:
        rows, c = SHAPES[shape_class]

        def make(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        x, bias = make(rows, c), make(c)
        if op == "linear_geglu":
            weights = make(8 * c, c), make(8 * c)
            return [lambda: linear_geglu.forward(x, *weights, False)]
        if op == "cat_linear":
            weight = make(c, 2 * c)
            return [lambda: cat_linear.forward(x, x, weight, bias, False)]
        weight = make(c, c)
        return [lambda: linear_add.forward(x, weight, bias, x, x, False)]

    return calls


for _op in ("cat_linear", "linear_add", "linear_geglu"):
    define_tunable(
        Tunable(name=_op, shape_classes=tuple(SHAPES), candidates=_candidates, calls=_calls(_op))
    )
