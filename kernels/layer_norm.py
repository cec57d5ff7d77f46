"""LayerNorm over the last dimension, alone or after a residual addition.

    total = x + residual                                          rounded to the dtype of x
    y     = (total - m) / sqrt(v + eps) * weight + bias           Ba et al. 2016, eq. 3-4
    m, v  = mean and biased variance of a row of D numbers

Bytes that must move: 2 * rows * D * itemsize; with the addition 4 (x and residual in, total and y
out), eager 5. Statistics are fp32 (fp64 for fp64 input).

Backward, with m and v computed again (nothing but x, or total, is kept):

    g  = dy * weight,   n = (x - m) / sqrt(v + eps)
    dx = (g - mean(g) - n mean(g n)) / sqrt(v + eps) + dtotal
    dweight = sum over rows of dy n,   dbias = sum over rows of dy

Bytes: 3 * rows * D * itemsize (x and dy in, dx out), 4 with dtotal. dweight and dbias are summed in
two steps, without atomics: each of P programs adds up every P-th tile of rows, then a second kernel
adds the P shares in order. Each of the two adds 8 * P * D bytes, written and read in the L2 cache.

A row of up to 4096 numbers stays in registers: one read. Wider ones (no model has them) are read
twice (x and residual), by the backward pass 3 times (x; dy twice), and once more each for dweight
and dbias.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.kernels import _cuda, _layer_norm_cuda, extension
from fastdiff.kernels._layer_norm import empty_gradients, norm_backward, norm_forward
from fastdiff.kernels._triton import as_rows, register, rows_of, why_not
from fastdiff.kernels.dispatch import (
    check_floating,
    check_number,
    check_shape,
    compute_dtype,
    define_op,
)


def layer_norm_reference(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5
) -> Tensor:
    """The op in plain PyTorch; see `layer_norm`."""
    dtype = compute_dtype(x)
    weight, bias = (None if p is None else p.to(dtype) for p in (weight, bias))
    wide = x.to(dtype)
    # LayerNorm and its gradient do not change when a row is shifted: this keeps the digits where
    # the mean is large, and makes a constant row exactly 0
    first = wide.detach()[..., :1]
    mean = first + (wide.detach() - first).mean(-1, keepdim=True)
    centered = wide - mean
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


# The Triton kernels, which are in _layer_norm.py


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return norm_forward(x, None, weight, bias, eps)[0]


def _add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    y, total = norm_forward(x, residual, weight, bias, eps)
    assert total is not None
    return y, total


layer_norm_triton = torch.library.custom_op(
    "fastdiff::layer_norm_triton", _layer_norm, mutates_args=()
)
add_layer_norm_triton = torch.library.custom_op(
    "fastdiff::add_layer_norm_triton", _add_layer_norm, mutates_args=()
)
layer_norm_backward_triton = torch.library.custom_op(
    "fastdiff::layer_norm_backward_triton", norm_backward, mutates_args=()
)


@layer_norm_triton.register_fake
def _layer_norm_fake(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@add_layer_norm_triton.register_fake
def _add_layer_norm_fake(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@layer_norm_backward_triton.register_fake
def _layer_norm_backward_fake(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(x, weight, bias, needs)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(x, weight, bias)


def _keep_total(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, residual, weight, bias, ctx.eps = inputs
    ctx.residual_dtype = residual.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], weight, bias)


def _backward(
    ctx: Any, dy: Tensor, dtotal: Tensor | None, backward: Any = layer_norm_backward_triton
) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[-3:-1])
    dx, dweight, dbias = backward(dy, dtotal, x, weight, bias, ctx.eps, needs)
    return dx, dweight if needs[0] else None, dbias if needs[1] else None


def _layer_norm_autograd(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(ctx, dy, None), None


def _add_layer_norm_autograd(
    ctx: Any, dy: Tensor | None, dtotal: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Either gradient is None where nothing depends on that output."""
    dx, dweight, dbias = (dtotal, None, None) if dy is None else _backward(ctx, dy, dtotal)
    dresidual = None if dx is None else dx.to(ctx.residual_dtype)
    return dx, dresidual, dweight, dbias, None


layer_norm_triton.register_autograd(_layer_norm_autograd, setup_context=_keep)
add_layer_norm_triton.register_autograd(_add_layer_norm_autograd, setup_context=_keep_total)

_layer_norm_op = define_op("layer_norm", layer_norm_reference)
_add_layer_norm_op = define_op("add_layer_norm", add_layer_norm_reference)


def _objection(*tensors: Tensor | None, eps: float) -> str | None:
    return why_not(*tensors)


register(_layer_norm_op, layer_norm_triton, _objection)
register(_add_layer_norm_op, add_layer_norm_triton, _objection)


# CPU


