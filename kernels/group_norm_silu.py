"""GroupNorm, optional scale and shift (FiLM), SiLU: the norm of every residual block.

    m, v   = mean and biased variance of x over the C/G channels of a group and all of space
    n      = (x - m) / sqrt(v + eps) * weight + bias          Wu & He 2018, eq. 1-2 and 7
    f      = n * (1 + scale) + shift                          Dhariwal & Nichol 2021, section 3.1
    y      = f * sigmoid(f)                                   or f with activation "none"

Bytes that must move: x once in, y once out, so 2 * N * C * H * W * itemsize (3 trips when a group
does not fit on the chip, since the statistics come first); weight, bias, scale_shift and statistics
are N * C numbers.

Statistics are fp32 (fp64 for fp64 input), whatever the dtype of x.
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
    centered = _subtract_first(x.to(dtype), num_groups)
    weight, bias = (None if p is None else p.to(dtype) for p in (weight, bias))
    y = F.group_norm(centered, num_groups, weight, bias, eps)
    if scale_shift is not None:
        channels = scale_shift.to(dtype).unflatten(1, (2, *_per_channel(x)))
        y = torch.addcmul(channels[:, 1], y, 1 + channels[:, 0])
    if activation == "silu":
        y = F.silu(y)
    return y.to(x.dtype)


def _subtract_first(x: Tensor, num_groups: int) -> Tensor:
    """Subtract from every group its first element.

    GroupNorm does not change under a shift of a group, and neither does its gradient, so the shift
    is a constant to autograd. It is there because PyTorch's CPU kernel for channels_last takes the
    variance as E[x^2] - E[x]^2: at mean 100 and std 0.01 its output is wrong by 20 where the right
    one lies within 5. An element of the group is at most sqrt(n) standard deviations from the mean
    of its n, which bounds what is left of that error.
    """
    size = x.shape[1] // num_groups
    first = x.detach()[:, ::size]
    while first.ndim > 2:
        first = first[..., 0]  # in the end (N, G)
    return x - first.repeat_interleave(size, dim=1).reshape(len(x), *_per_channel(x))


def _per_channel(x: Tensor) -> tuple[int, ...]:
    """The shape (C, 1, 1, ...) that broadcasts per-channel numbers over the space of x."""
    return (x.shape[1], *[1] * (x.ndim - 2))


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
