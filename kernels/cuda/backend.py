"""Wrap an op's CUDA kernels as one of its backends."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
from typing import Any

import torch

from ..choose import Backend, elsewhere
from .library import SUPPORTED, refusal


def cuda_backend(
    *,
    forward: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    why_not: Callable[..., str | None] | None = None,
    dtypes: tuple[torch.dtype, ...] = SUPPORTED,
    settings: Callable[[], Hashable] | None = None,
) -> Backend:
    """Build an op's backend "cuda". Tensors on several devices and devices that the library has no
    code for are always refused; `why_not` adds the op's own limits. settings: see `Backend`."""
    names = list(inspect.signature(forward).parameters)

    def objection(*args: Any) -> str | None:
        x = args[0]
        refused = refusal(x.device.index or 0) if x.is_cuda else None
        refused = refused or elsewhere(names, args)
        return refused if refused is not None or why_not is None else why_not(*args)

    return Backend(
        name="cuda",
        forward=forward,
        backward=backward,
        why_not=objection,
        dtypes=dtypes,
        planned=True,
        settings=settings,
    )
