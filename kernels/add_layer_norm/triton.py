"""The Triton kernels of `add_layer_norm`, which are those of `layer_norm`."""

from __future__ import annotations

from ..layer_norm.adapters import with_residual
from ..layer_norm.triton import norm_backward, norm_forward
from ..triton import triton_backend

BACKEND = triton_backend(**with_residual(norm_forward, norm_backward))
