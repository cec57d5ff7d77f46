"""LayerNorm over the last dimension, alone or after a residual addition.

    total = x + residual                                          rounded to the dtype of x
    y     = (total - m) / sqrt(v + eps) * weight + bias           Ba et al. 2016, eq. 3-4
    m, v  = mean and biased variance of a row of D numbers

Bytes that must move: 2 * rows * D * itemsize; with the addition 4 (x and residual in, total and y
out), where eager PyTorch moves 5. Statistics are fp32 (fp64 for fp64 input).

Backward, which recomputes m and v (only x, or total, is saved):

    g  = dy * weight,   n = (x - m) / sqrt(v + eps)
    dx = (g - mean(g) - n mean(g n)) / sqrt(v + eps) + dtotal
    dweight = sum over rows of dy n,   dbias = sum over rows of dy

Bytes: 3 * rows * D * itemsize (x and dy in, dx out), 4 with dtotal. dweight and dbias are summed in
two steps, without atomics: each of P programs adds up every P-th tile of rows, then a second kernel
adds the P partial sums in order. That costs 8 * P * D bytes for each of dweight and dbias, written
and read in the L2 cache.

A row of up to 4096 elements stays in registers and is read once. Wider rows (no known model has
them) are read twice (x and residual). The backward pass reads x 3 times and dy twice, and both once
more for dweight and dbias.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_floating, check_number, check_shape, compute_dtype
from ..op import Op, Work
from ..tuning.measured import regime
from . import cpu, cuda, triton


def layer_norm_reference(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """The op in plain PyTorch; see `layer_norm`."""
    dtype = compute_dtype(x)
    weight, bias = (None if p is None else p.to(dtype) for p in (weight, bias))
    wide = x.to(dtype)
    # LayerNorm and its gradient are invariant to a shift of a row: subtracting the mean first keeps
    # precision when the mean is large, and makes a constant row exactly 0
    first = wide.detach()[..., :1]
    mean = first + (wide.detach() - first).mean(-1, keepdim=True)
    centered = wide - mean
    return F.layer_norm(centered, x.shape[-1:], weight, bias, eps).to(x.dtype)


def layer_norm_formula(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """The paper's formula, evaluated in fp64 to check the kernels."""
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    y = (x - mean) / torch.sqrt(variance + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _fake(x: Tensor, *_: Any) -> tuple[Tensor, None]:
    return x.new_empty(x.shape), None


def _work(x: Tensor, *_: Any, backward: bool = False) -> Work:
    return Work(bytes=(3 if backward else 2) * x.numel() * x.element_size())


def _example(draw: Callable[..., Tensor]) -> dict[str, Any]:
    return {"x": draw(2, 16, 64), "weight": draw(64), "bias": draw(64)}


def check_layer_norm(
    op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> None:
    """Checks shared by `layer_norm` and `add_layer_norm`. Raises ValueError."""
    check_floating(op, "x", x)
    if x.ndim < 1:
        raise ValueError(
            f"{op}: x must be (..., D), got a scalar; add a dimension to normalize over"
        )
    check_shape(op, "weight", weight, (x.shape[-1],))
    check_shape(op, "bias", bias, (x.shape[-1],))
    check_number(op, "eps", eps)


def _check(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    check_layer_norm("layer_norm", x, weight, bias, eps)


_op = Op(
    name="layer_norm",
    schema="(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    check=_check,
    reference=layer_norm_reference,
    formula=layer_norm_formula,
    fake=_fake,
    work=_work,
    shape_class=regime,
    example=_example,
    kernels=(cuda.BACKEND, triton.BACKEND, cpu.BACKEND),
)


@_op.exposes
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
        ValueError: unsupported shape or dtype.

    Ba et al. 2016 (Layer Normalization), eq. 3-4.
    """
    result: Tensor = _op(x, weight, bias, eps)
    return result
