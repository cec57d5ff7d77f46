"""diffusers' blocks with our ops, for diffusers 0.34 and later.

Each class here is a subclass of the diffusers class of the same name and adds no state. If a call
needs something that our forward does not support (another attention processor, GLIGEN, a hook on an
inner layer), the original forward runs. Each call decides this again, so features that are loaded
or set later (IP-Adapter, LoRA, attention slicing, fused projections) work as before.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models import (
    activations,
    attention,
    attention_processor,
    normalization,
    resnet,
    upsampling,
)
from diffusers.models.transformers import transformer_2d
from torch import Tensor, nn

from fastdiff.integrations.layers import (
    needs_original,
    norm_objection,
    rescaled,
    under_transform,
    watched,
)
from fastdiff.kernels import attention as attend
from fastdiff.kernels import geglu
from fastdiff.kernels.ada_layer_norm import ada_layer_norm
from fastdiff.kernels.gate_residual import gate_residual
from fastdiff.models.layers import (
    from_tokens,
    is_channels_last,
    optional_sum,
    split_bias,
    to_tokens,
)
from fastdiff.runtime.cpu_layers import Kept, Plan, PreparedConv2d, folded_upsampling

PROCESSORS = (attention_processor.AttnProcessor, attention_processor.AttnProcessor2_0)
APPENDING = (
    attention_processor.AttnAddedKVProcessor,
    attention_processor.AttnAddedKVProcessor2_0,
)
"""Processors whose pixels attend to the context's tokens and to each other (GLIDE, unCLIP)."""
UPSAMPLING = upsampling.Upsample2D
NORM_THEN_ACT = (
    "UNet2DConditionModel",
    "UNet2DModel",
    "Encoder",
    "Decoder",
    "MaskConditionDecoder",
)
"""Classes whose forward passes conv_norm_out's output to conv_act and to nothing else."""


