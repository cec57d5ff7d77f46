"""GroupNorm and SiLU of two tensors as if they were concatenated: the first norm of a U-Net's
decoder blocks, which get x and, over a skip connection, an output of the encoder.

    total = x + channel_add + residual          rounded to the dtype of x
    y     = group_norm_silu([total | skip])     C1 + C2 channels

A group may have channels of both (1280 + 640 channels in 32 groups of 60). The sum is returned as
well, because the block's shortcut reads it, next to skip.

Bytes that must move: x and skip in, y out, 2 * N * (C1 + C2) * H * W * itemsize; with addends also
total out, and a residual in: 1 or 2 * N * C1 * H * W * itemsize more. Concatenating first would add
2 * N * (C1 + C2) * H * W * itemsize.

The CUDA kernels are those of `add_group_norm_silu` and read each channel where it lies: in NHWC a
thread's columns belong to one of the two tensors, so it pays for the choice once. (If 16 bytes of x
would end inside a pack, all loads are one element wide.) The CPU kernels join the two a chunk at a
time, in the cache. The Triton kernels read one tensor: there PyTorch concatenates first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..add_group_norm_silu import add_reference, sum_like
from ..checks import check_floating, check_shape
from ..group_norm_silu import (
    check_group_norm,
    cpu,
    cuda,
    group_norm_silu_formula,
    group_norm_silu_reference,
    statistics_like,
    triton,
)
from ..group_norm_silu.joined import joined_like, of_sum
from ..op import Op, Work, reference_gradients
from ..tuning.measured import layout_and_regime
from ..views import dense_like, memory_format_of


def cat_group_norm_silu_reference(
    x: Tensor,
    skip: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    channel_add: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """The op in plain PyTorch; see `cat_group_norm_silu`."""
    adds = channel_add is not None or residual is not None
    total = add_reference(x, channel_add, residual) if adds else x
    y = _norm_of_both(total, skip, num_groups, weight, bias, eps)
    return y, total if adds else x.new_empty(0)


def _norm_of_both(
    total: Tensor,
    skip: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    joined = torch.cat([total, skip.to(total.dtype)], dim=1)
    y = group_norm_silu_reference(joined, num_groups, weight, bias, None, eps)
    return y.contiguous(memory_format=memory_format_of(total))


def cat_group_norm_silu_formula(
    x: Tensor,
    skip: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    channel_add: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """The papers' formula, evaluated in fp64 to check the kernels."""
    total = x
    if channel_add is not None:
        total = total + channel_add.reshape(*channel_add.shape, *[1] * (x.ndim - 2))
    if residual is not None:
        total = total + residual
    joined = torch.cat([total, skip], dim=1)
    return group_norm_silu_formula(joined, num_groups, weight, bias, None, eps), total


