"""`group_norm_silu` by the Triton kernels of triton_forward.py and triton_backward.py."""

from __future__ import annotations

from ..triton import triton_backend
from .adapters import without_addends
from .triton_backward import norm_backward
from .triton_forward import norm_forward

BACKEND = triton_backend(**without_addends(norm_forward, norm_backward))
