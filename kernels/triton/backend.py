"""An op's Triton kernels as one of its backends."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..choose import Backend, elsewhere
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
    one_device: bool = False,
) -> Backend:
    """The backend "triton" of an op.

    Args:
        why_not: what it cannot run besides other dtypes.
        one_device: it cannot run tensors on several devices, and the reference can.
    """
    names = list(inspect.signature(forward).parameters)

    def objection(*args: Any) -> str | None:
        reason = why_not_dtypes(*args) or (elsewhere(names, args) if one_device else None)
        return reason if reason is not None or why_not is None else why_not(*args)

    return Backend(name="triton", forward=forward, backward=backward, why_not=objection)
