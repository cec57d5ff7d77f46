"""GroupNorm, optional scale and shift (FiLM), SiLU: the norm of every residual block.

    m, v   = mean and biased variance of x over the C/G channels of a group and all of space
    n      = (x - m) / sqrt(v + eps) * weight + bias          Wu & He 2018, eq. 1-2 and 7
    f      = n * (1 + scale) + shift                          Dhariwal & Nichol 2021, section 3.1
    y      = f * sigmoid(f)                                   or f with activation "none"

Bytes that must move: x once in, y once out, so 2 * N * C * H * W * itemsize; weight, bias,
scale_shift and statistics are N * C numbers. The Triton implementation has two regimes, by bytes:

    small   some groups of one sample fit in a program's registers: one launch, 2 trips
    large   moments per (n, chunk of space, c) -> finalize to one scale and shift per (n, c) ->
            apply: 3 trips, of which the second read finds the L2 where a sample fits there

The CUDA kernels go 2 trips where a group fits into the shared memory of a block or, on sm_90, of a
cluster of up to 16, else 3 (csrc/norm_plan.h); backward 3 or 5.

The backward pass keeps x and the statistics (2 * N * G numbers) and computes the rest anew: x and
dy in, dx out, 3 trips when small and 5 when large. To a large tensor's trips come the partial sums,
20 (backward 16) bytes per channel and chunk of 128 or more positions, and the table of each
channel's scale, shift and mean, 12 (backward 20) bytes per channel and tile of the last kernel, 64
(32) positions; these are reads and writes of the caches.

Statistics are fp32 (fp64 for fp64 input), whatever the dtype of x. The reference goes through a
contiguous copy: PyTorch's CPU kernel for channels_last takes the variance as E[x^2] - E[x]^2 (at
mean 100 and std 0.01 the result is wrong by 20, where the right one lies within 5), and its
backward pass crashes the process when x needs no gradient (torch 2.13).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.kernels import _cuda, _triton, extension
from fastdiff.kernels._group_norm import memory_format_of
from fastdiff.kernels._group_norm_backward import keep_for_backward, norm_gradients
from fastdiff.kernels._group_norm_cpu import (
    as_dtype_of,
    dense_like,
    norm_backward_cpu,
    run_native,
)
from fastdiff.kernels._group_norm_cuda import (
    norm_backward_cuda_op,
    norm_cuda,
    parameter_gradients,
    why_not_cuda,
)
from fastdiff.kernels._group_norm_forward import norm_forward
from fastdiff.kernels.dispatch import (
    check_floating,
    check_number,
    check_shape,
    compute_dtype,
    define_op,
)

ACTIVATIONS = ("silu", "none")


def group_norm_silu_reference(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale_shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
) -> Tensor:
    """The op in plain PyTorch; see `group_norm_silu`."""
    if x.numel() == 0:
        return x.clone()
    dtype = compute_dtype(x)
    weight, bias = (None if p is None else p.to(dtype) for p in (weight, bias))
    centered = _subtract_mean(x.to(dtype).contiguous(), num_groups)
    y = torch.group_norm(centered, num_groups, weight, bias, eps)
    if scale_shift is not None:
        scale, shift = (_over_space(half, x) for half in scale_shift.to(dtype).chunk(2, dim=1))
        y = torch.addcmul(shift, y, 1 + scale)
    if activation == "silu":
        y = F.silu(y)
    return y.to(x.dtype).contiguous(memory_format=memory_format_of(x))


def _subtract_mean(x: Tensor, num_groups: int) -> Tensor:
    """Subtract from every group its mean.

    GroupNorm and its gradient do not change when a group is shifted, so the shift is a constant to
    autograd. It keeps the digits where the mean is large: the mean has an error of its own, and
    PyTorch's dweight is a difference of two sums that grow with it.
    """
    size = x.shape[1] // num_groups
    mean = x.detach().reshape(len(x), num_groups, -1).mean(2)  # (N, G)
    return x - _over_space(mean.repeat_interleave(size, dim=1), x)


def _over_space(numbers: Tensor, x: Tensor) -> Tensor:
    """(N, C) as (N, C, 1, 1, ...), to broadcast over the space of x."""
    return numbers.reshape(*numbers.shape, *[1] * (x.ndim - 2))


def check_group_norm(
    op: str,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale_shift: Tensor | None,
    activation: str,
    eps: float,
) -> None:
    """The checks shared by `group_norm_silu` and `add_group_norm_silu`. Raises ValueError."""
    check_floating(op, "x", x)
    if x.ndim < 2:
        raise ValueError(f"{op}: x must be (N, C, *spatial), got shape {tuple(x.shape)}")
    n, c = x.shape[:2]
    check_number(op, "num_groups", num_groups, whole=True)
    check_number(op, "eps", eps)
    if num_groups < 1 or c % num_groups:
        raise ValueError(
            f"{op}: num_groups must divide the {c} channels of x, got {num_groups}; "
            "choose a divisor of the channel count"
        )
    check_shape(op, "weight", weight, (c,))
    check_shape(op, "bias", bias, (c,))
    check_shape(op, "scale_shift", scale_shift, (n, 2 * c))
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {ACTIVATIONS}, got {activation!r}")


# The CUDA kernels, which are in _group_norm_cuda.py


@torch.library.custom_op("fastdiff::group_norm_silu_cuda", mutates_args=())
def _group_norm_silu_cuda(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale_shift: Tensor | None,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    y, _, stats = norm_cuda(x, num_groups, (weight, bias, scale_shift), eps, silu)
    return y, stats


@_group_norm_silu_cuda.register_fake
def _group_norm_silu_cuda_fake(
    x: Tensor, num_groups: int, *rest: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=memory_format_of(x))
    return y, x.new_empty(len(x), num_groups, 3, dtype=torch.float32)


def _keep_cuda(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, weight, bias, scale_shift, _, ctx.silu = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], weight, bias, scale_shift)


def _backward_cuda(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    x, stats, *parameters = ctx.saved_tensors
    dx, *gradients = norm_backward_cuda_op(dy, x, stats, *parameters, None, ctx.silu)
    return dx, None, *parameter_gradients(tuple(parameters), tuple(gradients)), None, None


_group_norm_silu_cuda.register_autograd(_backward_cuda, setup_context=_keep_cuda)


def _plain_cuda(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale_shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
) -> Tensor:
    return norm_cuda(x, num_groups, (weight, bias, scale_shift), eps, activation == "silu")[0]


def group_norm_silu_cuda(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale_shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
) -> Tensor:
    """The op on the CUDA kernels, as PyTorch knows it; see `group_norm_silu`."""
    silu = activation == "silu"
    y: Tensor = _group_norm_silu_cuda(x, num_groups, weight, bias, scale_shift, eps, silu)[0]
    return y


# The Triton kernels, which are in _group_norm_forward.py and _group_norm_backward.py


def _group_norm_silu_triton(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale_shift: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    y, _, mean, rstd = norm_forward(
        x, num_groups, weight, bias, None, None, scale_shift, eps, activation
    )
    return y, mean, rstd


group_norm_silu_triton = torch.library.custom_op(
    "fastdiff::group_norm_silu_triton", _group_norm_silu_triton, mutates_args=()
)


@group_norm_silu_triton.register_fake
def _group_norm_silu_triton_fake(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale_shift: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty(x.shape[0], num_groups, dtype=torch.float32) for _ in range(2))
    return torch.empty_like(x, memory_format=memory_format_of(x)), mean, rstd


def _keep_triton(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, num_groups, weight, bias, scale_shift, _, activation = inputs
    parameters = weight, bias, None, scale_shift
    keep_for_backward(ctx, x, num_groups, parameters, output[1:], activation, x.dtype)


def _backward_triton(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    wanted = [*(ctx.needs_input_grad[i] for i in (2, 3, 4)), False]
    dx, dweight, dbias, dscale_shift, _none = norm_gradients(ctx, dy, None, wanted)
    return dx, None, dweight, dbias, dscale_shift, None, None


group_norm_silu_triton.register_autograd(_backward_triton, setup_context=_keep_triton)


def plain_triton(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale_shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
) -> Tensor:
    """`group_norm_silu` by the Triton kernels."""
    y: Tensor = group_norm_silu_triton(x, num_groups, weight, bias, scale_shift, eps, activation)[0]
    return y


def why_not_triton(
    x: Tensor,
    num_groups: int,
    *parameters: Tensor | None,
    **options: Any,
) -> str | None:
    """What stands against the Triton kernels of both norms, or None."""
    tensors = (t for t in options.values() if isinstance(t, Tensor))
    return _triton.why_not(x, *parameters, *tensors)


_op = define_op("group_norm_silu", group_norm_silu_reference)
_cuda.register(_op, _plain_cuda, group_norm_silu_cuda, why_not_cuda)
_triton.register(_op, plain_triton, why_not_triton)


# The CPU kernels, which are in _group_norm_cpu.py


@torch.library.custom_op("fastdiff::group_norm_silu_cpu", mutates_args=(), device_types="cpu")
def _norm_cpu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale_shift: Tensor | None,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    y, _, stats = run_native(
        x, num_groups, weight, bias, None, None, scale_shift, eps, silu, for_backward=True
    )
    assert stats is not None
    return y, stats


@_norm_cpu.register_fake
def _(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale_shift: Tensor | None,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    stats = torch.empty(x.shape[0], num_groups, 3, dtype=torch.float32, device=x.device)
    return dense_like(x), stats


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, ctx.num_groups, weight, bias, scale_shift, ctx.eps, ctx.silu = inputs
    ctx.save_for_backward(x, weight, bias, scale_shift, output[1])


def _gradient(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, bias, scale_shift, stats = ctx.saved_tensors
    if torch.is_grad_enabled():

        def reference(x: Tensor, w: Any, b: Any, s: Any) -> Tensor:
            activation = "silu" if ctx.silu else "none"
            return group_norm_silu_reference(
                x, ctx.num_groups, w, b, scale_shift=s, eps=ctx.eps, activation=activation
            )

        found = extension.reference_gradients(reference, (x, weight, bias, scale_shift), (dy,))
    else:
        dx, dweight, dbias, dscale_shift, _ = norm_backward_cpu(
            dy, None, x, weight, bias, scale_shift, stats, ctx.silu, False
        )
        found = (
            dx,
            as_dtype_of(dweight, weight),
            as_dtype_of(dbias, bias),
            as_dtype_of(dscale_shift, scale_shift),
        )
    return found[0], None, *found[1:], None, None


_norm_cpu.register_autograd(_gradient, setup_context=_keep)


def _native(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale_shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
) -> Tensor:
    silu = activation == "silu"
    return run_native(x, num_groups, weight, bias, None, None, scale_shift, eps, silu)[0]


def _registered(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale_shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
) -> Tensor:
    y: Tensor = _norm_cpu(x, num_groups, weight, bias, scale_shift, eps, activation == "silu")[0]
    return y


extension.register(_op, _native, _registered)


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale_shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
) -> Tensor:
    """GroupNorm with optional scale and shift, then SiLU: ``silu(GN(x) * (1 + scale) + shift)``.

    Args:
        x: (N, C, *spatial), fp64/fp32/fp16/bf16, any strides; channels_last in gives channels_last
            out.
        num_groups: G, a divisor of C.
        weight, bias: (C,), any float dtype, or None for 1 and 0.
        scale_shift: (N, 2C) = [scale | shift], the FiLM projection as it comes out, or None.
        eps: added to the variance.
        activation: "silu" or "none".

    Returns:
        (N, C, *spatial) in the dtype of x. Differentiable in every tensor.

    Raises:
        ValueError: a shape, dtype or option that does not fit.

    Wu & He 2018 (Group Normalization), eq. 1-2; scale and shift: Dhariwal & Nichol 2021, section
    3.1.
    """
    check_group_norm("group_norm_silu", x, num_groups, weight, bias, scale_shift, activation, eps)
    options = {"scale_shift": scale_shift, "eps": eps, "activation": activation}
    result: Tensor = _op.run((x, num_groups, weight, bias), options)
    return result
