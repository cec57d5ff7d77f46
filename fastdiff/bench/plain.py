"""Our networks on the torch functions that people write, in place of our ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff import kernels


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale_shift: Tensor | None,
    eps: float,
    activation: str,
) -> Tensor:
    y = F.group_norm(x, num_groups, weight, bias, eps)
    if scale_shift is not None:
        shape = (len(x), x.shape[1], *[1] * (x.ndim - 2))
        scale, shift = (half.reshape(shape) for half in scale_shift.chunk(2, dim=1))
        y = y * (1 + scale) + shift
    return F.silu(y) if activation == "silu" else y


def with_addends(x: Tensor, channel_add: Tensor | None, residual: Tensor | None) -> Tensor:
    if channel_add is not None:
        x = x + channel_add.reshape(*channel_add.shape, *[1] * (x.ndim - 2))
    return x if residual is None else x + residual


def add_group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    channel_add: Tensor | None,
    residual: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    total = with_addends(x, channel_add, residual)
    return group_norm_silu(total, num_groups, weight, bias, *rest), total


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return layer_norm(total, weight, bias, eps), total


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    assert extra_k is None, "the networks measured here have no extra keys"
    assert extra_v is None, "the networks measured here have no extra keys"
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2)


def geglu(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def cat_group_norm_silu(
    x: Tensor,
    skip: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    channel_add: Tensor | None,
    residual: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    adds = channel_add is not None or residual is not None
    total = with_addends(x, channel_add, residual)
    y = F.silu(F.group_norm(torch.cat([total, skip], dim=1), num_groups, weight, bias, eps))
    return y, total if adds else x.new_empty(0)


def linear_geglu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return geglu(F.linear(x, weight, bias))


def linear_add(
    x: Tensor, weight: Tensor, bias: Tensor | None, addend: Tensor | None, residual: Tensor | None
) -> Tensor:
    y = F.linear(x if addend is None else x + addend, weight, bias)
    return y if residual is None else y + residual


def cat_linear(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(torch.cat([x, skip], dim=-1), weight, bias)


PLAIN: dict[str, Callable[..., Any]] = {
    "group_norm_silu": group_norm_silu,
    "add_group_norm_silu": add_group_norm_silu,
    "layer_norm": layer_norm,
    "add_layer_norm": add_layer_norm,
    "attention": attention,
    "geglu": geglu,
    "cat_group_norm_silu": cat_group_norm_silu,
    "linear_geglu": linear_geglu,
    "linear_add": linear_add,
    "cat_linear": cat_linear,
}
"""Op -> a function of its schema's arguments that calls only torch's own kernels."""


@contextmanager
def plain_ops() -> Iterator[None]:
    """Inside the block, networks call the functions of `PLAIN`, also in graphs traced there; the
    sampler step stays ours."""

    def instead(op: str) -> Callable[..., Any]:
        def forward(*args: Any) -> tuple[Any, None]:
            return PLAIN[op](*args[:-1]), None  # the last argument asks for statistics

        return forward

    before = {name: kernels.OPS[name].backends for name in PLAIN}
    for name, backends in before.items():
        forward = instead(name)
        kernels.OPS[name].use({"reference": replace(backends["reference"], forward=forward)})
    try:
        yield
    finally:
        for name, backends in before.items():
            kernels.OPS[name].use(backends)
