"""The CUDA kernels of `add_group_norm_silu`, which are those of `group_norm_silu`."""

from __future__ import annotations

from ..cuda import cuda_backend
from ..group_norm_silu.adapters import with_addends
from ..group_norm_silu.cuda import norm_backward, norm_forward

BACKEND = cuda_backend(**with_addends(norm_forward, norm_backward))