def _fake(
    x: Tensor, skip: Tensor, num_groups: int, *more: Any
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    channel_add, residual = more[2:4]
    adds = channel_add is not None or residual is not None
    total = dense_like(x) if adds else x.new_empty(0)
    return (joined_like(x, skip), total), statistics_like(x, num_groups)


def _keep(args: tuple[Any, ...], outputs: Sequence[Tensor]) -> tuple[Any, ...]:
    """Save total in place of x; the residual is not needed."""
    adds = args[5] is not None or args[6] is not None
    return outputs[1] if adds else args[0], *args[1:6], None, args[7]


def _again(
    gradients: Sequence[Tensor | None],
    total: Tensor,
    skip: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    channel_add: Tensor | None,
    residual: None,
    eps: float,
) -> tuple[Tensor | None, ...]:
    """Gradients from the norm of total; total depends on the addends through its own graph."""
    dy, dtotal = gradients[0], of_sum(gradients[1], total)
    norm = total, skip, num_groups, weight, bias, eps
    dx, dskip, dweight, dbias = reference_gradients(_norm_of_both, norm, (dy,), (0, 1, 3, 4))
    if dx is not None and dtotal is not None:
        dx = dx + dtotal
    return dx, dskip, dweight, dbias, sum_like(channel_add, dx)


def _of_total(gradients: Sequence[Tensor | None], *kept: Any) -> tuple[Tensor | None, ...]:
    dtotal = of_sum(gradients[1], kept[0])
    return dtotal, None, None, None, sum_like(kept[5], dtotal)


def _work(
    x: Tensor,
    skip: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    channel_add: Tensor | None,
    residual: Tensor | None,
    *_: Any,
    backward: bool = False,
) -> Work:
    adds = channel_add is not None or residual is not None
    more = adds if backward else adds + (residual is not None)
    trips = (3 if backward else 2) * (x.numel() + skip.numel()) + more * x.numel()
    return Work(bytes=trips * x.element_size())


def _example(draw: Callable[..., Tensor]) -> dict[str, Any]:
    x, skip, residual = draw(2, 40, 8, 8), draw(2, 24, 8, 8), draw(2, 40, 8, 8)
    return {
        "x": x, "skip": skip, "num_groups": 4, "weight": draw(64), "bias": draw(64),
        "channel_add": draw(2, 40), "residual": residual,
    }  # fmt: skip


def _check(
    x: Tensor,
    skip: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    channel_add: Tensor | None,
    residual: Tensor | None,
    eps: float,
) -> None:
    op = "cat_group_norm_silu"
    check_floating(op, "x", x)
    check_floating(op, "skip", skip)
    if x.ndim < 2 or skip.ndim != x.ndim or _without_channels(skip) != _without_channels(x):
        raise ValueError(
            f"{op}: x and skip must be (N, C1, *spatial) and (N, C2, *spatial), "
            f"got {tuple(x.shape)} and {tuple(skip.shape)}"
        )
    both = x.new_empty((), device="meta").expand(
        x.shape[0], x.shape[1] + skip.shape[1], *x.shape[2:]
    )
    check_group_norm(op, both, num_groups, weight, bias, None, "silu", eps)
    check_shape(op, "channel_add", channel_add, tuple(x.shape[:2]), (x.shape[1],))
    check_shape(op, "residual", residual, tuple(x.shape))


def _without_channels(x: Tensor) -> tuple[int, ...]:
    return x.shape[0], *x.shape[2:]


_op = Op(
    name="cat_group_norm_silu",
    schema="(Tensor x, Tensor skip, SymInt num_groups, Tensor? weight, Tensor? bias, "
    "Tensor? channel_add, Tensor? residual, float eps) -> (Tensor, Tensor)",
    check=_check,
    reference=cat_group_norm_silu_reference,
    formula=cat_group_norm_silu_formula,
    fake=_fake,
    work=_work,
    shape_class=layout_and_regime,
    example=_example,
    kernels=(cuda.CAT, triton.CAT, cpu.CAT),
    statistics=True,
    keep=_keep,
    passed_on={"residual": "x"},
    again=_again,
    without_first=_of_total,
    gradient_like=dense_like,
)


@_op.exposes
def cat_group_norm_silu(
    x: Tensor,
    skip: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    channel_add: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Add, then norm two tensors as one: ``total = x + channel_add + residual``,
    ``y = group_norm_silu(torch.cat([total, skip], 1), ...)``, without the concatenation.

    Args:
        x: (N, C1, *spatial), fp64/fp32/fp16/bf16, any strides; channels_last is preserved.
        skip: (N, C2, *spatial), any float dtype; the dtype of x is the fastest.
        num_groups: G, a divisor of C1 + C2; a group may have channels of both.
        weight, bias: (C1 + C2,), any float dtype, or None for 1 and 0.
        channel_add: (N, C1) or (C1,), added to every position of x, or None.
        residual: the shape of x, or None.
        eps: added to the variance.

    Returns:
        (y, total): y is (N, C1 + C2, *spatial), total the shape of x, both in the dtype of x. The
        sum is taken in fp32 and rounded once; if there is nothing to add, total is x itself.
        Differentiable in every tensor.

    Raises:
        ValueError: unsupported shape, dtype or option.

    Wu & He 2018 (Group Normalization), eq. 1-2; the concatenation: Ronneberger et al. 2015 (U-Net),
    figure 1.
    """
    y, total = _op(x, skip, num_groups, weight, bias, channel_add, residual, eps)
    return y, x if channel_add is None and residual is None else total
