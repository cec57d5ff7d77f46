"""The Triton kernels of `add_group_norm_silu`, which are those of `group_norm_silu`."""

from __future__ import annotations

from ..group_norm_silu.adapters import with_addends
from ..group_norm_silu.triton_backward import norm_backward
from ..group_norm_silu.triton_forward import norm_forward
from ..triton import triton_backend

BACKEND = triton_backend(**with_addends(norm_forward, norm_backward))
