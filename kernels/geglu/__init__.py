"""GEGLU: the gated activation of a transformer block's feed-forward layer.

    y = a * gelu(g),   x = [a | g]                      Shazeer 2020, eq. 5
    gelu(g) = g * (1 + erf(g / sqrt(2))) / 2

Bytes that must move: 2D numbers in, D out, 3 * rows * D * itemsize; eager PyTorch moves 5. The
backward pass reads x and dy and writes dx, 5 * rows * D * itemsize; only x is saved for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_floating, compute_dtype
from ..op import Op, Work
from ..tuning.measured import regime
from . import cpu, cuda, triton


def geglu_reference(x: Tensor) -> Tensor:
    """The op in plain PyTorch; see `geglu`."""
    value, gate = x.to(compute_dtype(x)).chunk(2, dim=-1)
    return (value * F.gelu(gate)).to(x.dtype)


def geglu_formula(x: Tensor) -> Tensor:
    """The paper's formula, evaluated in fp64 to check the kernels."""
    d = x.shape[-1] // 2
    value, gate = x[..., :d], x[..., d:]
    return value * gate * (1 + torch.erf(gate / 2**0.5)) / 2


def _fake(x: Tensor) -> tuple[Tensor, None]:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2), None


def _work(x: Tensor, backward: bool = False) -> Work:
    return Work(bytes=(5 if backward else 3) * x.numel() // 2 * x.element_size())


def _example(draw: Callable[..., Tensor]) -> dict[str, Any]:
    return {"x": draw(2, 16, 128)}


def _check(x: Tensor) -> None:
    check_floating("geglu", "x", x)
    if x.ndim < 1 or x.shape[-1] % 2:
        raise ValueError(
            f"geglu: the last dimension of x must be even, got shape {tuple(x.shape)}; "
            "project to 2 * D features"
        )


_op = Op(
    name="geglu",
    schema="(Tensor x) -> Tensor",
    check=_check,
    reference=geglu_reference,
    formula=geglu_formula,
    fake=_fake,
    work=_work,
    shape_class=regime,
    example=_example,
    kernels=(cuda.BACKEND, triton.BACKEND, cpu.BACKEND),
)


@_op.exposes
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
    result: Tensor = _op(x)
    return result
