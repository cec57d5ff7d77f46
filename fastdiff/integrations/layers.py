"""PyTorch's own layers with our ops behind them: same parameters, same results, more arguments.

`accelerate` makes these of a module's layers by changing their class; the object, its parameters,
buffers, hooks and names stay. Called as the original is, each computes what the original does. The
further arguments are for the blocks of this room, which fuse what comes before and after a norm.
They go through the layer's `__call__`, so hooks that bring its weights to the device
(`enable_sequential_cpu_offload`) run as for the original.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.kernels import add_group_norm_silu, add_layer_norm, group_norm_silu, layer_norm
from fastdiff.kernels.choose import transformed


def under_transform() -> bool:
    """Whether `torch.func` (vmap, jvp, grad) or forward-mode differentiation is at work.

    The modules as they were written support what PyTorch supports, so they run then. A graph that
    is being compiled has its own rules for ops.
    """
    return not torch.compiler.is_compiling() and transformed()


def watched(*modules: nn.Module) -> bool:
    """Whether each of the modules has to be called as it was, with its own input and output.

    Somebody listens to one, or has replaced its forward on the object, or a transform is at work.
    The hooks with which Hugging Face's accelerate moves weights do not count: they pass arguments
    on.
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
    """Whether a module is `nn.SiLU`, or one of the many classes named so that compute the same.

    improved-diffusion and others have their own, without state: each class is tried once.
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
        return False  # what it computes may depend on the object
    x = torch.linspace(-6, 6, 25)
    with torch.no_grad():
        y = type(module).forward(module, x.clone())
    return isinstance(y, Tensor) and torch.allclose(y, F.silu(x), rtol=1e-5, atol=1e-6)


def has_other_forward(module: nn.Module) -> bool:
    """Whether the forward on the object is neither a hook's that moves weights nor its class's own.

    The latter is what Hugging Face's accelerate leaves behind when its hooks are removed.
    """
    forward = module.__dict__["forward"]
    moved = "_hf_hook" in module.__dict__
    return not moved and getattr(forward, "__func__", None) is not type(module).forward


def needs_original(*layers: nn.Module) -> bool:
    """Whether a block with these norms and SiLUs has to run as it was written.

    Somebody listens to one, or has put another layer in its place since, or has restored it alone.
    """
    known = all(isinstance(m, GroupNorm | LayerNorm) or is_silu(m) for m in layers)
    return not known or watched(*layers)


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` by `group_norm_silu` and `add_group_norm_silu`."""

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
            y = super().forward(input.contiguous())  # its jvp takes no channels_last
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
        if channel_add is not None:  # autocast may mix dtypes; PyTorch adds in the wider one
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
    """A norm whose output goes into one SiLU module alone, the `partner`: it does the SiLU too.

    Serves pairs that a model calls one after the other (`conv_norm_out`, `conv_act`).
    """

    partner: tuple[nn.Module]  # in a tuple, so that it is not registered as a submodule

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input, activation="none" if watched(self, *self.partner) else "silu")


class SiLUInNorm(nn.SiLU):
    """The partner of a `GroupNormBeforeSiLU`: hands its input on, unless somebody listens."""

    partner: tuple[nn.Module]

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if watched(self, *self.partner) else input


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` over the last dimension by `layer_norm` and `add_layer_norm`."""

    def forward(  # type: ignore[override]
        self, input: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """LN(input); with a residual (LN(total), total), total = input + residual."""
        if under_transform() and residual is None:
            return super().forward(input)
        if residual is None:
            return layer_norm(input, self.weight, self.bias, eps=self.eps)
        if residual.dtype != input.dtype:  # autocast may mix them; PyTorch adds in the wider one
            total = input + residual
            return layer_norm(total, self.weight, self.bias, eps=self.eps), total
        return add_layer_norm(input, residual, self.weight, self.bias, eps=self.eps)


class Sequential(nn.Sequential):
    """`nn.Sequential` in which a GroupNorm and the SiLU behind it are one op.

    Slices of it are of its class too, and a single layer of it is the layer: code that takes it
    apart (guided-diffusion's `out_layers[0]`, `in_layers[:-1]`) computes the same.
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
    """Whether these are a GroupNorm that was made ours and a SiLU."""
    return (
        len(layers) == 2
        and isinstance(layers[0], GroupNorm)
        and not isinstance(layers[0], GroupNormBeforeSiLU)
        and is_silu(layers[1])
    )


def rescaled(x: Tensor, divisor: float) -> Tensor:
    """x / divisor, without a trip through memory for 1."""
    return x if divisor == 1 else x / divisor


def replaced_forward(module: nn.Module) -> str | None:
    """Why a module's class does not say what it computes, or None."""
    if "forward" in module.__dict__ and has_other_forward(module):
        return "its forward was replaced on this object"
    return None


def norm_objection(norm: nn.Module) -> str | None:
    """Why a norm cannot be ours. Subclasses may compute something else."""
    if isinstance(norm, GroupNorm | LayerNorm):
        return None
    if type(norm) not in (nn.GroupNorm, nn.LayerNorm):
        return f"its norm is a {type(norm).__name__}"
    if isinstance(norm, nn.LayerNorm) and len(norm.normalized_shape) != 1:
        return f"it norms over {len(norm.normalized_shape)} dimensions, ours over the last one"
    return replaced_forward(norm)
