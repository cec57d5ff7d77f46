"""Layers on the ops of this package, for `kernels.kernelize` or to use on their own.

Each replaces the `forward` of a module that holds the parameters, so it has no constructor and no
members of its own, as the library demands.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import ada_layer_norm, geglu, group_norm_silu

__all__ = ["GEGLU", "AdaLayerNorm", "GroupNormSiLU"]


class GroupNormSiLU(nn.Module):
    """``silu(group_norm(x))`` for a module with `num_groups`, `weight`, `bias` and `eps`, such as
    `torch.nn.GroupNorm`."""

    can_torch_compile: bool = True
    has_backward: bool = True

    num_groups: int
    weight: Tensor
    bias: Tensor
    eps: float

    def forward(self, input: Tensor) -> Tensor:
        """input: (N, C, *spatial), fp32/fp16/bf16, any strides. Returns the same shape."""
        result: Tensor = group_norm_silu(
            input, self.num_groups, self.weight, self.bias, eps=self.eps
        )
        return result


class AdaLayerNorm(nn.Module):
    """``layer_norm(x) * (1 + scale) + shift`` without learned parameters, for any module."""

    can_torch_compile: bool = True
    has_backward: bool = True

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """x: (N, T, D). scale, shift: (N, D). Returns (N, T, D)."""
        result: Tensor = ada_layer_norm(x, scale, shift)
        return result


class GEGLU(nn.Module):
    """``value * gelu(gate)`` of a projection, for a module with `proj`, as diffusers' GEGLU has."""

    can_torch_compile: bool = True
    has_backward: bool = True

    proj: nn.Module

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """hidden_states: (..., inner). Returns (..., D) if `proj` returns (..., 2D)."""
        result: Tensor = geglu(self.proj(hidden_states))
        return result
