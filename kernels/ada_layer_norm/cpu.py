"""The CPU kernels of `ada_layer_norm`, in csrc/cpu/ada_layer_norm.cpp."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import compiled
from ..cpu import DTYPES, address, as_float, cpu_backend, room
from ..views import as_rows


def forward(x: Tensor, scale: Tensor, shift: Tensor, eps: float, keep: bool) -> tuple[Tensor, None]:
    """Return y, contiguous."""
    n, length, d = x.shape
    y = x.new_empty(x.shape)
    if x.numel():
        flat, wide_scale, wide_shift = as_rows(x), as_float(scale), as_float(shift)
        addresses = map(address, (flat, y, wide_scale, wide_shift))
        sizes = n, length, d, flat.stride(0), eps
        compiled.native.ada_layer_norm(DTYPES[x.dtype], *addresses, *sizes)
    return y, None


def backward(
    dy: Tensor, x: Tensor, scale: Tensor, shift: Tensor, eps: float, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, dscale, dshift."""
    n, length, d = x.shape
    dx = x.new_empty(x.shape)
    dscale, dshift = (room(n, d, zeros=not x.numel()) for _ in range(2))
    if x.numel():
        flat, flat_dy, wide_scale = as_rows(x), as_rows(dy), as_float(scale)
        addresses = map(address, (flat_dy, flat, dx, wide_scale, dscale, dshift))
        sizes = n, length, d, flat_dy.stride(0), flat.stride(0), eps
        compiled.native.ada_layer_norm_backward(DTYPES[x.dtype], *addresses, *sizes)
    return dx, dscale.to(scale.dtype), dshift.to(shift.dtype)


BACKEND = cpu_backend(forward=forward, backward=backward)
