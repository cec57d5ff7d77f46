"""Add a residual, then apply LayerNorm over the last dimension.

    total = x + residual                          rounded to the dtype of x
    y     = layer_norm(total, weight, bias)

Bytes that must move: x and residual in, total and y out, 4 * rows * D * itemsize; eager PyTorch
moves 5. The kernels are those of `layer_norm`. Only total is saved for the backward pass, which
adds its gradient to the norm's: one gradient for x and residual, 4 * rows * D * itemsize.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..checks import check_shape, compute_dtype
from ..layer_norm import (
    check_layer_norm,
    cpu,
    cuda,
    layer_norm_formula,
    layer_norm_reference,
    triton,
)
from ..op import Op, Work, reference_gradients
from ..tuning.measured import regime


def add_layer_norm_reference(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """The op in plain PyTorch; see `add_layer_norm`."""
    dtype = compute_dtype(x)
    total = (x.to(dtype) + residual.to(dtype)).to(x.dtype)
    return layer_norm_reference(total, weight, bias, eps=eps), total


def add_layer_norm_formula(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """The paper's formula, evaluated in fp64 to check the kernels."""
    total = x + residual
    return layer_norm_formula(total, weight, bias, eps), total


def _fake(x: Tensor, *_: Any) -> tuple[tuple[Tensor, Tensor], None]:
    return (x.new_empty(x.shape), x.new_empty(x.shape)), None


def _keep(args: tuple[Any, ...], outputs: Sequence[Tensor]) -> tuple[Any, ...]:
    """Save total in place of x; the residual is not needed."""
    return outputs[1], None, *args[2:]


def _again(
    gradients: Sequence[Tensor | None],
    total: Tensor,
    residual: None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor | None, ...]:
    dy, dtotal = gradients
    norm = (total, weight, bias, eps)
    dx, *others = reference_gradients(layer_norm_reference, norm, (dy,), (0, 1, 2))
    return dx if dtotal is None or dx is None else dx + dtotal, *others


def _of_total(gradients: Sequence[Tensor | None], *_: Any) -> tuple[Tensor | None, ...]:
    return gradients[1], None, None


def _work(x: Tensor, *_: Any, backward: bool = False) -> Work:
    return Work(bytes=4 * x.numel() * x.element_size())


def _example(draw: Callable[..., Tensor]) -> dict[str, Any]:
    x, residual = draw(2, 16, 64), draw(2, 16, 64)
    return {"x": x, "residual": residual, "weight": draw(64), "bias": draw(64)}


def _check(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> None:
    check_layer_norm("add_layer_norm", x, weight, bias, eps)
    check_shape("add_layer_norm", "residual", residual, tuple(x.shape))


_op = Op(
    name="add_layer_norm",
    schema="(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps) -> "
    "(Tensor, Tensor)",
    check=_check,
    reference=add_layer_norm_reference,
    formula=add_layer_norm_formula,
    fake=_fake,
    work=_work,
    shape_class=regime,
    example=_example,
    kernels=(cuda.ADDING, triton.ADDING, cpu.ADDING),
    keep=_keep,
    passed_on={"residual": "x"},
    again=_again,
    without_first=_of_total,
)


@_op.exposes
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
        ValueError: unsupported shape or dtype.
    """
    result: tuple[Tensor, Tensor] = _op(x, residual, weight, bias, eps)
    return result
