"""A linear layer of two tensors as if their features were concatenated: the shortcut of a residual
block whose input is x and, over a skip connection, an output of the encoder.

    y = [x | skip] W^T + b = x W1^T + skip W2^T + b,   W = [W1 | W2]

Bytes that must move, for M rows of K1 + K2 features and N results: M * (K1 + K2) + N * (K1 + K2) +
M * N numbers. Concatenating first would add 2 * M * (K1 + K2); two products, of which the second
adds to the first, read and write y once more, M * N each.

The Triton kernel sums over the features of both. cuBLAS is faster at a product, so `auto` takes the
Triton kernel only where the counts (`tuning.products`) or a measurement say that it wins; the other
backends are two products of PyTorch. So is the backward pass of all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_floating, check_linear, compute_dtype, without_autocast
from ..op import Op, Work
from ..tuning.products import fused_seconds, product_seconds, tiles, triton_where
from . import composed, triton


def cat_linear_reference(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The op in plain PyTorch; see `cat_linear`."""
    dtype = compute_dtype(x)
    both = torch.cat([x, skip], dim=-1).to(dtype)
    with without_autocast(x.device.type):
        wide = F.linear(both, weight.to(dtype), None if bias is None else bias.to(dtype))
    return wide.to(x.dtype)


def cat_linear_formula(
    x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The formula, evaluated in fp64 to check the kernels."""
    y = torch.einsum("...k,nk->...n", torch.cat([x, skip], dim=-1), weight)
    return y if bias is None else y + bias


def _fake(x: Tensor, skip: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, None]:
    return x.new_empty(*x.shape[:-1], weight.shape[0]), None


def _rows(x: Tensor) -> int:
    return x.numel() // max(1, x.shape[-1])


def _work(
    x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None, backward: bool = False
) -> Work:
    """Backward reads dy, both inputs and the weight, and writes their gradients."""
    operands, y = x.numel() + skip.numel() + weight.numel(), _rows(x) * weight.shape[0]
    times = 2 if backward else 1
    return Work(
        bytes=(times * operands + y) * x.element_size(),
        flops=times * 2 * _rows(x) * weight.numel(),
    )


def fused_is_counted_faster(x: Tensor, skip: Tensor, weight: Tensor) -> bool:
    """Whether one Triton kernel takes less time than two products, by the counts of
    `tuning.products`. The tensors are those of `cat_linear`."""
    rows, n, size = _rows(x), weight.shape[0], x.element_size()
    work = _work(x, skip, weight, None)
    of_x, of_skip = (rows * k + n * k + rows * n for k in (x.shape[-1], skip.shape[-1]))
    first = product_seconds(2 * rows * n * x.shape[-1], of_x * size)
    second = product_seconds(2 * rows * n * skip.shape[-1], (of_skip + rows * n) * size)
    return fused_seconds(work.flops, work.bytes) < first + second


def _unmeasured(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    return triton_where(fused_is_counted_faster, x, skip, weight)


def _shape_class(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    return f"{tiles(_rows(x), weight.shape[0])}/{weight.shape[1]}"


def _example(draw: Callable[..., Tensor]) -> dict[str, Any]:
    return {"x": draw(2, 8, 40), "skip": draw(2, 8, 24), "weight": draw(48, 64), "bias": draw(48)}


def _check(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    op = "cat_linear"
    check_floating(op, "x", x)
    if skip.shape[:-1] != x.shape[:-1] or skip.dtype != x.dtype or not skip.ndim:
        raise ValueError(
            f"{op}: skip must be (..., K2) for x (..., K1), of one dtype, got {tuple(skip.shape)} "
            f"and {tuple(x.shape)}, {skip.dtype} and {x.dtype}"
        )
    both = x.new_empty((), device="meta").expand(*x.shape[:-1], x.shape[-1] + skip.shape[-1])
    check_linear(op, both, weight, bias)


_op = Op(
    name="cat_linear",
    schema="(Tensor x, Tensor skip, Tensor weight, Tensor? bias) -> Tensor",
    check=_check,
    reference=cat_linear_reference,
    formula=cat_linear_formula,
    fake=_fake,
    work=_work,
    shape_class=_shape_class,
    unmeasured=_unmeasured,
    example=_example,
    kernels=(composed.CUDA, triton.BACKEND, composed.CPU),
)


@_op.exposes
def cat_linear(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer of two tensors: ``torch.cat([x, skip], -1) @ weight.T + bias``, without the
    concatenation.

    Args:
        x: (..., K1), fp64/fp32/fp16/bf16; all operands have its dtype, and any strides.
        skip: (..., K2). weight: (N, K1 + K2). bias: (N,) or None.

    Returns:
        (..., N), contiguous, in the dtype of x. Differentiable in every tensor.

    Raises:
        ValueError: unsupported shapes or dtypes.

    The concatenation: Ronneberger et al. 2015 (U-Net), figure 1.
    """
    result: Tensor = _op(x, skip, weight, bias)
    return result
