"""GEGLU: the gated activation of a transformer block's feed-forward layer.

    y = a * gelu(g),   x = [a | g]                      Shazeer 2020, eq. 5
    gelu(g) = g * (1 + erf(g / sqrt(2))) / 2

Bytes that must move: 2D numbers in, D out, 3 * rows * D * itemsize; eager moves 5.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastdiff.kernels.dispatch import check_floating, compute_dtype, define_op


def geglu_reference(x: Tensor) -> Tensor:
    """The op in plain PyTorch; see `geglu`."""
    value, gate = x.to(compute_dtype(x)).chunk(2, dim=-1)
    return (value * F.gelu(gate)).to(x.dtype)


_op = define_op("geglu", geglu_reference)


def geglu(x: Tensor) -> Tensor:
    """Gated GELU: ``x[..., :D] * gelu(x[..., D:])`` with the exact (erf) GELU.

    Args:
        x: (..., 2D), fp64/fp32/fp16/bf16, any strides.

    Returns:
        (..., D) in the dtype of x. Differentiable.

    Raises:
        ValueError: the last dimension is odd, or x is not floating point.

    Shazeer 2020 (GLU Variants Improve Transformer), eq. 5.
    """
    check_floating("geglu", "x", x)
    if x.ndim < 1 or x.shape[-1] % 2:
        raise ValueError(
            f"geglu: the last dimension of x must be even, got shape {tuple(x.shape)}; "
            "project to 2 * D features"
        )
    result: Tensor = _op(x)
    return result
