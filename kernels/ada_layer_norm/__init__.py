"""Adaptive LayerNorm: LayerNorm without parameters, then a scale and a shift per sample.

    n = (x - m) / sqrt(v + eps)                   Ba et al. 2016, eq. 3-4
    y = n * (1 + scale) + shift                   Peebles & Xie 2023, section 3.2 (adaLN-Zero)
    m, v = mean and biased variance of a row of C numbers

Bytes that must move: x in, y out, 2 * N * T * C * itemsize; scale and shift are 2 * N * C numbers.
Eager PyTorch moves 6 * N * T * C * itemsize, because the norm, the product and the sum each read
and write. Statistics are fp32 (fp64 for fp64 input).

Backward, which recomputes m and v (only x and scale are saved):

    g      = dy * (1 + scale)
    dx     = (g - mean(g) - n mean(g n)) / sqrt(v + eps)
    dscale = sum over T of dy n,   dshift = sum over T of dy

Bytes: 3 * N * T * C * itemsize. The sums over T are taken in a fixed order, without atomics: the
rows of a sample are split into P chunks, each of which writes a partial sum, and a second step adds
the P partial sums. That writes and reads another 8 * N * P * C bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_floating, check_number, check_shape, compute_dtype
from ..op import Op, Work
from ..tuning.measured import regime
from . import cpu, cuda, triton


def ada_layer_norm_reference(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """The op in plain PyTorch; see `ada_layer_norm`."""
    dtype = compute_dtype(x)
    wide = x.to(dtype)
    # the norm is invariant to a shift: subtracting the mean first keeps precision if it is large
    first = wide.detach()[..., :1]
    centered = wide - (first + (wide.detach() - first).mean(-1, keepdim=True))
    normed = F.layer_norm(centered, x.shape[-1:], None, None, eps)
    scale, shift = (p.to(dtype)[:, None] for p in (scale, shift))
    return torch.addcmul(shift, normed, 1 + scale).to(x.dtype).contiguous()


def ada_layer_norm_formula(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """The papers' formula, evaluated in fp64 to check the kernels."""
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    normed = (x - mean) / torch.sqrt(variance + eps)
    return normed * (1 + scale[:, None]) + shift[:, None]


def _fake(x: Tensor, *_: Any) -> tuple[Tensor, None]:
    return x.new_empty(x.shape), None


def _work(x: Tensor, *_: Any, backward: bool = False) -> Work:
    return Work(bytes=(3 if backward else 2) * x.numel() * x.element_size())


def _example(draw: Callable[..., Tensor]) -> dict[str, Any]:
    return {"x": draw(2, 5, 48), "scale": draw(2, 48), "shift": draw(2, 48)}


def _check(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> None:
    op = "ada_layer_norm"
    check_floating(op, "x", x)
    if x.ndim != 3:
        raise ValueError(
            f"{op}: x must be (N, T, C), got shape {tuple(x.shape)}; use x.flatten(1, -2)"
        )
    check_shape(op, "scale", scale, (x.shape[0], x.shape[2]))
    check_shape(op, "shift", shift, (x.shape[0], x.shape[2]))
    check_floating(op, "scale", scale)
    check_floating(op, "shift", shift)
    check_number(op, "eps", eps)


_op = Op(
    name="ada_layer_norm",
    schema="(Tensor x, Tensor scale, Tensor shift, float eps) -> Tensor",
    check=_check,
    reference=ada_layer_norm_reference,
    formula=ada_layer_norm_formula,
    fake=_fake,
    work=_work,
    shape_class=regime,
    example=_example,
    kernels=(cuda.BACKEND, triton.BACKEND, cpu.BACKEND),
)


@_op.exposes
def ada_layer_norm(x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Adaptive LayerNorm: ``layer_norm(x) * (1 + scale) + shift``, scale and shift per sample.

    Args:
        x: (N, T, C), fp64/fp32/fp16/bf16, any strides.
        scale, shift: (N, C), any float dtype, any strides (halves of a projection are fine).
        eps: added to the variance.

    Returns:
        (N, T, C), contiguous, in the dtype of x. Differentiable in every tensor.

    Raises:
        ValueError: unsupported shape or dtype.

    Peebles & Xie 2023 (Scalable Diffusion Models with Transformers), section 3.2.
    """
    result: Tensor = _op(x, scale, shift, eps)
    return result
