"""The first half of a transformer block's feed-forward layer: a linear layer and its gated GELU.

    y = a * gelu(g),   [a | g] = x W^T + b                 Shazeer 2020, eq. 5

Bytes that must move, for M rows of K features and D results: M * K + 2 * D * K + M * D numbers. As
two kernels the product writes [a | g] and the activation reads it, 4 * M * D numbers more.

The Triton kernel computes the same tile of a and of g in two accumulators and gates one with the
other before it writes. cuBLAS is faster at the product alone, so `auto` takes the Triton kernel
only where the counts (`tuning.products`) or a measurement say that it wins; the other backends are
PyTorch's product and the kernel of `geglu`. So is the backward pass of all: it computes [a | g]
again, since the fused forward pass does not write it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_floating, check_linear, compute_dtype, without_autocast
from ..geglu import geglu_formula, geglu_reference
from ..op import Op, Work
from ..tuning.products import apart_seconds, fused_seconds, tiles, triton_where
from . import cpu, cuda, triton


def linear_geglu_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The op in plain PyTorch; see `linear_geglu`."""
    dtype = compute_dtype(x)
    with without_autocast(x.device.type):
        wide = F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return geglu_reference(wide).to(x.dtype)


def linear_geglu_formula(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The paper's formula, evaluated in fp64 to check the kernels."""
    h = torch.einsum("...k,dk->...d", x, weight)
    return geglu_formula(h if bias is None else h + bias)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, None]:
    return x.new_empty(*x.shape[:-1], weight.shape[0] // 2), None


def _sizes(x: Tensor, weight: Tensor) -> tuple[int, int, int]:
    """M, D and K."""
    return x.numel() // max(1, x.shape[-1]), weight.shape[0] // 2, weight.shape[1]


def _work(x: Tensor, weight: Tensor, bias: Tensor | None, backward: bool = False) -> Work:
    """Backward reads x, the weight and dy, writes two gradients, and has three products."""
    rows, d, k = _sizes(x, weight)
    operands = x.numel() + weight.numel()
    return Work(
        bytes=((2 if backward else 1) * operands + rows * d) * x.element_size(),
        flops=(3 if backward else 1) * 4 * rows * d * k,
    )


def fused_is_counted_faster(x: Tensor, weight: Tensor) -> bool:
    """Whether one Triton kernel takes less time than two kernels, by the counts of
    `tuning.products`. x: (..., K); weight: (2D, K)."""
    rows, d, k = _sizes(x, weight)
    size, flops = x.element_size(), 4 * rows * d * k
    operands = (rows * k + 2 * d * k) * size
    fused = fused_seconds(flops, operands + rows * d * size)
    apart = apart_seconds(flops, operands + 2 * rows * d * size, [3 * rows * d * size])
    return fused < apart


def _unmeasured(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    return triton_where(fused_is_counted_faster, x, weight)


def _shape_class(x: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    rows, d, k = _sizes(x, weight)
    return f"{tiles(rows, d)}/{k}"


def _example(draw: Callable[..., Tensor]) -> dict[str, Any]:
    return {"x": draw(2, 8, 48), "weight": draw(64, 48), "bias": draw(64)}


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    op = "linear_geglu"
    check_floating(op, "x", x)
    check_linear(op, x, weight, bias)
    if weight.shape[0] % 2:
        raise ValueError(
            f"{op}: the first dimension of weight must be even, got shape {tuple(weight.shape)}; "
            "project to 2 * D features"
        )


_op = Op(
    name="linear_geglu",
    schema="(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    check=_check,
    reference=linear_geglu_reference,
    formula=linear_geglu_formula,
    fake=_fake,
    work=_work,
    shape_class=_shape_class,
    unmeasured=_unmeasured,
    example=_example,
    kernels=(cuda.BACKEND, triton.BACKEND, cpu.BACKEND),
)


@_op.exposes
def linear_geglu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer to 2D features and their gated GELU: ``geglu(x @ weight.T + bias)``.

    Args:
        x: (..., K), fp64/fp32/fp16/bf16, any strides.
        weight: (2D, K), the dtype of x, any strides; rows of the values, then of the gates.
        bias: (2D,), the dtype of x, or None.

    Returns:
        (..., D), contiguous, in the dtype of x. Differentiable in every tensor; the backward pass
        computes the linear layer again.

    Raises:
        ValueError: unsupported shapes or dtypes.

    Shazeer 2020 (GLU Variants Improve Transformer), eq. 5.
    """
    result: Tensor = _op(x, weight, bias)
    return result
