"""PyTorch's layers on top of our ops: same parameters, same results, additional arguments.

`accelerate` changes the class of a module's layers to these; the object, its parameters, buffers,
hooks and names stay. Called like the original, each layer computes what the original computes. The
additional arguments are for the blocks of this package, which fuse the operations around a norm.
They pass through the layer's `__call__`, so that hooks that move its weights to the device
(`enable_sequential_cpu_offload`) still run.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.kernels import add_group_norm_silu, add_layer_norm, group_norm_silu, layer_norm
from fastdiff.kernels.choose import transformed
from fastdiff.runtime import cpu_layers


def under_transform() -> bool:
    """Whether a `torch.func` transform (vmap, jvp, grad) or forward-mode autograd is active.

    The original modules then run instead of ours, because they support all that PyTorch supports.
    While a graph is being compiled this is False; compiled graphs have their own rules for ops.
    """
    return not torch.compiler.is_compiling() and transformed()


def watched(*modules: nn.Module) -> bool:
    """Whether each module must be called on its own, with the input and output of the original.

    That is so if one of them has hooks or a replaced forward, or if a transform is active. The
    hooks with which Hugging Face's accelerate moves weights do not count: they pass all arguments
    through.
    """
    return under_transform() or any(
        m._forward_hooks
        or m._forward_pre_hooks
        or m._backward_hooks
        or m._backward_pre_hooks
        or ("forward" in m.__dict__ and has_other_forward(m))
        for m in modules
    )


_SILUS: dict[type, bool] = {}


def is_silu(module: nn.Module) -> bool:
    """Whether a module is `nn.SiLU` or another class with a similar name that computes the same.

    improved-diffusion and others define their own stateless SiLU. Each class is tested once.
    """
    kind = type(module)
    if kind is nn.SiLU:
        return True
    if kind not in _SILUS:
        named = any(word in kind.__name__.lower() for word in ("silu", "swish"))
        _SILUS[kind] = named and _computes_silu(module)
    return _SILUS[kind]


def _computes_silu(module: nn.Module) -> bool:
    if module.__dict__.keys() - nn.Module().__dict__.keys() or [*module.parameters()]:
        return False  # its result may depend on the state of the object
    x = torch.linspace(-6, 6, 25)
    with torch.no_grad():
        y = type(module).forward(module, x.clone())
    return isinstance(y, Tensor) and torch.allclose(y, F.silu(x), rtol=1e-5, atol=1e-6)


def has_other_forward(module: nn.Module) -> bool:
    """Whether the `forward` set on the object computes something other than the class's forward.

    It does not if it belongs to a hook of Hugging Face's accelerate that moves weights, or if it is
    the class's own forward, which those hooks leave behind when they are removed.
    """
    forward = module.__dict__["forward"]
    moved = "_hf_hook" in module.__dict__
    return not moved and getattr(forward, "__func__", None) is not type(module).forward


def needs_original(*layers: nn.Module) -> bool:
    """Whether a block with these norms and SiLUs has to run its original forward.

    That is so if one of them is watched, was replaced by another layer, or was restored on its own.
    """
    known = all(isinstance(m, GroupNorm | LayerNorm) or is_silu(m) for m in layers)
    return not known or watched(*layers)


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` on top of `group_norm_silu` and `add_group_norm_silu`."""

    def forward(
        self,
        input: Tensor,
        *,
        channel_add: Tensor | None = None,
        scale_shift: Tensor | None = None,
        activation: str = "none",
    ) -> Tensor:
        """activation(GN(input + channel_add) * (1 + scale) + shift).

        input: (N, C, *spatial). channel_add: (N, C). scale_shift: (N, 2C) = [scale | shift].
        """
        if under_transform() and channel_add is None and scale_shift is None:
            y = super().forward(input.contiguous())  # PyTorch's jvp rejects channels_last
            return y if activation == "none" else F.silu(y)
        if channel_add is not None and channel_add.dtype == input.dtype:
            return add_group_norm_silu(
                input,
                self.num_groups,
                self.weight,
                self.bias,
                channel_add=channel_add,
                scale_shift=scale_shift,
                eps=self.eps,
                activation=activation,
            )[0]
        if channel_add is not None:  # autocast may mix dtypes; like PyTorch, add in the wider one
            input = input + channel_add.unflatten(1, (-1, *[1] * (input.ndim - 2)))
        return group_norm_silu(
            input,
            self.num_groups,
            self.weight,
            self.bias,
            scale_shift=scale_shift,
            eps=self.eps,
            activation=activation,
        )


