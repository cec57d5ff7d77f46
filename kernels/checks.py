"""Checks of arguments that the public functions share, and the dtypes of their sums."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .tracing import constant_in_graphs


def compute_dtype(x: Tensor) -> torch.dtype:
    """fp64 for fp64, else fp32: the dtype in which every op takes its sums and statistics."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Disable autocast, which would cast fp32 products back to half precision."""
    if not autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


@constant_in_graphs  # torch 2.11's Dynamo cannot trace the call
def autocast_available(device_type: str) -> bool:
    """Whether a device has autocast; the meta device has none."""
    return torch.amp.is_autocast_available(device_type)


def check_floating(op: str, name: str, x: Tensor) -> None:
    """Raise ValueError unless x is a floating-point tensor."""
    if not x.is_floating_point():
        raise ValueError(f"{op}: {name} must be floating point, got {x.dtype}; use {name}.float()")


def check_number(op: str, name: str, value: object, *, whole: bool = False) -> None:
    """Raise ValueError unless value is a real number, or where `whole` an integer."""
    kinds = (int, torch.SymInt) if whole else (float, int, torch.SymFloat, torch.SymInt)
    if not isinstance(value, kinds):
        expected = "an integer" if whole else "a number"
        raise ValueError(f"{op}: {name} must be {expected}, got {value!r}")


def check_shape(op: str, name: str, x: Tensor | None, *shapes: tuple[int, ...]) -> None:
    """Raise ValueError unless x is None or has one of the shapes."""
    if x is not None and x.shape not in shapes:
        expected = " or ".join(str(shape) for shape in shapes)
        raise ValueError(f"{op}: {name} must have shape {expected}, got {tuple(x.shape)}")


def check_linear(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError unless weight (N, K) and bias (N,) are those of a linear layer on x (..., K)
    in its dtype."""
    if x.ndim < 1 or weight.ndim != 2 or weight.shape[1] != x.shape[-1] or not weight.shape[1]:
        raise ValueError(
            f"{op}: weight must be (N, K) with K > 0 the last dimension of x, got x of shape "
            f"{tuple(x.shape)} and weight of shape {tuple(weight.shape)}"
        )
    check_shape(op, "bias", bias, (weight.shape[0],))
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.dtype != x.dtype:
            raise ValueError(
                f"{op}: {name} must have the dtype of x, {x.dtype}, got {t.dtype}; convert one"
            )
