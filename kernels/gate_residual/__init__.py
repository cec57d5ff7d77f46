"""The gated residual sum of adaptive transformer blocks, with one gate per sample and channel.

    y = gate * x + residual                       Peebles & Xie 2023, section 3.2 (adaLN-Zero)

Bytes that must move: x and residual in, y out, 3 * N * T * C * itemsize; the gate is N * C numbers.
Eager PyTorch moves 5 * N * T * C * itemsize, because product and sum each read and write.

Backward (only x and gate are saved):

    dx = gate * dy,   dgate = sum over T of dy x,   dresidual = dy

Bytes: 3 * N * T * C * itemsize, as dresidual is dy itself; eager PyTorch moves 7: three for dx and
the product of dgate, and one for its sum. The sums over T are taken in a fixed order, without
atomics: the rows of a sample are split into P chunks, each of which writes a partial sum, and a
second step adds the P partial sums. That writes and reads another 4 * N * P * C bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_floating, check_shape, compute_dtype
from ..op import Op, Work
from ..tuning.measured import regime
from . import cpu, cuda, triton


def gate_residual_reference(x: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
    """The op in plain PyTorch; see `gate_residual`."""
    dtype = compute_dtype(x)
    wide = torch.addcmul(residual.to(dtype), gate.to(dtype)[:, None], x.to(dtype))
    return wide.to(x.dtype).contiguous()


def gate_residual_formula(x: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
    """The paper's formula, evaluated in fp64 to check the kernels."""
    return gate.view(x.shape[0], 1, x.shape[2]) * x + residual


def _fake(x: Tensor, *_: Any) -> tuple[Tensor, None]:
    return x.new_empty(x.shape), None


def _keep(args: tuple[Any, ...], outputs: Sequence[Tensor]) -> tuple[Any, ...]:
    """Save x and gate; the residual is not needed."""
    return args[0], args[1], None


def _again(
    gradients: Sequence[Tensor | None], x: Tensor, gate: Tensor, residual: None
) -> tuple[Tensor | None, ...]:
    (dy,) = gradients
    assert dy is not None
    dtype = compute_dtype(x)
    wide = dy.to(dtype)
    dx = (wide * gate.to(dtype)[:, None]).to(x.dtype)
    return dx, (wide * x.to(dtype)).sum(1).to(gate.dtype)


def _work(x: Tensor, *_: Any, backward: bool = False) -> Work:
    return Work(bytes=3 * x.numel() * x.element_size())


def _example(draw: Callable[..., Tensor]) -> dict[str, Any]:
    return {"x": draw(2, 5, 48), "gate": draw(2, 48), "residual": draw(2, 5, 48)}


def _arguments(x: Tensor, gate: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
    """The op's arguments: gate as (N, C), x and residual in one dtype."""
    gate = gate.squeeze(1) if gate.ndim == 3 else gate
    if x.dtype != residual.dtype:
        dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    return x, gate, residual


def _check(x: Tensor, gate: Tensor, residual: Tensor) -> None:
    op = "gate_residual"
    check_floating(op, "x", x)
    if x.ndim != 3:
        raise ValueError(
            f"{op}: x must be (N, T, C), got shape {tuple(x.shape)}; use x.flatten(1, -2)"
        )
    n, _, c = x.shape
    check_shape(op, "gate", gate, (n, 1, c) if gate.ndim == 3 else (n, c))
    check_shape(op, "residual", residual, tuple(x.shape))
    check_floating(op, "gate", gate)
    check_floating(op, "residual", residual)


_op = Op(
    name="gate_residual",
    schema="(Tensor x, Tensor gate, Tensor residual) -> Tensor",
    check=_check,
    reference=gate_residual_reference,
    formula=gate_residual_formula,
    fake=_fake,
    work=_work,
    shape_class=regime,
    example=_example,
    kernels=(cuda.BACKEND, triton.BACKEND, cpu.BACKEND),
    arguments=_arguments,
    keep=_keep,
    straight={"residual": 0},
    again=_again,
)


@_op.exposes
def gate_residual(x: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
    """Gated residual sum: ``gate * x + residual``, with one gate per sample and channel.

    Args:
        x: (N, T, C), the result of a branch, fp64/fp32/fp16/bf16, any strides.
        gate: (N, C) or (N, 1, C), any float dtype, any strides (a part of a projection is fine).
        residual: (N, T, C), any float dtype, any strides.

    Returns:
        (N, T, C), contiguous, in the dtype to which PyTorch promotes those of x and residual, which
        is best equal: else one of them is converted first. Differentiable in every tensor.

    Raises:
        ValueError: unsupported shape or dtype.

    Peebles & Xie 2023 (Scalable Diffusion Models with Transformers), section 3.2 (adaLN-Zero).
    """
    result: Tensor = _op(x, gate, residual)
    return result
