"""Add convolution bias, time embedding and residual, then apply GroupNorm and SiLU.

    total = x + channel_add + residual          rounded to the dtype of x
    y     = group_norm_silu(total, ...)

The convolution's bias and the time embedding are both constant over space, so the caller adds them
up first (N * C numbers) and passes one `channel_add`. The sum is returned as well, because the next
residual connection adds to it.

Bytes that must move: x and residual in, total and y out, 4 * N * C * H * W * itemsize (3 without
residual). Eager PyTorch moves 2 or 3 per addition on top of the norm. The kernels are those of
`group_norm_silu`: in its large regime total is read once more (5 trips, 4 without residual). The
backward pass reads total, dy and dtotal and writes one gradient for x and residual, 4 trips when
small and 6 when large (7 if channel_add needs a gradient, which takes the sum of dtotal).

y is the norm of the *rounded* total. The backward pass saves the rounded tensor too, so forward and
backward see the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..checks import check_shape, compute_dtype
from ..group_norm_silu import (
    check_group_norm,
    cpu,
    cuda,
    group_norm_silu,
    group_norm_silu_formula,
    group_norm_silu_reference,
    statistics_like,
    triton,
)
from ..op import Op, Work, reference_gradients
from ..tuning.measured import layout_and_regime
from ..views import dense_like


def add_group_norm_silu_reference(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    channel_add: Tensor | None = None,
    residual: Tensor | None = None,
    scale_shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
) -> tuple[Tensor, Tensor]:
    """The op in plain PyTorch; see `add_group_norm_silu`."""
    total = add_reference(x, channel_add, residual)
    y = group_norm_silu_reference(total, num_groups, weight, bias, scale_shift, eps, activation)
    return y, total


def add_reference(x: Tensor, channel_add: Tensor | None, residual: Tensor | None) -> Tensor:
    """x + channel_add + residual in plain PyTorch, rounded once."""
    dtype = compute_dtype(x)
    total = x.to(dtype)
    if channel_add is not None:
        total = total + channel_add.to(dtype).reshape(*channel_add.shape, *[1] * (x.ndim - 2))
    if residual is not None:
        total = total + residual.to(dtype)
    return total.to(x.dtype)


def add_group_norm_silu_formula(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    channel_add: Tensor | None = None,
    residual: Tensor | None = None,
    scale_shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
) -> tuple[Tensor, Tensor]:
    """The papers' formula, evaluated in fp64 to check the kernels."""
    total = x
    if channel_add is not None:
        total = total + channel_add.reshape(*channel_add.shape, *[1] * (x.ndim - 2))
    if residual is not None:
        total = total + residual
    norm = group_norm_silu_formula(total, num_groups, weight, bias, scale_shift, eps, activation)
    return norm, total


def _fake(x: Tensor, num_groups: int, *_: Any) -> tuple[tuple[Tensor, Tensor], Tensor]:
    return (dense_like(x), dense_like(x)), statistics_like(x, num_groups)


def _keep(args: tuple[Any, ...], outputs: Sequence[Tensor]) -> tuple[Any, ...]:
    """Save total in place of x; the residual is not needed."""
    return outputs[1], *args[1:5], None, *args[6:]


def _again(
    gradients: Sequence[Tensor | None],
    total: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    channel_add: Tensor | None,
    residual: None,
    scale_shift: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor | None, ...]:
    """Gradients from the norm of total; total depends on the addends through its own graph."""
    dy, dtotal = gradients
    norm = (total, num_groups, weight, bias, scale_shift, eps, activation)
    dx, dweight, dbias, dscale_shift = reference_gradients(
        group_norm_silu_reference, norm, (dy,), (0, 2, 3, 4)
    )
    if dx is not None and dtotal is not None:
        dx = dx + dtotal
    return dx, dweight, dbias, sum_like(channel_add, dx), dscale_shift


def sum_like(channel_add: Tensor | None, dx: Tensor | None) -> Tensor | None:
    """Reduce the gradient of total to the gradient of channel_add."""
    if dx is None or channel_add is None:
        return None
    over = [*([] if channel_add.ndim == 2 else [0]), *range(2, dx.ndim)]
    return dx.sum(over, dtype=compute_dtype(dx)) if over else dx


def _of_total(gradients: Sequence[Tensor | None], *kept: Any) -> tuple[Tensor | None, ...]:
    dtotal = gradients[1]
    return dtotal, None, None, sum_like(kept[4], dtotal), None


def _work(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    channel_add: Tensor | None,
    residual: Tensor | None,
    *_: Any,
    backward: bool = False,
) -> Work:
    trips = 3 if residual is None and not backward else 4
    return Work(bytes=trips * x.numel() * x.element_size())


def _example(draw: Callable[..., Tensor]) -> dict[str, Any]:
    x, residual, channel_add = draw(2, 64, 8, 8), draw(2, 64, 8, 8), draw(2, 64)
    return {
        "x": x, "num_groups": 32, "weight": draw(64), "bias": draw(64),
        "channel_add": channel_add, "residual": residual,
    }  # fmt: skip


def _check(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    channel_add: Tensor | None,
    residual: Tensor | None,
    scale_shift: Tensor | None,
    eps: float,
    activation: str,
) -> None:
    op = "add_group_norm_silu"
    check_group_norm(op, x, num_groups, weight, bias, scale_shift, activation, eps)
    check_shape(op, "channel_add", channel_add, tuple(x.shape[:2]), (x.shape[1],))
    check_shape(op, "residual", residual, tuple(x.shape))


_op = Op(
    name="add_group_norm_silu",
    schema="(Tensor x, SymInt num_groups, Tensor? weight, Tensor? bias, Tensor? channel_add, "
    "Tensor? residual, Tensor? scale_shift, float eps, str activation) -> (Tensor, Tensor)",
    check=_check,
    reference=add_group_norm_silu_reference,
    formula=add_group_norm_silu_formula,
    fake=_fake,
    work=_work,
    shape_class=layout_and_regime,
    example=_example,
    kernels=(cuda.ADDING, triton.ADDING, cpu.ADDING),
    statistics=True,
    keep=_keep,
    passed_on={"residual": "x"},
    again=_again,
    without_first=_of_total,
    gradient_like=dense_like,
)


@_op.exposes
def add_group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    channel_add: Tensor | None = None,
    residual: Tensor | None = None,
    scale_shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
) -> tuple[Tensor, Tensor]:
    """Add, then norm: ``total = x + channel_add + residual``, ``y = group_norm_silu(total, ...)``.

    Args:
        x: (N, C, *spatial), fp64/fp32/fp16/bf16, any strides; channels_last is preserved.
        num_groups, weight, bias, scale_shift, eps, activation: as in `group_norm_silu`.
        channel_add: (N, C) or (C,), added to every position, or None.
        residual: the shape of x, or None.

    Returns:
        (y, total), both (N, C, *spatial) in the dtype of x; the sum is taken in fp32 and rounded
        once. If there is nothing to add, `group_norm_silu` runs and `total` is x itself.
        Differentiable in every tensor.

    Raises:
        ValueError: unsupported shape, dtype or option.
    """
    if channel_add is None and residual is None:
        _check(x, num_groups, weight, bias, None, None, scale_shift, eps, activation)
        return group_norm_silu(
            x, num_groups, weight, bias, scale_shift=scale_shift, eps=eps, activation=activation
        ), x
    result: tuple[Tensor, Tensor] = _op(
        x, num_groups, weight, bias, channel_add, residual, scale_shift, eps, activation
    )
    return result
