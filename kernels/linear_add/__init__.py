"""A linear layer with the additions before and after it.

    y = (x + addend) W^T + b + residual

The last projection of a transformer is one: what it projects is the sum of the last branch and the
residual stream, and its result is added to the transformer's input (Rombach et al. 2022, section
3.3). x + addend is rounded to the dtype of x, as by an addition of its own.

Bytes that must move, for M rows of K features and N results: M * K + N * K + M * N numbers, and
M * K and M * N for the two addends. An addition of its own moves three times the sum.

The Triton kernel adds the tiles that it multiplies and the tile that it writes. cuBLAS is faster at
the product alone, so `auto` takes the Triton kernel only where the counts (`tuning.products`) or a
measurement say that it wins; the other backends are PyTorch's product and additions. So is the
backward pass of all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_floating, check_linear, check_shape, compute_dtype, without_autocast
from ..op import Op, Work
from ..tuning.products import apart_seconds, fused_seconds, tiles, triton_where
from . import composed, triton


def linear_add_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, addend: Tensor | None, residual: Tensor | None
) -> Tensor:
    """The op in plain PyTorch; see `linear_add`."""
    dtype = compute_dtype(x)
    total = x if addend is None else x + addend
    with without_autocast(x.device.type):
        wide = F.linear(total.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    if residual is not None:
        wide = wide + residual.to(dtype)
    return wide.to(x.dtype).contiguous()


def linear_add_formula(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    addend: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The formula, evaluated in fp64 to check the kernels."""
    y = torch.einsum("...k,nk->...n", x if addend is None else x + addend, weight)
    y = y if bias is None else y + bias
    return y if residual is None else y + residual


def _fake(x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, None]:
    return x.new_empty(*x.shape[:-1], weight.shape[0]), None


def _sizes(x: Tensor, weight: Tensor) -> tuple[int, int, int]:
    """M, N and K."""
    return x.numel() // max(1, x.shape[-1]), *weight.shape


def _work(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    addend: Tensor | None,
    residual: Tensor | None,
    backward: bool = False,
) -> Work:
    """Backward reads dy, the weight and the sum, writes two gradients, and has two products; the
    gradient of the residual is dy itself."""
    rows, n, k = _sizes(x, weight)
    operands = (1 + (addend is not None)) * x.numel() + weight.numel()
    moved = operands + (1 + (residual is not None)) * rows * n
    if backward:
        moved = operands + x.numel() + weight.numel() + rows * n
    return Work(bytes=moved * x.element_size(), flops=(2 if backward else 1) * 2 * rows * n * k)


def fused_is_counted_faster(
    x: Tensor, weight: Tensor, addend: Tensor | None, residual: Tensor | None
) -> bool:
    """Whether one Triton kernel takes less time than a product and additions, by the counts of
    `tuning.products`. The tensors are those of `linear_add`."""
    rows, n, k = _sizes(x, weight)
    size, passes = x.element_size(), []
    if addend is not None:
        passes.append(3 * rows * k * size)
    if residual is not None:
        passes.append(3 * rows * n * size)
    work, product = _work(x, weight, None, addend, residual), _work(x, weight, None, None, None)
    return fused_seconds(work.flops, work.bytes) < apart_seconds(
        product.flops, product.bytes, passes
    )


def _unmeasured(
    x: Tensor, weight: Tensor, bias: Tensor | None, addend: Tensor | None, residual: Tensor | None
) -> str | None:
    return triton_where(fused_is_counted_faster, x, weight, addend, residual)


def _shape_class(x: Tensor, weight: Tensor, *_: Any) -> str:
    rows, n, k = _sizes(x, weight)
    return f"{tiles(rows, n)}/{k}"


def _keep(args: tuple[Any, ...], outputs: Sequence[Tensor]) -> tuple[Any, ...]:
    """The residual is not needed."""
    return *args[:4], None


def _again(
    gradients: Sequence[Tensor | None],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    addend: Tensor | None,
    residual: None,
) -> tuple[Tensor | None, ...]:
    (dy,) = gradients
    assert dy is not None
    dtype = compute_dtype(x)
    wide = dy.to(dtype)
    total = (x if addend is None else x + addend).to(dtype).flatten(0, -2)
    dx = (wide @ weight.to(dtype)).to(x.dtype)
    flat = wide.flatten(0, -2)
    dbias = None if bias is None else flat.sum(0).to(bias.dtype)
    return dx, (flat.mT @ total).to(weight.dtype), dbias


def _example(draw: Callable[..., Tensor]) -> dict[str, Any]:
    return {
        "x": draw(2, 8, 48),
        "weight": draw(40, 48),
        "bias": draw(40),
        "addend": draw(2, 8, 48),
        "residual": draw(2, 8, 40),
    }


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, addend: Tensor | None, residual: Tensor | None
) -> None:
    op = "linear_add"
    check_floating(op, "x", x)
    check_linear(op, x, weight, bias)
    check_shape(op, "addend", addend, tuple(x.shape))
    check_shape(op, "residual", residual, (*x.shape[:-1], weight.shape[0]))
    for name, t in (("addend", addend), ("residual", residual)):
        if t is not None and t.dtype != x.dtype:
            raise ValueError(
                f"{op}: {name} must have the dtype of x, {x.dtype}, got {t.dtype}; convert one"
            )


_op = Op(
    name="linear_add",
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor? addend, Tensor? residual) -> Tensor",
    check=_check,
    reference=linear_add_reference,
    formula=linear_add_formula,
    fake=_fake,
    work=_work,
    shape_class=_shape_class,
    unmeasured=_unmeasured,
    example=_example,
    kernels=(composed.CUDA, triton.BACKEND, composed.CPU),
    keep=_keep,
    passed_on={"addend": "x"},
    straight={"residual": 0},
    again=_again,
)


@_op.exposes
def linear_add(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    addend: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """A linear layer of a sum, plus a residual: ``(x + addend) @ weight.T + bias + residual``.

    Args:
        x: (..., K), fp64/fp32/fp16/bf16; all operands have its dtype, and any strides.
        weight: (N, K). bias: (N,) or None.
        addend: (..., K) like x, or None.
        residual: (..., N), or None.

    Returns:
        (..., N), contiguous, in the dtype of x. Differentiable in every tensor.

    Raises:
        ValueError: unsupported shapes or dtypes.

    Rombach et al. 2022 (High-Resolution Image Synthesis with Latent Diffusion Models), section 3.3.
    """
    result: Tensor = _op(x, weight, bias, addend, residual)
    return result