class GroupNormBeforeSiLU(GroupNorm):
    """A norm whose output goes only into one SiLU module, its `partner`; it applies that SiLU too.

    It is for pairs that a model calls one after the other (`conv_norm_out`, `conv_act`).
    """

    partner: tuple[nn.Module]  # in a tuple, so that it is not registered as a submodule

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input, activation="none" if watched(self, *self.partner) else "silu")


class SiLUInNorm(nn.SiLU):
    """The partner of a `GroupNormBeforeSiLU`: returns its input unless one of them is watched."""

    partner: tuple[nn.Module]

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if watched(self, *self.partner) else input


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` over the last dimension, on top of `layer_norm` and `add_layer_norm`."""

    def forward(  # type: ignore[override]
        self, input: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """LN(input), or with a residual (LN(total), total) where total = input + residual."""
        if under_transform() and residual is None:
            return super().forward(input)
        if residual is None:
            return layer_norm(input, self.weight, self.bias, eps=self.eps)
        if residual.dtype != input.dtype:  # autocast may mix them; like PyTorch, add in the wider
            total = input + residual
            return layer_norm(total, self.weight, self.bias, eps=self.eps), total
        return add_layer_norm(input, residual, self.weight, self.bias, eps=self.eps)


class Sequential(nn.Sequential):
    """`nn.Sequential` in which a GroupNorm and the SiLU that follows it run as one op.

    Slices have this class too, and indexing returns the layer itself, so code that takes it apart
    (guided-diffusion's `out_layers[0]`, `in_layers[:-1]`) computes the same as before.
    """

    def forward(self, input: Tensor) -> Tensor:
        layers = list(self._modules.values())
        index = 0
        while index < len(layers):
            pair = layers[index : index + 2]
            if is_pair(pair) and not watched(*pair):
                input = pair[0](input, activation="silu")
                index += 2
            else:
                input = pair[0](input)
                index += 1
        return input


def is_pair(layers: list[nn.Module]) -> bool:
    """Whether these two layers are a swapped GroupNorm and a SiLU."""
    return (
        len(layers) == 2
        and isinstance(layers[0], GroupNorm)
        and not isinstance(layers[0], GroupNormBeforeSiLU)
        and is_silu(layers[1])
    )


def rescaled(x: Tensor, divisor: float) -> Tensor:
    """x / divisor; without a pass over memory if the divisor is 1."""
    return x if divisor == 1 else x / divisor


def replaced_forward(module: nn.Module) -> str | None:
    """Why a module computes something other than its class does, or None."""
    if "forward" in module.__dict__ and has_other_forward(module):
        return "its forward was replaced on this object"
    return None


def norm_objection(norm: nn.Module) -> str | None:
    """Why a norm cannot be swapped, or None. Subclasses may compute something else."""
    if isinstance(norm, GroupNorm | LayerNorm):
        return None
    if type(norm) not in (nn.GroupNorm, nn.LayerNorm):
        return f"its norm is a {type(norm).__name__}"
    if isinstance(norm, nn.LayerNorm) and len(norm.normalized_shape) != 1:
        return f"it normalizes over {len(norm.normalized_shape)} dimensions, ours over the last one"
    return replaced_forward(norm)


def ours(module: nn.Module) -> bool:
    """Whether an earlier call has swapped the module."""
    return type(module) is not original(module)


def original(module: nn.Module) -> type[nn.Module]:
    """The class of a module, or the class it had before it was swapped."""
    kind = type(module)
    if kind.__module__.startswith("fastdiff.integrations") or kind in cpu_layers.PREPARED.values():
        return next(
            c
            for c in kind.__mro__
            if not c.__module__.startswith("fastdiff.") or c in cpu_layers.PREPARED
        )
    return kind
