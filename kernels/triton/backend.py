"""Wrap an op's Triton kernels as one of its backends."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

from ..choose import Backend, elsewhere
from .launches import DTYPES


def why_not_dtypes(*args: Any) -> str | None:
    """Why Triton kernels cannot take the tensors among these arguments, or None if they can."""
    for x in args:
        if isinstance(x, Tensor) and x.is_floating_point() and x.dtype not in DTYPES:
            return f"it supports fp32, fp16 and bf16, got {str(x.dtype).removeprefix('torch.')}"
    return None


def slower_in_fp32(x: Tensor, *_: Any) -> str | None:
    """`Backend.slower` of matrix products."""
    return "its fp32 products do not use tensor cores" if x.dtype.itemsize == 4 else None


def triton_backend(
    *,
    forward: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    why_not: Callable[..., str | None] | None = None,
    one_device: bool = False,
    settings: Callable[[], Hashable] | None = None,
) -> Backend:
    """Build an op's backend "triton".

    Args:
        why_not: the op's own limits; unsupported dtypes are always refused.
        one_device: refuse tensors on several devices, for an op whose reference supports them.
        settings: see `Backend`.
    """
    names = list(inspect.signature(forward).parameters)

    def objection(*args: Any) -> str | None:
        reason = why_not_dtypes(*args) or (elsewhere(names, args) if one_device else None)
        return reason if reason is not None or why_not is None else why_not(*args)

    return Backend(
        name="triton",
        forward=forward,
        backward=backward,
        why_not=objection,
        planned=True,
        settings=settings,
    )