class ResnetBlock2D(resnet.ResnetBlock2D):
    """Norm, SiLU and convolution twice, with the time embedding between them and a shortcut."""

    def forward(self, input_tensor: Tensor, temb: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """input_tensor: (N, C, H, W); temb: (N, E) or None -> (N, C', H', W')."""
        if (
            args
            or kwargs
            or (temb is None) != (self.time_emb_proj is None)
            or needs_original(self.norm1, self.norm2, self.nonlinearity)
        ):
            return super().forward(input_tensor, temb, *args, **kwargs)
        x, h = input_tensor, self.norm1(input_tensor, activation="silu")
        resample = self.upsample if self.upsample is not None else self.downsample
        if resample is not None:
            if self.upsample is not None and len(x) >= 64:  # as in diffusers, see its issue 984
                x, h = x.contiguous(), h.contiguous()
            x, h = resample(x), resample(h)  # (N, C, 2H, 2W) or (N, C, H/2, W/2)
        if temb is None:
            h = self.norm2(self.conv1(h), activation="silu")  # (N, C', H', W')
        else:
            emb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
            if self.time_embedding_norm == "scale_shift":
                h = self.norm2(self.conv1(h), activation="silu", scale_shift=emb)
            else:
                h, bias = split_bias(self.conv1, h)
                h = self.norm2(h, activation="silu", channel_add=optional_sum(emb, bias))
        h = self.conv2(self.dropout(h))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        return rescaled(x + h, self.output_scale_factor)


def resnet_objection(block: Any) -> str | None:
    """Why a ResnetBlock2D cannot be swapped, or None."""
    if type(block.nonlinearity) is not nn.SiLU:
        return f"its activation is {type(block.nonlinearity).__name__}, not SiLU"
    embeds = block.time_emb_proj is not None
    if embeds and block.time_embedding_norm not in ("default", "scale_shift"):
        return f"its time_embedding_norm is {block.time_embedding_norm!r}"
    return norm_objection(block.norm1) or norm_objection(block.norm2)


class Attention(attention_processor.Attention):
    """Self- and cross-attention, including the norm and the residual that VAEs put around it."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        """hidden_states: (N, L, C) or (N, C, H, W); encoder_hidden_states: (N, T, D)."""
        appends = type(self.processor) in APPENDING
        if (
            cross_attention_kwargs.keys() - {"temb"}
            or under_transform()
            or attention_objection(self)
            or (appends and hidden_states.ndim != 4)
        ):
            return super().forward(
                hidden_states, encoder_hidden_states, attention_mask, **cross_attention_kwargs
            )
        if appends:
            return self._with_appended_tokens(hidden_states, encoder_hidden_states, attention_mask)
        x, spatial = hidden_states, hidden_states.ndim == 4
        if self.group_norm is not None:
            x = self.group_norm(x) if spatial else self.group_norm(x.mT).mT
        x = to_tokens(x) if spatial else x  # (N, L, C)
        context = x if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            projected.unflatten(2, (self.heads, -1))
            for projected in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        mask = attention_mask
        if mask is not None:
            mask = self.prepare_attention_mask(mask, context.shape[1], len(context))
            mask = mask.view(len(context), self.heads, -1, mask.shape[-1])
        scale = self.scale if type(self.processor) is attention_processor.AttnProcessor else None
        x = attend(q, k, v, mask=mask, scale=scale).flatten(2)  # (N, L, H*d)
        x = self.to_out[1](self.to_out[0](x))
        x = from_tokens(x, hidden_states) if spatial else x
        if self.residual_connection:
            x = x + hidden_states
        return rescaled(x, self.rescale_output_factor)

    def _with_appended_tokens(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """Attention over the context's tokens and, unless it is cross-attention only, the pixels
        (Nichol et al. 2021, section 3.1).

        hidden_states: (N, C, H, W); encoder_hidden_states: (N, T, D), None: the pixels before the
        norm; mask: (N, 1, T), added to the scores of the tokens.
        """
        x = to_tokens(self.group_norm(hidden_states))  # (N, L, C)
        context = encoder_hidden_states
        context = to_tokens(hidden_states) if context is None else context
        q, tokens_k, tokens_v = (
            projected.unflatten(2, (self.heads, -1))
            for projected in (self.to_q(x), self.add_k_proj(context), self.add_v_proj(context))
        )
        if mask is not None:  # diffusers puts the tokens in front of the pixels, the op behind
            mask = self.prepare_attention_mask(mask, x.shape[1], len(x))
            mask = mask.view(len(x), self.heads, -1, mask.shape[-1]).roll(-context.shape[1], -1)
        slower = type(self.processor) is attention_processor.AttnAddedKVProcessor
        scale = self.scale if slower else None
        if self.only_cross_attention:
            h = attend(q, tokens_k, tokens_v, mask=mask, scale=scale)
        else:
            k, v = (p(x).unflatten(2, (self.heads, -1)) for p in (self.to_k, self.to_v))
            h = attend(q, k, v, extra_k=tokens_k, extra_v=tokens_v, mask=mask, scale=scale)
        h = self.to_out[1](self.to_out[0](h.flatten(2)))
        return from_tokens(h, hidden_states) + hidden_states


def attention_objection(attn: Any) -> str | None:
    """Why an Attention runs diffusers' own forward, or None."""
    appends = type(attn.processor) in APPENDING
    if not appends and type(attn.processor) not in PROCESSORS:
        return f"its processor is {type(attn.processor).__name__}"
    if appends and (attn.added_kv_proj_dim is None or attn.group_norm is None):
        return f"its processor is {type(attn.processor).__name__}, but it lacks what that needs"
    if attn.to_out is None or (attn.to_k is None and not (appends and attn.only_cross_attention)):
        return "it lacks a projection (pre_only or only_cross_attention)"
    unserved = ("spatial_norm", "norm_cross", "norm_q", "norm_k")
    for name in unserved if appends else (*unserved, "added_kv_proj_dim"):
        if getattr(attn, name, None) is not None:
            return f"it has a {name}"
    if attn.inner_kv_dim != attn.inner_dim:
        return "its keys have fewer heads than its queries"
    return None


class GEGLU(activations.GEGLU):
    """A projection followed by the gated activation."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """hidden_states: (..., C) -> (..., D)."""
        if args or kwargs or under_transform():
            return super().forward(hidden_states, *args, **kwargs)
        return geglu(self.proj(hidden_states))


class BasicTransformerBlock(attention.BasicTransformerBlock):
    """Self-attention, cross-attention and feed-forward, with the residual sums fused into norms."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Any = None,
        cross_attention_kwargs: Any = None,
        class_labels: Any = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """hidden_states: (N, L, C); encoder_hidden_states: (N, T, D) -> (N, L, C)."""
        more = cross_attention_kwargs or {}
        adaptive = self.norm_type in ADAPTIVE
        if (
            hidden_states.ndim != 3
            or "gligen" in more
            or "scale" in more
            or getattr(self, "_chunk_size", None) is not None
            or needs_original(*block_norms(self))
            or (adaptive and watched(self.norm1))
        ):
            return super().forward(
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                timestep,
                cross_attention_kwargs,
                class_labels,
                added_cond_kwargs,
            )
        context = encoder_hidden_states if self.only_cross_attention else None
        attend1 = functools.partial(
            self.attn1, encoder_hidden_states=context, attention_mask=attention_mask, **more
        )
        attend2 = None
        if self.attn2 is not None:
            attend2 = functools.partial(
                self.attn2,
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
                **more,
            )
        if adaptive:
            return self._adaptive(hidden_states, timestep, class_labels, attend1, attend2)
        h, x = attend1(self.norm1(hidden_states)), hidden_states
        if attend2 is not None:
            h, x = self.norm2(h, x)
            h = attend2(h)
        h, x = self.norm3(h, x)
        return self.ff(h) + x

    def _adaptive(
        self,
        x: Tensor,
        timestep: Tensor,
        class_labels: Any,
        attend1: Callable[[Tensor], Tensor],
        attend2: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        """DiT's and PixArt's blocks: norms modulated by the timestep, and branches gated by it."""
        if self.norm_type == "ada_norm_zero":
            emb = self.norm1.emb(timestep, class_labels, hidden_dtype=x.dtype)
            parts = self.norm1.linear(self.norm1.silu(emb)).unflatten(1, (6, -1))
        else:
            parts = self.scale_shift_table[None] + timestep.reshape(len(x), 6, -1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts.unbind(1)  # each (N, C)
        norm1, norm2 = block_norms(self)
        x = gated(x, gate1, attend1(modulated(norm1, x, scale1, shift1)))
        if attend2 is not None:  # PixArt has no norm before it
            x = attend2(x) + x
        return gated(x, gate2, self.ff(modulated(norm2, x, scale2, shift2)))


class JointTransformerBlock(attention.JointTransformerBlock):
    """SD3's block: two streams that attend to each other, each modulated and gated by timestep."""

    def forward(
        self,
        hidden_states: Any,
        encoder_hidden_states: Any,
        temb: Any,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """hidden_states: (N, L, C); encoder_hidden_states: (N, T, C); temb: (N, C)."""
        norms = [norm for norm in (self.norm2, self.norm2_context) if norm is not None]
        x, context, more = hidden_states, encoder_hidden_states, joint_attention_kwargs or {}
        if x.ndim != 3 or self._chunk_size is not None or needs_original(*norms):
            return super().forward(
                hidden_states, encoder_hidden_states, temb, joint_attention_kwargs
            )
        normed, gate1, shift2, scale2, gate2, *dual = self.norm1(x, emb=temb)
        if self.context_pre_only:
            normed_context = self.norm1_context(context, temb)
        else:
            normed_context, *own = self.norm1_context(context, emb=temb)
        h, h_context = self.attn(hidden_states=normed, encoder_hidden_states=normed_context, **more)
        x = gated(x, gate1, h)
        if self.use_dual_attention:  # SD3.5 medium
            normed, gate = dual
            x = gated(x, gate, self.attn2(hidden_states=normed, **more))
        x = gated(x, gate2, self.ff(modulated(self.norm2, x, scale2, shift2)))
        if self.context_pre_only:
            return None, x
        gate1, shift2, scale2, gate2 = own
        context = gated(context, gate1, h_context)
        h_context = self.ff_context(modulated(self.norm2_context, context, scale2, shift2))
        return gated(context, gate2, h_context), x


def joint_objection(block: Any) -> str | None:
    """Why a JointTransformerBlock cannot be swapped, or None; its inner layers still may be."""
    norms = [norm for norm in (block.norm2, block.norm2_context) if norm is not None]
    objection = next((o for o in map(norm_objection, norms) if o is not None), None)
    if objection is None and any(map(_has_weights, norms)):
        return "its adaptive norms have weights of their own"
    return objection


class AdaLayerNormZero(normalization.AdaLayerNormZero):
    """A LayerNorm modulated by an embedding, and what modulates the rest of a block."""

    def forward(
        self,
        x: Tensor,
        timestep: Tensor | None = None,
        class_labels: Any = None,
        hidden_dtype: torch.dtype | None = None,
        emb: Tensor | None = None,
    ) -> Any:
        """x: (N, L, C) -> x modulated, gate, and shift, scale and gate of the MLP, each (N, C)."""
        if x.ndim != 3 or needs_original(self.norm, self.silu):
            return super().forward(x, timestep, class_labels, hidden_dtype, emb)
        if self.emb is not None:
            emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
        shift, scale, *rest = self.linear(self.silu(emb)).chunk(6, dim=1)
        return modulated(self.norm, x, scale, shift), *rest


class SD35AdaLayerNormZeroX(normalization.SD35AdaLayerNormZeroX):
    """As `AdaLayerNormZero`, with a second modulation of the same norm and its gate."""

    def forward(self, hidden_states: Tensor, emb: Tensor | None = None) -> tuple[Tensor, ...]:
        """hidden_states: (N, L, C) -> the results of `AdaLayerNormZero`, modulated again, gate."""
        if hidden_states.ndim != 3 or needs_original(self.norm, self.silu):
            found: tuple[Tensor, ...] = super().forward(hidden_states, emb)
            return found
        parts = self.linear(self.silu(emb)).chunk(9, dim=1)
        shift, scale, *rest, shift2, scale2, gate2 = parts
        first, second = (
            modulated(self.norm, hidden_states, *of) for of in ((scale, shift), (scale2, shift2))
        )
        return first, *rest, second, gate2


class AdaLayerNormZeroSingle(normalization.AdaLayerNormZeroSingle):
    """A LayerNorm modulated by an embedding, and the gate of a block with one branch (Flux)."""

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Any:
        """x: (N, L, C) -> x modulated and the gate (N, C)."""
        if x.ndim != 3 or needs_original(self.norm, self.silu):
            return super().forward(x, emb)
        shift, scale, gate = self.linear(self.silu(emb)).chunk(3, dim=1)
        return modulated(self.norm, x, scale, shift), gate


class AdaLayerNormContinuous(normalization.AdaLayerNormContinuous):
    """A LayerNorm modulated by an embedding."""

    def forward(self, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
        """x: (N, L, C); conditioning_embedding: (N, E) -> (N, L, C)."""
        if x.ndim != 3 or needs_original(self.norm, self.silu):
            found: Tensor = super().forward(x, conditioning_embedding)
            return found
        emb = self.linear(self.silu(conditioning_embedding).to(x.dtype))
        scale, shift = emb.chunk(2, dim=1)
        return modulated(self.norm, x, scale, shift)


def adaptive_objection(norm: Any) -> str | None:
    """Why an adaptive norm cannot be swapped, or None."""
    objection = norm_objection(norm.norm)
    if objection is None and not isinstance(norm.norm, nn.LayerNorm):
        return f"its norm is a {type(norm.norm).__name__}"
    if objection is None and _has_weights(norm.norm):
        return "its norm has weights of its own"
    return objection


def modulated(norm: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """norm(x) * (1 + scale) + shift, in one pass unless PyTorch would widen x or broadcast.

    norm: a LayerNorm without weights. x: (N, L, C). scale, shift: (N, C).
    """
    if scale.shape == (len(x), x.shape[2]) and _keeps(x.dtype, scale, shift):
        return ada_layer_norm(x, scale, shift, eps=norm.eps)
    return norm(x) * (1 + scale[:, None]) + shift[:, None]


def gated(x: Tensor, gate: Tensor, h: Tensor) -> Tensor:
    """x + gate * h, in one pass unless PyTorch would widen x or broadcast.

    x, h: (N, L, C). gate: (N, C).
    """
    if gate.shape == (len(h), h.shape[2]) and x.shape == h.shape and _keeps(x.dtype, gate, h):
        return gate_residual(h, gate, x)
    return gate[:, None] * h + x


def _keeps(dtype: torch.dtype, *others: Tensor) -> bool:
    """Whether the result with tensors of other dtypes still has this dtype."""
    return all(torch.promote_types(dtype, other.dtype) == dtype for other in others)


ADAPTIVE = ("ada_norm_zero", "ada_norm_single")
"""Norms of DiT and PixArt: LayerNorms without weights, modulated by the timestep."""


def block_norms(block: Any) -> list[Any]:
    """The LayerNorms of a BasicTransformerBlock that its forward runs, in their order."""
    if block.norm_type == "ada_norm_zero":
        return [block.norm1.norm, block.norm3]
    if block.norm_type == "ada_norm_single":
        return [block.norm1, block.norm2]
    return [norm for norm in (block.norm1, block.norm2, block.norm3) if norm is not None]


def transformer_objection(block: Any) -> str | None:
    """Why a BasicTransformerBlock cannot be swapped, or None; its inner layers still may be."""
    if block.norm_type not in ("layer_norm", *ADAPTIVE):
        return f"its norm_type is {block.norm_type!r}"
    if block.pos_embed is not None:
        return "it adds a position embedding after its norms"
    zero = block.norm_type == "ada_norm_zero"
    known = normalization.AdaLayerNormZero, AdaLayerNormZero
    if zero and (type(block.norm1) not in known or not block.norm1.emb):
        return f"its norm is a {type(block.norm1).__name__} that is given an embedding"
    if zero and block.attn2 is not None:
        return "it has a cross-attention between its adaptive norms"
    norms = block_norms(block)
    objection = next((o for o in map(norm_objection, norms) if o is not None), None)
    if objection is None and block.norm_type in ADAPTIVE and any(map(_has_weights, norms)):
        return "its adaptive norms have weights of their own"
    return objection


def _has_weights(norm: Any) -> bool:
    return norm.weight is not None


class Transformer2DModel(transformer_2d.Transformer2DModel):
    """The transformer blocks over all pixels; in channels_last, tokens are views and not copies."""

    def _operate_on_continuous_inputs(self, hidden_states: Tensor) -> tuple[Tensor, int]:
        if under_transform():
            found: tuple[Tensor, int] = super()._operate_on_continuous_inputs(hidden_states)
            return found
        h = self.norm(hidden_states)
        tokens = to_tokens(h)
        if self.use_linear_projection:
            tokens = self.proj_in(tokens)
        elif is_matrix(self.proj_in):
            tokens = as_matrix(self.proj_in, tokens)
        else:
            tokens = to_tokens(self.proj_in(h))
        return tokens, tokens.shape[2]  # (N, L, C)

    def _get_output_for_continuous_inputs(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        batch_size: int,
        height: int,
        width: int,
        inner_dim: int,
    ) -> Tensor:
        if under_transform():
            y: Tensor = super()._get_output_for_continuous_inputs(
                hidden_states, residual, batch_size, height, width, inner_dim
            )
            return y
        if self.use_linear_projection:
            return from_tokens(self.proj_out(hidden_states), residual) + residual
        if is_matrix(self.proj_out):
            return from_tokens(as_matrix(self.proj_out, hidden_states), residual) + residual
        h = hidden_states.unflatten(1, (height, width)).permute(0, 3, 1, 2)  # (N, C, H, W)
        h = h if is_channels_last(residual) else h.contiguous()
        return self.proj_out(h) + residual


def continuous_objection(model: Any) -> str | None:
    """Why a Transformer2DModel cannot be swapped, or None.

    The two methods that ours overrides are private in diffusers, so their signatures are checked.
    """
    if not model.is_input_continuous:
        return "its input is not a feature map"
    for name in ("_operate_on_continuous_inputs", "_get_output_for_continuous_inputs"):
        theirs = getattr(transformer_2d.Transformer2DModel, name, None)
        known = inspect.signature(getattr(Transformer2DModel, name)).parameters
        if theirs is None or list(inspect.signature(theirs).parameters) != list(known):
            return f"this diffusers has no {name}({', '.join(known)})"
    return None


def is_matrix(layer: Any) -> bool:
    """Whether a layer is a plain 1x1 convolution, without hooks, offload or a replaced forward."""
    options = getattr(layer, "kernel_size", None), getattr(layer, "stride", None)
    return (
        type(layer) in (nn.Conv2d, PreparedConv2d)
        and (*options, layer.padding, layer.groups) == ((1, 1), (1, 1), (0, 0), 1)
        and not watched(layer)
        and "_hf_hook" not in layer.__dict__
        and not (type(layer) is PreparedConv2d and layer.plan.widens(layer.weight.dtype))
    )


def as_matrix(conv: Any, tokens: Tensor) -> Tensor:
    """Apply a 1x1 convolution to tokens as a matrix product.

    For few pixels on a CPU, PyTorch's own 1x1 convolution would go through im2col.
    tokens: (N, L, C) -> (N, L, C').
    """
    return F.linear(tokens, conv.weight.flatten(1), conv.bias)


class Upsample2D(upsampling.Upsample2D):
    """Upsampling by 2 and its convolution as one transposed convolution on the CPU."""

    plan: Plan
    kept: Kept

    def forward(
        self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """hidden_states: (N, C, H, W) -> (N, C', 2H, 2W)."""
        if output_size is None and not args and not kwargs and not under_transform():
            y = folded_upsampling(self, self.conv, hidden_states) if self.conv else None
            if y is not None:
                return y
        return super().forward(hidden_states, output_size, *args, **kwargs)


def upsample_objection(layer: Any) -> str | None:
    """Why an Upsample2D cannot be folded, or None."""
    plain = layer.interpolate and layer.norm is None and not layer.use_conv_transpose
    if not plain or not layer.use_conv or layer.name != "conv":
        return "it is not upsampling by 2 followed by a convolution"
    return None


BLOCKS: dict[type[nn.Module], tuple[type[nn.Module], str, int, Callable[[Any], str | None]]] = {
    resnet.ResnetBlock2D: (ResnetBlock2D, "residual block", 2, resnet_objection),
    attention_processor.Attention: (Attention, "attention", 0, attention_objection),
    attention.BasicTransformerBlock: (
        BasicTransformerBlock,
        "transformer block",
        0,
        transformer_objection,
    ),
    transformer_2d.Transformer2DModel: (
        Transformer2DModel,
        "transformer",
        0,
        continuous_objection,
    ),
    attention.JointTransformerBlock: (
        JointTransformerBlock,
        "transformer block",
        0,
        joint_objection,
    ),
    **{
        theirs: (ours, "adaptive norm", 0, adaptive_objection)
        for theirs, ours in (
            (normalization.AdaLayerNormZero, AdaLayerNormZero),
            (normalization.AdaLayerNormZeroSingle, AdaLayerNormZeroSingle),
            (normalization.AdaLayerNormContinuous, AdaLayerNormContinuous),
            (normalization.SD35AdaLayerNormZeroX, SD35AdaLayerNormZeroX),
        )
    },
    activations.GEGLU: (GEGLU, "geglu", 0, lambda m: None),
}
"""diffusers' class -> our class, its op, its number of GroupNorm + SiLU pairs, its objection."""
