"""The shapes that the presets send through each op, read off a forward pass on the meta device.

No shape is typed in: `collect` runs a preset's network without data and notes what every public op
of `fastdiff.kernels` is given.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastdiff import kernels
from fastdiff.models.unet import UNet
from fastdiff.presets import UNETS

Call = tuple[str, tuple[tuple[int, ...], ...]]
"""An op and the shapes of its positional tensors."""


@contextmanager
def noting(calls: Counter[Call]) -> Iterator[None]:
    """Count each op's calls by the shapes of its positional tensors."""

    def noted(name: str, implementation: kernels.Implementation) -> kernels.Implementation:
        def function(*args: Any, **kwargs: Any) -> Any:
            calls[name, tuple(tuple(a.shape) for a in args if isinstance(a, Tensor))] += 1
            return implementation.function(*args, **kwargs)

        return replace(implementation, function=function)

    before = {name: op.implementations for name, op in kernels.OPS.items()}
    for name, op in kernels.OPS.items():
        op.implementations = {key: noted(name, i) for key, i in op.implementations.items()}
    try:
        yield
    finally:
        for name, op in kernels.OPS.items():
            op.implementations = before[name]


@lru_cache
def collect(preset: str, size: int, batch: int = 1, tokens: int = 77) -> Counter[Call]:
    """How often each op gets which shapes in one evaluation of a U-Net preset.

    Args:
        preset: a name in UNETS; size: height and width of x; tokens: length of the context.
    """
    config = UNETS[preset]
    calls: Counter[Call] = Counter()
    with torch.device("meta"), torch.no_grad(), noting(calls):
        network = UNet(config)
        options: dict[str, Tensor] = {}
        if config.context_dim:
            options["context"] = torch.empty(batch, tokens, config.context_dim)
        if config.num_classes:
            options["y"] = torch.zeros(batch, dtype=torch.int64)
        x = torch.empty(batch, config.in_channels, size, size)
        network(x, torch.zeros(batch), **options)
    return calls


def largest(op: str, preset: str, size: int, batch: int = 1) -> tuple[tuple[int, ...], ...]:
    """The shapes of the call of `op` with the most numbers in its tensors."""
    calls = [shapes for name, shapes in collect(preset, size, batch) if name == op]
    return max(calls, key=lambda shapes: sum(torch.Size(s).numel() for s in shapes))
