"""Tunables of the Triton kernels of `layer_norm` and `add_layer_norm`: candidates, and calls to
time and compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastdiff.bench.tunables.tunable import Tunable, define_tunable
from fastdiff.kernels.layer_norm.triton import backward, forward
from fastdiff.kernels.tuning import Config


def _candidates(shape_class: str, dtype: torch.dtype) -> Iterator[Config]:
    elements = (4096, 8192) if shape_class == "wide" else (1024, 2048, 4096, 8192)
    for count in elements:
        for warps in (1, 2, 4, 8, 16):
            if 8 <= count // (32 * warps) <= 32:
                yield {"ELEMENTS": count, "num_warps": warps}


def _backward_candidates(shape_class: str, dtype: torch.dtype) -> Iterator[Config]:
    for candidate in _candidates(shape_class, dtype):
        for programs in (132, 264, 528):
            yield {**candidate, "PROGRAMS": programs}


SHAPES = {"512": (8192, 320), "1024": (2048, 640), "2048": (512, 1280), "4096": (154, 4096)}
"""Rows and D of SD 1.5's levels with guidance at 64 x 64 latents, and of a T5 encoder."""


def _arguments(shape_class: str, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    rows, d = SHAPES.get(shape_class, (64, 20000))
    sizes = ((rows, d), (rows, d), (d,), (d,))
    x, other, weight, bias = (torch.empty(size, dtype=dtype, device=device) for size in sizes)
    return x, other, weight, bias


def _calls(shape_class: str, dtype: torch.dtype, device: str) -> list[Callable[[], Any]]:
    x, residual, weight, bias = _arguments(shape_class, dtype, device)
    calls: list[Callable[[], Any]] = [lambda: forward(x, None, weight, bias, 1e-5)]
    if shape_class in ("2048", "wide"):
        calls.append(lambda: forward(x, None, None, None, 1e-6))  # DiT
        calls.append(lambda: forward(x, residual, weight, bias, 1e-5))
    return calls


def _backward_calls(shape_class: str, dtype: torch.dtype, device: str) -> list[Callable[[], Any]]:
    x, dy, weight, bias = _arguments(shape_class, dtype, device)
    calls = [lambda: backward(dy, None, x, None, weight, bias, 1e-5, [True] * 3)]
    if shape_class in ("2048", "wide"):
        calls.append(lambda: backward(dy, dy, x, None, None, None, 1e-6, [True, False, False]))
    return calls


for _name, _make, _search in (
    ("layer_norm", _calls, _candidates),
    ("layer_norm_backward", _backward_calls, _backward_candidates),
):
    define_tunable(
        Tunable(name=_name, shape_classes=(*SHAPES, "wide"), candidates=_search, calls=_make)
    )
