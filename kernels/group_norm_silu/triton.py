"""The Triton kernels of `group_norm_silu` and `add_group_norm_silu`, as backends of both."""

from __future__ import annotations

from ..choose import without
from ..triton import triton_backend
from .triton_backward import backward
from .triton_forward import forward

ADDING = triton_backend(forward=forward, backward=backward)
"""Of `add_group_norm_silu`."""
BACKEND = without(ADDING, slice(4, 6), gradients=slice(3, 4))
