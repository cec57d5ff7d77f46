"""Tunables of the Triton kernels of `geglu`: candidates, and calls to time and compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastdiff.bench.tunables.tunable import Tunable, define_tunable
from fastdiff.kernels.geglu.triton import backward, forward
from fastdiff.kernels.tuning import Config


def _candidates(shape_class: str, dtype: torch.dtype) -> Iterator[Config]:
    for columns in (256, 512, 1024):
        for rows in (1, 2, 4, 8):
            for warps in (4, 8):
                yield {"ROWS": rows, "COLUMNS": columns, "num_warps": warps}


def _arguments(dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """x and dy of SD 1.5's first level at 64 x 64 latents: 4096 tokens, 2 x 1280 features."""
    x = torch.empty(2 * 4096, 2 * 1280, dtype=dtype, device=device)
    return x, torch.empty(2 * 4096, 1280, dtype=dtype, device=device)


def _calls(shape_class: str, dtype: torch.dtype, device: str) -> list[Callable[[], Any]]:
    x, _ = _arguments(dtype, device)
    return [lambda: forward(x, False)]


def _backward_calls(shape_class: str, dtype: torch.dtype, device: str) -> list[Callable[[], Any]]:
    x, dy = _arguments(dtype, device)
    return [lambda: backward(dy, x, (True,))]


for _name, _make in (("geglu", _calls), ("geglu_backward", _backward_calls)):
    define_tunable(
        Tunable(name=_name, shape_classes=("rows",), candidates=_candidates, calls=_make)
    )