def _forward_native(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = None if residual is None else torch.empty_like(y)
    if x.numel() == 0:
        return y, total
    flat, rows, stride = rows_of(x)
    addend, addend_stride, wide = None, 0, False
    if residual is not None:
        addend, _, addend_stride = rows_of(extension.as_dtype_or_float(residual, x.dtype))
        wide = addend.dtype is not x.dtype
    weight, bias = extension.as_float(weight), extension.as_float(bias)
    address = extension.address
    extension.native.layer_norm(
        extension.DTYPES[x.dtype],
        wide,
        flat.data_ptr(),
        address(addend),
        address(total),
        y.data_ptr(),
        address(weight),
        address(bias),
        rows,
        x.shape[-1],
        stride,
        addend_stride,
        eps,
    )
    return y, total


def _layer_norm_native(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5
) -> Tensor:
    return _forward_native(x, None, weight, bias, eps)[0]


def _add_layer_norm_native(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    y, total = _forward_native(x, residual, weight, bias, eps)
    assert total is not None
    return y, total


@torch.library.custom_op("fastdiff::layer_norm_cpu", mutates_args=(), device_types="cpu")
def layer_norm_cpu(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return _layer_norm_native(x, weight, bias, eps=eps)


@torch.library.custom_op("fastdiff::add_layer_norm_cpu", mutates_args=(), device_types="cpu")
def add_layer_norm_cpu(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return _add_layer_norm_native(x, residual, weight, bias, eps=eps)


@torch.library.custom_op("fastdiff::layer_norm_backward_cpu", mutates_args=(), device_types="cpu")
def layer_norm_backward_cpu(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """As `norm_backward`."""
    dx, dweight, dbias = empty_gradients(x, weight, bias, needs)
    if x.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_()
    flat, flat_dy = as_rows(x), as_rows(dy)
    flat_dtotal = None if dtotal is None else as_rows(dtotal)
    sums = [extension.room(x.shape[-1] if need else 0) for need in needs]
    weight, address = extension.as_float(weight), extension.address
    tensors = address(flat_dy), address(flat_dtotal), address(flat), address(dx), address(weight)
    strides = flat_dy.stride(0), 0 if flat_dtotal is None else flat_dtotal.stride(0), flat.stride(0)
    extension.native.layer_norm_backward(
        *(extension.DTYPES[x.dtype], *tensors, address(sums[0]), address(sums[1])),
        *(len(flat), x.shape[-1], *strides, eps),
    )
    return dx, dweight.copy_(sums[0]), dbias.copy_(sums[1])


layer_norm_cpu.register_fake(_layer_norm_fake)
add_layer_norm_cpu.register_fake(_add_layer_norm_fake)
layer_norm_backward_cpu.register_fake(_layer_norm_backward_fake)


def _backward_once_more(
    backward: Any, ctx: Any, dy: Tensor, dtotal: Tensor | None
) -> tuple[Tensor | None, ...]:
    """`_backward`, or where a graph of it is wanted the reference's."""
    if not torch.is_grad_enabled():
        return _backward(ctx, dy, dtotal, backward)
    reference = partial(layer_norm_reference, eps=ctx.eps)
    dx, *others = extension.reference_gradients(reference, ctx.saved_tensors, (dy,))
    return dx if dtotal is None or dx is None else dx + dtotal, *others


def _layer_norm_gradient(backward: Any, ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward_once_more(backward, ctx, dy, None), None


def _add_layer_norm_gradient(
    backward: Any, ctx: Any, dy: Tensor | None, dtotal: Tensor | None
) -> tuple[Tensor | None, ...]:
    found = (dtotal, None, None) if dy is None else _backward_once_more(backward, ctx, dy, dtotal)
    dx, dweight, dbias = found
    dresidual = None if dx is None else dx.to(ctx.residual_dtype)
    return dx, dresidual, dweight, dbias, None


layer_norm_cpu.register_autograd(
    partial(_layer_norm_gradient, layer_norm_backward_cpu), setup_context=_keep
)
add_layer_norm_cpu.register_autograd(
    partial(_add_layer_norm_gradient, layer_norm_backward_cpu), setup_context=_keep_total
)
extension.register(_layer_norm_op, _layer_norm_native, layer_norm_cpu)
extension.register(_add_layer_norm_op, _add_layer_norm_native, add_layer_norm_cpu)


# The CUDA kernels, which are in _layer_norm_cuda.py

layer_norm_cuda = _layer_norm_cuda.layer_norm_cuda
add_layer_norm_cuda = _layer_norm_cuda.add_layer_norm_cuda
layer_norm_backward_cuda = _layer_norm_cuda.layer_norm_backward_cuda
layer_norm_cuda.register_fake(_layer_norm_fake)
add_layer_norm_cuda.register_fake(_add_layer_norm_fake)
layer_norm_backward_cuda.register_fake(_layer_norm_backward_fake)
layer_norm_cuda.register_autograd(
    partial(_layer_norm_gradient, layer_norm_backward_cuda), setup_context=_keep
)
add_layer_norm_cuda.register_autograd(
    partial(_add_layer_norm_gradient, layer_norm_backward_cuda), setup_context=_keep_total
)


def _elsewhere(x: Tensor, *others: Tensor | None, eps: float) -> str | None:
    names = ("weight", "bias") if len(others) == 2 else ("residual", "weight", "bias")
    return _cuda.elsewhere(x, **dict(zip(names, others, strict=True)))


_cuda.register(_layer_norm_op, _layer_norm_cuda.plain_layer_norm, layer_norm_cuda, _elsewhere)
_cuda.register(
    _add_layer_norm_op, _layer_norm_cuda.plain_add_layer_norm, add_layer_norm_cuda, _elsewhere
)


def _check(op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    check_floating(op, "x", x)
    if x.ndim < 1:
        raise ValueError(
            f"{op}: x must be (..., D), got a scalar; give it a dimension to norm over"
        )
    check_shape(op, "weight", weight, (x.shape[-1],))
    check_shape(op, "bias", bias, (x.shape[-1],))
    check_number(op, "eps", eps)


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
    _check("layer_norm", x, weight, bias, eps)
    result: Tensor = _layer_norm_op.run((x, weight, bias), {"eps": eps})
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
    _check("add_layer_norm", x, weight, bias, eps)
    check_shape("add_layer_norm", "residual", residual, tuple(x.shape))
    result: tuple[Tensor, Tensor] = _add_layer_norm_op.run(
        (x, residual, weight, bias), {"eps": eps}
    )
    return result
