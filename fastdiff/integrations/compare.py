"""Arguments and results of a call that is made twice: copied, described, compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest accepted difference by the lowest precision involved, relative to the largest number of
the original's result. The half-precision ones leave room for about 12 roundings to the dtype."""
TF32_TOLERANCE = 5e-3


def parts(value: Any) -> Iterator[tuple[Any, Any]]:
    """(key, part) of a container; nothing for other values."""
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, tuple | list):
        yield from enumerate(value)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from ((f.name, getattr(value, f.name)) for f in fields(value))


def leaves(value: Any, kind: type) -> Iterator[Any]:
    """All objects of a type that a value contains, depth first."""
    if isinstance(value, kind):
        yield value
        return
    for _, part in parts(value):
        yield from leaves(part, kind)


def copied(value: Any) -> Any:
    """Tuples, lists and dictionaries with the tensors in them cloned."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (tuple, list):
        return type(value)(map(copied, value))
    return {k: copied(v) for k, v in value.items()} if type(value) is dict else value


def described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.stride(), value.device, value.requires_grad
    if value is None or isinstance(value, bool | int | float | str | torch.dtype):
        return value
    return type(value), tuple((str(key), described(part)) for key, part in parts(value))


def tolerance(involved: Any) -> float:
    tensors = [t for t in leaves(involved, Tensor) if t.is_floating_point()]
    found = {t.dtype for t in tensors}
    found |= {
        torch.get_autocast_dtype(device)
        for device in {t.device.type for t in tensors}
        if torch.is_autocast_enabled(device)
    }
    bound = max((TOLERANCES.get(dtype, 0.0) for dtype in found), default=0.0)
    tf32 = torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
    return max(bound, TF32_TOLERANCE) if tf32 and any(t.is_cuda for t in tensors) else bound


def difference(found: Any, wanted: Any, bound: float) -> str | None:
    """How two results differ, or None. Numbers that are not finite in the original do not count."""
    if isinstance(wanted, Tensor) and isinstance(found, Tensor):
        return _difference(found.detach(), wanted.detach(), bound)
    if type(found) is not type(wanted):
        return f"returns a {type(found).__name__}, the original a {type(wanted).__name__}"
    mine, theirs = dict(parts(found)), dict(parts(wanted))
    if mine.keys() != theirs.keys():
        return f"returns {len(mine)} values, the original {len(theirs)}"
    found_in = (difference(mine[key], part, bound) for key, part in theirs.items())
    return next((reason for reason in found_in if reason is not None), None)


def _difference(found: Tensor, wanted: Tensor, bound: float) -> str | None:
    mine, theirs = (f"{t.dtype} of shape {tuple(t.shape)} on {t.device}" for t in (found, wanted))
    if mine != theirs:
        return f"returns {mine}, the original {theirs}"
    if not wanted.is_floating_point():
        return None if torch.equal(found, wanted) else "returns other numbers"
    finite = wanted.isfinite()
    exact = wanted[finite].double()
    if not exact.numel():
        return None
    scale, moved = float(exact.abs().max()), float((found[finite].double() - exact).abs().max())
    if moved <= bound * scale:  # False for NaN
        return None
    return f"differs from the original by {moved / (scale or 1.0):.2g} of its largest number"


def same(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and bool(torch.equal(x.detach().nan_to_num(), y.nan_to_num()))
