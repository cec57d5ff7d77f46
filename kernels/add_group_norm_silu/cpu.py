"""The CPU kernels of `add_group_norm_silu`, which are those of `group_norm_silu`."""

from __future__ import annotations

from ..cpu import cpu_backend
from ..group_norm_silu.adapters import with_addends
from ..group_norm_silu.cpu import norm_backward, norm_forward

BACKEND = cpu_backend(**with_addends(norm_forward, norm_backward))
