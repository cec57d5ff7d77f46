"""The CPU kernels of `gate_residual`, in csrc/cpu/gate_residual.cpp."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import compiled
from ..cpu import DTYPES, address, as_float, cpu_backend, room
from ..views import as_rows


def forward(x: Tensor, gate: Tensor, residual: Tensor, keep: bool) -> tuple[Tensor, None]:
    """Return y, contiguous."""
    n, length, d = x.shape
    y = x.new_empty(x.shape)
    if x.numel():
        flat, flat_residual, wide_gate = as_rows(x), as_rows(residual), as_float(gate)
        addresses = map(address, (flat, flat_residual, y, wide_gate))
        sizes = n, length, d, flat.stride(0), flat_residual.stride(0)
        compiled.native.gate_residual(DTYPES[x.dtype], *addresses, *sizes)
    return y, None


def backward(
    dy: Tensor, x: Tensor, gate: Tensor, residual: None, needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """Return dx, dgate."""
    n, length, d = x.shape
    dx, dgate = x.new_empty(x.shape), room(n, d, zeros=not x.numel())
    if x.numel():
        flat, flat_dy, wide_gate = as_rows(x), as_rows(dy), as_float(gate)
        addresses = map(address, (flat_dy, flat, dx, wide_gate, dgate))
        sizes = n, length, d, flat_dy.stride(0), flat.stride(0)
        compiled.native.gate_residual_backward(DTYPES[x.dtype], *addresses, *sizes)
    return dx, dgate.to(gate.dtype)


BACKEND = cpu_backend(forward=forward, backward=backward)
