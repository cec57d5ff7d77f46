"""GEGLU: the gated activation of a transformer block's feed-forward layer.

    y = a * gelu(g),   x = [a | g]                      Shazeer 2020, eq. 5
    gelu(g) = g * (1 + erf(g / sqrt(2))) / 2

Bytes that must move: 2D numbers in, D out, 3 * rows * D * itemsize; eager moves 5. The backward
pass reads x and dy and writes dx, 5 * rows * D * itemsize; nothing else is kept for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.kernels import _cuda, extension
from fastdiff.kernels._geglu_cuda import geglu_backward_cuda, geglu_cuda, geglu_forward
from fastdiff.kernels._triton import (
    Config,
    Tunable,
    as_rows,
    cdiv,
    config,
    define_tunable,
    jit,
    launch,
    register,
    rows_of,
    tl,
    why_not,
)
from fastdiff.kernels.dispatch import check_floating, compute_dtype, define_op


def geglu_reference(x: Tensor) -> Tensor:
    """The op in plain PyTorch; see `geglu`."""
    value, gate = x.to(compute_dtype(x)).chunk(2, dim=-1)
    return (value * F.gelu(gate)).to(x.dtype)


@jit
def _geglu_kernel(
    x: tl.tensor,
    y: tl.tensor,
    rows: tl.tensor,
    d: tl.tensor,
    x_stride: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < d)
    source = x + row * x_stride + column
    value = tl.load(source, inside, other=0.0).to(tl.float32)
    gate = tl.load(source + d, inside, other=0.0).to(tl.float32)
    gelu = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(y + row * d + column, (value * gelu).to(y.dtype.element_ty), inside)


@jit
def _geglu_backward_kernel(
    dy: tl.tensor,
    x: tl.tensor,
    dx: tl.tensor,
    rows: tl.tensor,
    d: tl.tensor,
    dy_stride: tl.tensor,
    x_stride: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < d)
    source = x + row * x_stride + column
    value = tl.load(source, inside, other=0.0).to(tl.float32)
    gate = tl.load(source + d, inside, other=0.0).to(tl.float32)
    gradient = tl.load(dy + row * dy_stride + column, inside, other=0.0).to(tl.float32)
    cdf = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))  # Phi(g), gelu(g) = g Phi(g)
    density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    target = dx + row * (2 * d) + column
    tl.store(target, (gradient * gate * cdf).to(dx.dtype.element_ty), inside)
    dgate = gradient * value * (cdf + gate * density)
    tl.store(target + d, dgate.to(dx.dtype.element_ty), inside)


def _geglu(x: Tensor) -> Tensor:
    d = x.shape[-1] // 2
    flat = as_rows(x)
    y = x.new_empty(*x.shape[:-1], d)
    chosen = config("geglu", x, "rows")
    grid = (cdiv(len(flat), chosen["ROWS"]), cdiv(d, chosen["COLUMNS"]))
    launch(_geglu_kernel, grid, flat, y, len(flat), d, flat.stride(0), **chosen)
    return y


def _geglu_backward(dy: Tensor, x: Tensor) -> Tensor:
    d = x.shape[-1] // 2
    flat, flat_dy = as_rows(x), as_rows(dy)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    chosen = config("geglu_backward", x, "rows")
    grid = (cdiv(len(flat), chosen["ROWS"]), cdiv(d, chosen["COLUMNS"]))
    strides = flat_dy.stride(0), flat.stride(0)
    launch(_geglu_backward_kernel, grid, flat_dy, flat, dx, len(flat), d, *strides, **chosen)
    return dx


def _candidates(shape_class: str, dtype: torch.dtype) -> Iterator[Config]:
    for columns in (256, 512, 1024):
        for rows in (1, 2, 4, 8):
            for warps in (4, 8):
                yield {"ROWS": rows, "COLUMNS": columns, "num_warps": warps}


def _arguments(dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """x and dy of SD 1.5's first level at 64 x 64 latents: 4096 tokens, 2 x 1280."""
    x = torch.empty(2 * 4096, 2 * 1280, dtype=dtype, device=device)
    return x, torch.empty(2 * 4096, 1280, dtype=dtype, device=device)


