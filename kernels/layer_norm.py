"""LayerNorm over the last dimension, alone or after a residual addition.

    total = x + residual                                          rounded to the dtype of x
    y     = (total - m) / sqrt(v + eps) * weight + bias           Ba et al. 2016, eq. 3-4
    m, v  = mean and biased variance of a row of D numbers

Bytes that must move: 2 * rows * D * itemsize; with the addition 4 (x and residual in, total and y
out), eager 5. Statistics are fp32 (fp64 for fp64 input).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastdiff.kernels.dispatch import check_floating, check_shape, compute_dtype, define_op


def layer_norm_reference(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5
) -> Tensor:
    """The op in plain PyTorch; see `layer_norm`."""
    dtype = compute_dtype(x)
    weight, bias = (None if p is None else p.to(dtype) for p in (weight, bias))
    wide = x.to(dtype)
    # LayerNorm and its gradient do not change when a row is shifted: this keeps the digits where
    # the mean is large, and makes a constant row exactly 0
    centered = wide - wide.detach()[..., :1]
    return F.layer_norm(centered, x.shape[-1:], weight, bias, eps).to(x.dtype)


def add_layer_norm_reference(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """The op in plain PyTorch; see `add_layer_norm`."""
    dtype = compute_dtype(x)
    total = (x.to(dtype) + residual.to(dtype)).to(x.dtype)
    return layer_norm_reference(total, weight, bias, eps=eps), total


def _check(op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    check_floating(op, "x", x)
    if x.ndim < 1:
        raise ValueError(
            f"{op}: x must be (..., D), got a scalar; give it a dimension to norm over"
        )
    check_shape(op, "weight", weight, (x.shape[-1],))
    check_shape(op, "bias", bias, (x.shape[-1],))


_layer_norm_op = define_op("layer_norm", layer_norm_reference)
_add_layer_norm_op = define_op("add_layer_norm", add_layer_norm_reference)


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5
) -> Tensor:
    """LayerNorm over the last dimension: ``(x - mean) / sqrt(var + eps) * weight + bias``.

    Args:
        x: (..., D), fp64/fp32/fp16/bf16, any strides.
        weight, bias: (D,), any float dtype, or None for 1 and 0.
        eps: added to the variance.

    Returns:
        (..., D) in the dtype of x. Differentiable in every tensor.

    Raises:
        ValueError: a shape or dtype that does not fit.

    Ba et al. 2016 (Layer Normalization), eq. 3-4.
    """
    _check("layer_norm", x, weight, bias)
    result: Tensor = _layer_norm_op(x, weight, bias, eps=eps)
    return result


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Add, then norm: ``total = x + residual``, ``y = layer_norm(total, weight, bias)``.

    Args:
        x, residual: (..., D), fp64/fp32/fp16/bf16, any strides.
        weight, bias, eps: as in `layer_norm`.

    Returns:
        (y, total), both (..., D) in the dtype of x; y is the norm of the rounded total.

    Raises:
        ValueError: a shape or dtype that does not fit.
    """
    _check("add_layer_norm", x, weight, bias)
    check_shape("add_layer_norm", "residual", residual, tuple(x.shape))
    result: tuple[Tensor, Tensor] = _add_layer_norm_op(x, residual, weight, bias, eps=eps)
    return result
