"""GroupNorm, optional scale and shift (FiLM), SiLU: the norm of every residual block.

    m, v   = mean and biased variance of x over the C/G channels of a group and all of space
    n      = (x - m) / sqrt(v + eps) * weight + bias          Wu & He 2018, eq. 1-2 and 7
    f      = n * (1 + scale) + shift                          Dhariwal & Nichol 2021, section 3.1
    y      = f * sigmoid(f)                                   or f with activation "none"

Bytes that must move: x once in, y once out, so 2 * N * C * H * W * itemsize (3 trips when a group
does not fit on the chip, since the statistics come first); weight, bias, scale_shift and statistics
are N * C numbers.

Statistics are fp32 (fp64 for fp64 input), whatever the dtype of x. The reference goes through a
contiguous copy: PyTorch's CPU kernel for channels_last takes the variance as E[x^2] - E[x]^2 (at
mean 100 and std 0.01 the result is wrong by 20, where the right one lies within 5), and its
backward pass crashes the process when x needs no gradient (torch 2.13).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.kernels.dispatch import check_floating, check_shape, compute_dtype, define_op

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
    return y.to(x.dtype).contiguous(memory_format=_memory_format(x))


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


def _memory_format(x: Tensor) -> torch.memory_format:
    """channels_last where x is stored so (and could not as well be called contiguous)."""
    if not x.is_contiguous():
        if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        if x.ndim == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
            return torch.channels_last_3d
    return torch.contiguous_format


def check_group_norm(
    op: str,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale_shift: Tensor | None,
    activation: str,
) -> None:
    """The checks shared by `group_norm_silu` and `add_group_norm_silu`. Raises ValueError."""
    check_floating(op, "x", x)
    if x.ndim < 2:
        raise ValueError(f"{op}: x must be (N, C, *spatial), got shape {tuple(x.shape)}")
    n, c = x.shape[:2]
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


_op = define_op("group_norm_silu", group_norm_silu_reference)


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
    check_group_norm("group_norm_silu", x, num_groups, weight, bias, scale_shift, activation)
    result: Tensor = _op(
        x, num_groups, weight, bias, scale_shift=scale_shift, eps=eps, activation=activation
    )
    return result
