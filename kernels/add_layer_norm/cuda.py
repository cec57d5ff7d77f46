"""The CUDA kernels of `add_layer_norm`, which are those of `layer_norm`."""

from __future__ import annotations

from ..cuda import cuda_backend
from ..layer_norm.adapters import with_residual
from ..layer_norm.cuda import norm_backward, norm_forward

BACKEND = cuda_backend(**with_residual(norm_forward, norm_backward))
