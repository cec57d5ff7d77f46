"""The CPU kernels of `add_layer_norm`, which are those of `layer_norm`."""

from __future__ import annotations

from ..cpu import cpu_backend
from ..layer_norm.adapters import with_residual
from ..layer_norm.cpu import norm_backward, norm_forward

BACKEND = cpu_backend(**with_residual(norm_forward, norm_backward))