def _calls(shape_class: str, dtype: torch.dtype, device: str) -> list[Callable[[], Any]]:
    x, _ = _arguments(dtype, device)
    return [lambda: _geglu(x)]


def _backward_calls(shape_class: str, dtype: torch.dtype, device: str) -> list[Callable[[], Any]]:
    x, dy = _arguments(dtype, device)
    return [lambda: _geglu_backward(dy, x)]


for _name, _make in (("geglu", _calls), ("geglu_backward", _backward_calls)):
    define_tunable(
        Tunable(name=_name, shape_classes=("rows",), candidates=_candidates, calls=_make)
    )

geglu_triton = torch.library.custom_op("fastdiff::geglu_triton", _geglu, mutates_args=())
geglu_backward_triton = torch.library.custom_op(
    "fastdiff::geglu_backward_triton", _geglu_backward, mutates_args=()
)


@geglu_triton.register_fake
def _geglu_fake(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@geglu_backward_triton.register_fake
def _geglu_backward_fake(dy: Tensor, x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _keep(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


geglu_triton.register_autograd(
    lambda ctx, dy: geglu_backward_triton(dy, *ctx.saved_tensors), setup_context=_keep
)

_op = define_op("geglu", geglu_reference)
register(_op, geglu_triton, why_not)


# CPU


def _geglu_native(x: Tensor) -> Tensor:
    d = x.shape[-1] // 2
    y = x.new_empty((*x.shape[:-1], d))
    if y.numel():
        flat, rows, stride = rows_of(x)
        code = extension.DTYPES[x.dtype]
        extension.native.geglu(code, flat.data_ptr(), y.data_ptr(), rows, d, stride)
    return y


def _geglu_backward_native(dy: Tensor, x: Tensor) -> Tensor:
    d = x.shape[-1] // 2
    flat, flat_dy = as_rows(x), as_rows(dy)
    dx = x.new_empty(x.shape)
    pointers = flat_dy.data_ptr(), flat.data_ptr(), dx.data_ptr()
    sizes = len(flat), d, flat_dy.stride(0), flat.stride(0)
    extension.native.geglu_backward(extension.DTYPES[x.dtype], *pointers, *sizes)
    return dx


geglu_cpu = torch.library.custom_op(
    "fastdiff::geglu_cpu", _geglu_native, mutates_args=(), device_types="cpu"
)
geglu_backward_cpu = torch.library.custom_op(
    "fastdiff::geglu_backward_cpu", _geglu_backward_native, mutates_args=(), device_types="cpu"
)
geglu_cpu.register_fake(_geglu_fake)
geglu_backward_cpu.register_fake(_geglu_backward_fake)


def _geglu_gradient(backward: Callable[..., Tensor], ctx: Any, dy: Tensor) -> Tensor | None:
    (x,) = ctx.saved_tensors
    if torch.is_grad_enabled():
        return extension.reference_gradients(geglu_reference, (x,), (dy,))[0]
    return backward(dy, x)


geglu_cpu.register_autograd(partial(_geglu_gradient, geglu_backward_cpu), setup_context=_keep)
extension.register(_op, _geglu_native, geglu_cpu)


# The CUDA kernels, which are in _geglu_cuda.py

geglu_cuda.register_fake(_geglu_fake)
geglu_backward_cuda.register_fake(_geglu_backward_fake)
geglu_cuda.register_autograd(partial(_geglu_gradient, geglu_backward_cuda), setup_context=_keep)
_cuda.register(_op, geglu_forward, geglu_cuda)


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
    result: Tensor = _op.run((x,), {})
    return result
