"""The Triton backends of `group_norm_silu` and `add_group_norm_silu`."""

from __future__ import annotations

from ..choose import without
from ..triton import triton_backend
from .triton_backward import backward
from .triton_forward import forward

ADDING = triton_backend(forward=forward, backward=backward)
"""The backend of `add_group_norm_silu`."""
BACKEND = without(ADDING, slice(4, 6), gradients=slice(3, 4))
