"""An op's Triton kernels as one of its backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..choose import Backend
from .launches import DTYPES


def why_not_dtypes(*args: Any) -> str | None:
    """Why no Triton kernel takes the tensors among these arguments, or None if they all do."""
    for x in args:
        if isinstance(x, Tensor) and x.is_floating_point() and x.dtype not in DTYPES:
            return f"it takes fp32, fp16 and bf16, got {str(x.dtype).removeprefix('torch.')}"
    return None


def triton_backend(
    *,
    forward: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    why_not: Callable[..., str | None] | None = None,
) -> Backend:
    """The backend "triton" of an op; `why_not` says what it cannot run besides other dtypes."""

    def objection(*args: Any) -> str | None:
        return why_not_dtypes(*args) or (None if why_not is None else why_not(*args))

    return Backend(name="triton", forward=forward, backward=backward, why_not=objection)
