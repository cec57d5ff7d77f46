"""GroupNorm, optional scale and shift (FiLM), SiLU: the norm of every residual block.

    m, v   = mean and biased variance of x over the C/G channels of a group and all of space
    n      = (x - m) / sqrt(v + eps) * weight + bias          Wu & He 2018, eq. 1-2 and 7
    f      = n * (1 + scale) + shift                          Dhariwal & Nichol 2021, section 3.1
    y      = f * sigmoid(f)                                   or f with activation "none"

Bytes that must move: x once in, y once out, so 2 * N * C * H * W * itemsize; weight, bias,
scale_shift and statistics are N * C numbers. The Triton implementation has two regimes, chosen by
size; a trip is one read or write of the whole tensor:

    small   some groups of one sample fit in a program's registers: one launch, 2 trips
    large   mean and sum of centered squares of each group's parts (chunk of space, tile of
            channels) -> each program merges the parts of its groups and applies: two launches,
            3 trips, of which the second read hits the L2 if a sample fits there

If the small regime has too few programs to fill the GPU, up to 8 compute the same statistics and
each writes its share of the rows; they read the same numbers, which are in the L2.

The CUDA kernels take 2 trips if a group fits into the shared memory of a block or, on sm_90, of a
cluster of up to 16 blocks, else 3 (csrc/cuda/norm_plan.h); backward takes 3 or 5.

The backward pass saves x and the statistics (2 * N * G numbers) and recomputes the rest: x and dy
in, dx out, 3 trips when small (one launch) and 5 when large (three). The large regime also moves
partial results, which stay in the caches: forward, 8 bytes per group and part, written once and
read by every program that merges them; backward, partial sums, 16 bytes per channel and chunk of
128 or more positions, and a table of what dx needs of each channel, 20 bytes per channel and tile
of the last kernel, 32 or more positions.

Statistics are fp32 (fp64 for fp64 input), whatever the dtype of x. The reference makes a contiguous
copy first, because PyTorch's CPU kernel for channels_last computes the variance as E[x^2] - E[x]^2
(at mean 100 and std 0.01 the result is off by 20, while correct values lie within 5), and its
backward pass crashes the process when x needs no gradient (torch 2.13).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_floating, check_number, check_shape, compute_dtype
from ..op import Op, Work
from ..tuning.measured import layout_and_regime
from ..views import dense_like, memory_format_of
from . import cpu, cuda, triton

ACTIVATIONS = ("silu", "none")


def group_norm_silu_reference(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale_shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
) -> Tensor:
    """The op in plain PyTorch; see `group_norm_silu`."""
    dtype = compute_dtype(x)
    if x.numel() == 0:  # torch.group_norm would raise; parameters still get zero gradients
        return x + sum(
            0 * p.sum().to(x.dtype) for p in (weight, bias, scale_shift) if p is not None
        )
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
    """Subtract each group's mean from the group.

    GroupNorm and its gradient are invariant to a shift of a group, so autograd may treat the mean
    as a constant. The subtraction keeps precision when the mean is large: the mean has a rounding
    error of its own, and PyTorch's dweight is a difference of two sums that grow with it.
    """
    size = x.shape[1] // num_groups
    mean = x.detach().reshape(len(x), num_groups, -1).mean(2)  # (N, G)
    return x - _over_space(mean.repeat_interleave(size, dim=1), x)


def _over_space(numbers: Tensor, x: Tensor) -> Tensor:
    """Reshape (N, C) to (N, C, 1, 1, ...), to broadcast over the spatial dimensions of x."""
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
    """Checks shared by `group_norm_silu` and `add_group_norm_silu`. Raises ValueError."""
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


def group_norm_silu_formula(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale_shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
) -> Tensor:
    """The papers' formula, evaluated in fp64 to check the kernels."""
    n, c = x.shape[:2]
    if x.numel() == 0:
        return x * 1
    groups = x.reshape(n, num_groups, -1)
    mean = groups.mean(2, keepdim=True)
    variance = ((groups - mean) ** 2).mean(2, keepdim=True)
    y = ((groups - mean) / torch.sqrt(variance + eps)).reshape(n, c, -1)
    if weight is not None:
        y = y * weight[None, :, None]
    if bias is not None:
        y = y + bias[None, :, None]
    if scale_shift is not None:
        scale, shift = scale_shift[:, :c, None], scale_shift[:, c:, None]
        y = y * (1 + scale) + shift
    if activation == "silu":
        y = y / (1 + torch.exp(-y))
    return y.reshape(x.shape)


def _check(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale_shift: Tensor | None,
    eps: float,
    activation: str,
) -> None:
    check_group_norm("group_norm_silu", x, num_groups, weight, bias, scale_shift, activation, eps)


def statistics_like(x: Tensor, num_groups: int) -> Tensor:
    """Room for three fp32 numbers per group, (N, G, 3); each backend defines their meaning."""
    return x.new_empty(x.shape[0], num_groups, 3, dtype=torch.float32)


def _fake(x: Tensor, num_groups: int, *_: Any) -> tuple[Tensor, Tensor]:
    return dense_like(x), statistics_like(x, num_groups)


def _work(x: Tensor, *_: Any, backward: bool = False) -> Work:
    return Work(bytes=(3 if backward else 2) * x.numel() * x.element_size())


def _example(draw: Callable[..., Tensor]) -> dict[str, Any]:
    x, scale_shift = draw(2, 64, 8, 8), draw(2, 128)
    return {
        "x": x, "num_groups": 32, "weight": draw(64), "bias": draw(64), "scale_shift": scale_shift,
    }  # fmt: skip


_op = Op(
    name="group_norm_silu",
    schema="(Tensor x, SymInt num_groups, Tensor? weight, Tensor? bias, Tensor? scale_shift, "
    "float eps, str activation) -> Tensor",
    check=_check,
    reference=group_norm_silu_reference,
    formula=group_norm_silu_formula,
    fake=_fake,
    work=_work,
    shape_class=layout_and_regime,
    example=_example,
    kernels=(cuda.BACKEND, triton.BACKEND, cpu.BACKEND),
    statistics=True,
    gradient_like=dense_like,
)


@_op.exposes
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
        x: (N, C, *spatial), fp64/fp32/fp16/bf16, any strides; channels_last is preserved.
        num_groups: G, a divisor of C.
        weight, bias: (C,), any float dtype, or None for 1 and 0.
        scale_shift: (N, 2C) = [scale | shift], the output of the FiLM projection, or None.
        eps: added to the variance.
        activation: "silu" or "none".

    Returns:
        (N, C, *spatial) in the dtype of x. Differentiable in every tensor.

    Raises:
        ValueError: unsupported shape, dtype or option.

    Wu & He 2018 (Group Normalization), eq. 1-2; scale and shift: Dhariwal & Nichol 2021, section
    3.1.
    """
    result: Tensor = _op(x, num_groups, weight, bias, scale_shift, eps, activation)
    return result
