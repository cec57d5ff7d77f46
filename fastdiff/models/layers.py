"""Layers that the denoisers and the autoencoder share.

Blocks pass on `Addends`: a tensor, a residual and a bias whose sum is the activation. The next norm
performs the addition, because `add_group_norm_silu` and `add_layer_norm` do it without another pass
over memory. Before a norm, convolutions also leave their biases to that addition (`split_bias`).

Shapes: N batch, C channels, H W pixels, L = H*W tokens, T context tokens, D context width,
E embedding width, d head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdiff.kernels import (
    add_group_norm_silu,
    add_layer_norm,
    attention,
    cat_group_norm_silu,
    cat_linear,
    checkpoint_contexts,
    geglu,
    group_norm_silu,
    layer_norm,
    linear_add,
    linear_geglu,
)
from fastdiff.kernels.checks import autocast_available
from fastdiff.kernels.choose import transformed
from fastdiff.names import QKVOrder

TimeEmbedding = Literal["openai", "ddpm", "ddpm-original"]
SomeModule = TypeVar("SomeModule", bound=nn.Module)
DownsamplePadding = Literal["symmetric", "asymmetric"]


def timestep_embedding(
    t: Tensor, dim: int, kind: TimeEmbedding = "openai", shift: int | None = None
) -> Tensor:
    """Sinusoidal embedding of the timestep, angles t * 10000^(-i / n) for i = 0 .. dim/2 - 1.

    `openai` (ADM, LDM, Stable Diffusion): [cos | sin] with n = dim/2. `ddpm` (Ho et al. 2020, after
    Vaswani et al. 2017): [sin | cos] with n = dim/2 - 1. The angles are fp32 for every dtype of the
    model and use the order of operations of the code that the weights were trained with: `openai`
    and `ddpm` as in diffusers, exp(-log(10000) i / n); `ddpm-original` as in the code of Ho et al.,
    exp(i (-log(10000) / n)), which rounds differently (1e-4 at t = 1000).

    Args:
        t: (N,), integer or real training timesteps.
        dim: width of the embedding, even.
        shift: n = dim/2 - shift, for models that differ from both kinds; None: that of the kind.

    Returns:
        (N, dim) fp32.
    """
    half = dim // 2
    if shift is None:
        shift = 0 if kind == "openai" else 1
    spread = half - shift
    index = torch.arange(half, dtype=torch.float32, device=t.device)
    if kind == "ddpm-original":
        exponents = index * -(math.log(10000) / spread)
    else:
        exponents = -math.log(10000) * index / spread
    angles = t.float()[:, None] * torch.exp(exponents)[None]
    sin, cos = angles.sin(), angles.cos()
    return torch.cat([cos, sin] if kind == "openai" else [sin, cos], dim=1)


def checkpointed(function: Callable[..., Any], *args: Any) -> Any:
    """Gradient checkpointing: run `function` again in the backward pass, on the same backends."""
    # Dynamo does not accept a context_fn
    options: dict[str, Any] = {}
    if not torch.compiler.is_compiling():
        options["context_fn"] = checkpoint_contexts
    return checkpoint(function, *args, use_reentrant=False, **options)


def zero_init(module: SomeModule) -> SomeModule:
    """Set every parameter to zero: the block starts as the identity (Ho et al. 2020, app. B)."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def repeated(x: Tensor, rows: int) -> Tensor:
    """Repeat each row of x, (N, ...), in turn so that there are `rows`, a multiple of N; in the
    same memory format. Returns x itself if there are as many."""
    count = len(x)
    if count == rows:
        return x
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    shape = rows, *x.shape[1:]
    more = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    more.unflatten(0, (count, rows // count)).copy_(x[:, None])
    return more


def to_tokens(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, H*W, C); a view if x is channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def from_tokens(tokens: Tensor, like: Tensor) -> Tensor:
    """(N, H*W, C) -> (N, C, H, W) in the memory format of `like`; a view if it is channels_last."""
    x = tokens.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)
    return x if is_channels_last(like) else x.contiguous()


def from_patches(patches: Tensor, grid: tuple[int, int], size: int) -> Tensor:
    """(N, L, size*size*C) -> (N, C, size*h, size*w), channels_last, for L = h*w patches in rows.

    The numbers of a patch are in the order (row, column, channel). grid: (h, w).
    """
    x = patches.unflatten(2, (size, size, -1)).unflatten(1, grid)  # (N, h, w, size, size, C)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


BIAS_IS_A_LAUNCH: tuple[str, ...] = ("cuda", "meta")
"""Devices on which a convolution's bias takes another pass over its result: PyTorch adds it to
cuDNN's in a kernel of its own. oneDNN adds it while it writes. On meta, a GPU is planned for."""


def fuses(layer: nn.Module, x: Tensor, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether a linear layer, or another `kind`, may run in one op with what surrounds it, instead
    of being called: where launches cost much (`BIAS_IS_A_LAUNCH`), without gradients, whose
    backward pass would compute the layer again, without autocast, and of an unmodified
    layer (`is_unmodified`)."""
    device = x.device.type
    return (
        device in BIAS_IS_A_LAUNCH
        and not torch.is_grad_enabled()
        and is_unmodified(layer, kind)
        and not (autocast_available(device) and torch.is_autocast_enabled(device))
    )


def linear_of_sums(
    layer: nn.Linear, x: Tensor, addend: Tensor | None, residual: Tensor | None
) -> Tensor:
    """layer(x + addend) + residual, where None is 0.

    x, addend: (N, L, C). residual: (N, L, C'). Returns (N, L, C').
    """
    if fuses(layer, x) and (addend is not None or residual is not None):
        return linear_add(x, layer.weight, layer.bias, addend=addend, residual=residual)
    y: Tensor = layer(x if addend is None else x + addend)
    return y if residual is None else y + residual


def is_unmodified(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a layer is of exactly this class, without hooks or a replaced forward, so that
    its computation can be done in another way."""
    return type(layer) is kind and not (
        "forward" in layer.__dict__
        or layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
    )


class Addends(NamedTuple):
    """An activation as a sum that has not been computed yet: x + residual + bias."""

    x: Tensor
    """(N, C, H, W)."""
    residual: Tensor | None = None
    """Like x; None: 0."""
    bias: Tensor | None = None
    """(C,); None: 0."""

    def total(self) -> Tensor:
        """The sum, (N, C, H, W)."""
        total = self.x if self.residual is None else self.x + self.residual
        return total if self.bias is None else total + self.bias[:, None, None]


def split_bias(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """conv(x) without its bias, and the bias (C',), which the caller passes to the next norm.

    The bias is None if the convolution has added it: where that costs nothing, and where the layer
    has to be called as a whole because it was modified.
    """
    if x.device.type not in BIAS_IS_A_LAUNCH or not is_unmodified(conv, nn.Conv2d):
        return conv(x), None
    return conv._conv_forward(x, conv.weight, None), conv.bias


def pointwise(conv: nn.Module, x: Tensor) -> Tensor:
    """A 1x1 convolution, or the identity. Where a convolution's bias is a launch, and x is
    channels_last, it runs as a matrix product, which adds the bias while it writes."""
    if (
        x.device.type in BIAS_IS_A_LAUNCH
        and isinstance(conv, nn.Conv2d)
        and is_unmodified(conv, nn.Conv2d)
        and is_channels_last(x)
    ):
        return from_tokens(F.linear(to_tokens(x), conv.weight.flatten(1), conv.bias), x)
    return conv(x)


def pointwise_of_two(conv: nn.Module, x: Tensor, skip: Tensor) -> Tensor:
    """A 1x1 convolution of [x | skip], both channels_last, as a matrix product of two inputs.

    x: (N, C, H, W). skip: (N, C2, H, W). Returns (N, C', H, W).
    """
    assert isinstance(conv, nn.Conv2d)
    weight = conv.weight.flatten(1)
    return from_tokens(cat_linear(to_tokens(x), to_tokens(skip), weight, conv.bias), x)


def optional_sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a + b, where None is nothing."""
    if a is None or b is None:
        return b if a is None else a
    return a + b


class GroupNorm(nn.Module):
    """GroupNorm with the additions before it and the activation after it, as one op."""

    def __init__(
        self,
        channels: int,
        num_groups: int,
        eps: float,
        activation: Literal["silu", "none"] = "silu",
    ) -> None:
        super().__init__()
        self.num_groups, self.eps, self.activation = num_groups, eps, activation
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(
        self,
        x: Tensor,
        *,
        channel_add: Tensor | None = None,
        residual: Tensor | None = None,
        scale_shift: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (y, total): total = x + channel_add + residual, y = activation(GN(total), FiLM).

        Args:
            x: (N, C, H, W). channel_add: (N, C) or (C,). residual: like x. scale_shift: (N, 2C).
        """
        if channel_add is None and residual is None:
            y = group_norm_silu(
                x,
                self.num_groups,
                self.weight,
                self.bias,
                scale_shift=scale_shift,
                eps=self.eps,
                activation=self.activation,
            )
            return y, x
        return add_group_norm_silu(
            x,
            self.num_groups,
            self.weight,
            self.bias,
            channel_add=channel_add,
            residual=residual,
            scale_shift=scale_shift,
            eps=self.eps,
            activation=self.activation,
        )

    def of_two(
        self, x: Tensor, skip: Tensor, *, channel_add: Tensor | None, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """`forward` for the total followed by the channels of skip; returns y and the total.

        x: (N, C, H, W). skip: (N, C2, H, W). y: (N, C + C2, H, W).
        """
        assert self.activation == "silu"
        return cat_group_norm_silu(
            x,
            skip,
            self.num_groups,
            self.weight,
            self.bias,
            channel_add=channel_add,
            residual=residual,
            eps=self.eps,
        )

    def extra_repr(self) -> str:
        channels = self.weight.numel()
        return f"{channels}, num_groups={self.num_groups}, eps={self.eps}, {self.activation}"


class LayerNorm(nn.Module):
    """LayerNorm over the last dimension with the residual addition before it."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (y, total): total = x + residual, y = LN(total). x: (..., C)."""
        if residual is None:
            return layer_norm(x, self.weight, self.bias, eps=self.eps), x
        return add_layer_norm(x, residual, self.weight, self.bias, eps=self.eps)


class Downsample(nn.Module):
    """Halve H and W with a 3x3 convolution of stride 2.

    `asymmetric` pads one row below and one column to the right (DDPM: TensorFlow's SAME; every
    CompVis autoencoder); `symmetric` pads one on each side (ADM, LDM, Stable Diffusion).
    """

    def __init__(self, channels: int, padding: DownsamplePadding = "symmetric") -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=int(padding == "symmetric"))

    def padded(self, x: Tensor) -> Tensor:
        """What the convolution is applied to."""
        return F.pad(x, (0, 1, 0, 1)) if self.padding == "asymmetric" else x

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.padded(x))  # (N, C, H/2, W/2)


class Upsample(nn.Module):
    """Double H and W: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(upsample_nearest(x))  # (N, C, 2H, 2W)

    def to_size(self, x: Tensor, size: tuple[int, int] | None) -> Tensor:
        """Upsample to `size`, (2H or 2H - 1, 2W or 2W - 1): the size before it was halved. None:
        (2H, 2W)."""
        if size in (None, (2 * x.shape[2], 2 * x.shape[3])):
            return self(x)
        return self.conv(self.resized(x, size))  # (N, C, *size)

    def resized(self, x: Tensor, size: tuple[int, int] | None) -> Tensor:
        """What the convolution is applied to; size: as in `to_size`."""
        return upsample_nearest(x) if size is None else F.interpolate(x, size, mode="nearest")


class DownsampleMean(nn.Module):
    """Halve H and W by the mean of each 2x2 square, without parameters (conv_resample=False)."""

    def forward(self, x: Tensor) -> Tensor:
        return downsample_mean(x)  # (N, C, H/2, W/2)


def run_before_norm(block: nn.Module, x: Tensor, size: tuple[int, int] | None = None) -> Addends:
    """Run a convolution, or a block around one, before a norm that can add its bias; see
    `split_bias`. size: of an upsampling's result, see `Upsample.to_size`."""
    bias: Tensor | None = None
    if isinstance(block, nn.Conv2d):
        x, bias = split_bias(block, x)
    elif isinstance(block, Downsample) and is_unmodified(block, Downsample):
        x, bias = split_bias(block.conv, block.padded(x))
    elif isinstance(block, Upsample) and is_unmodified(block, Upsample):
        x, bias = split_bias(block.conv, block.resized(x, size))
    elif isinstance(block, Upsample):
        x = block.to_size(x, size)
    else:
        x = block(x)
    return Addends(x, None, bias)


class UpsampleNearest(nn.Module):
    """Double H and W by nearest neighbour, without parameters (conv_resample=False)."""

    def forward(self, x: Tensor) -> Tensor:
        return upsample_nearest(x)  # (N, C, 2H, 2W)


def upsample_nearest(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, 2H, 2W)."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def downsample_mean(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, H/2, W/2), the mean of each 2x2 square."""
    return F.avg_pool2d(x, 2)


class ResBlock(nn.Module):
    """Norm, SiLU and convolution twice, with the time embedding between them, plus a skip path.

    The embedding is added before the second norm (DDPM, LDM, Stable Diffusion) or, with
    `scale_shift_norm`, modulates it: GN(h) * (1 + scale) + shift (Dhariwal & Nichol 2021,
    section 3, AdaGN). With `resample` both paths change resolution between the first activation
    and the first convolution (BigGAN's blocks).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        num_groups: int,
        eps: float,
        emb_dim: int | None = None,
        scale_shift_norm: bool = False,
        dropout: float = 0.0,
        resample: Literal["up", "down"] | None = None,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.scale_shift_norm, self.resample = scale_shift_norm, resample
        self.index = 0  # position among the U-Net's residual blocks, set by the U-Net
        self.norm1 = GroupNorm(in_channels, num_groups, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if emb_dim is not None:
            self.emb = nn.Linear(emb_dim, (2 if scale_shift_norm else 1) * out_channels)
        self.norm2 = GroupNorm(out_channels, num_groups, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = (
            nn.Conv2d(in_channels, out_channels, 1)
            if in_channels != out_channels
            else nn.Identity()
        )

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        emb: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        skip: Tensor | None = None,
        before_norm: bool = False,
        projected: Tensor | None = None,
    ) -> tuple[Addends, Tensor]:
        """Run the block.

        Args:
            x, residual: (N, C, H, W). bias: (C,) or None, the third addend of the activation.
            skip: (N, C2, H, W), concatenated to the activation, whose sum is then no longer needed;
                a block of C + C2 channels.
            emb: (N, E), activated.
            projected: (N, C') from `project_embedding`, used in place of emb and conv1's bias.
            before_norm: whether a norm that can add a bias follows. If not, the returned one is
                None.

        Returns:
            The block's result, (N, C', H', W'), as addends, and its input, x + residual + bias,
            concatenated with skip or not.
        """
        apart = skip if skip is not None and self._reads_apart(x, skip) else None
        if apart is not None:
            h, total = self.norm1.of_two(x, apart, residual=residual, channel_add=bias)
        else:
            if skip is not None:
                x = torch.cat([Addends(x, residual, bias).total(), skip], dim=1)
                residual = bias = None
            h, total = self.norm1(x, residual=residual, channel_add=bias)
        x = total
        if self.resample is not None:
            resample = upsample_nearest if self.resample == "up" else downsample_mean
            h, x = resample(h), resample(x)
        h, bias1 = split_bias(self.conv1, h)  # (N, C', H', W')
        if projected is not None:
            h, _ = self.norm2(h, channel_add=projected)
        elif emb is None:
            h, _ = self.norm2(h, channel_add=bias1)
        elif self.scale_shift_norm:
            h, _ = self.norm2(h, channel_add=bias1, scale_shift=self.emb(emb))
        else:
            h, _ = self.norm2(h, channel_add=optional_sum(self.emb(emb), bias1))
        h, bias2 = self.dropout(h), None
        if before_norm:
            h, bias2 = split_bias(self.conv2, h)
        else:
            h = self.conv2(h)
        if apart is None:
            return Addends(h, pointwise(self.skip, x), bias2), total
        return Addends(h, pointwise_of_two(self.skip, x, apart), bias2), total

    def _reads_apart(self, x: Tensor, skip: Tensor) -> bool:
        """Whether norm and shortcut can read x and skip where they are, without a concatenation."""
        return (
            isinstance(self.skip, nn.Conv2d)
            and fuses(self.skip, x, nn.Conv2d)
            and is_unmodified(self.norm1, GroupNorm)
            and self.resample is None
            and is_channels_last(x)
            and is_channels_last(skip)
            and x.dtype is skip.dtype
        )


def split_qkv(qkv: Tensor, num_heads: int, order: QKVOrder) -> tuple[Tensor, Tensor, Tensor]:
    """Split a packed projection into views q, k, v.

    The rows of OpenAI's qkv weights are ordered (H, 3, d) (`legacy`) or (3, H, d) (`new`).

    Args:
        qkv: (N, L, 3*C).

    Returns:
        Three (N, L, num_heads, C/num_heads) views.
    """
    if order == "legacy":
        q, k, v = qkv.unflatten(2, (num_heads, 3, -1)).unbind(3)
    else:
        q, k, v = qkv.unflatten(2, (3, num_heads, -1)).unbind(2)
    return q, k, v


class AttentionBlock(nn.Module):
    """Self-attention over the pixels: norm, packed qkv, attention, projection (DDPM, ADM, VAEs).

    With `context_dim` the pixels attend to the context's tokens as well: keys and values projected
    from them are appended to those of the pixels (GLIDE, Nichol et al. 2021, section 3.1).
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        *,
        num_groups: int,
        eps: float,
        qkv_order: QKVOrder = "new",
        context_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.qkv_order = num_heads, qkv_order
        self.index = 0  # position among the blocks that read the context, set by the U-Net
        self.norm = GroupNorm(channels, num_groups, eps, activation="none")
        self.qkv = nn.Linear(channels, 3 * channels)
        self.context_kv = None if context_dim is None else nn.Linear(context_dim, 2 * channels)
        self.proj = zero_init(nn.Linear(channels, channels))

    def project(self, context: Tensor) -> Tensor:
        """context: (N, T, D) -> keys and values of its tokens, (N, T, 2, H, d)."""
        assert self.context_kv is not None
        kv = self.context_kv(context)
        if self.qkv_order == "legacy":
            return kv.unflatten(2, (self.num_heads, 2, -1)).transpose(2, 3)
        return kv.unflatten(2, (2, self.num_heads, -1))

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        before_norm: bool = True,
    ) -> tuple[Addends, Tensor]:
        """Run the block.

        Args:
            x, residual: (N, C, H, W). bias: (C,).
            context: the result of `project`, if the block has a `context_dim`.
            mask: (N, T) bool, False for tokens of the context that are padding.
            before_norm: whether a norm follows, which can add the block's two addends.

        Returns:
            The block's result and its input, x + residual + bias, each (N, C, H, W).
        """
        h, x = self.norm(x, residual=residual, channel_add=bias)
        q, k, v = split_qkv(self.qkv(to_tokens(h)), self.num_heads, self.qkv_order)
        extra_k, extra_v = (None, None) if context is None else context.unbind(2)
        if mask is not None:  # every pixel may be seen
            mask = F.pad(mask, (k.shape[1], 0), value=True)[:, None, None]  # (N, 1, 1, L + T)
        h = attention(q, k, v, extra_k=extra_k, extra_v=extra_v, mask=mask)
        h = h.flatten(2)  # (N, L, C)
        return projected_addends(self.proj, h, None, x, before_norm=before_norm), x


class SelfAttention(nn.Module):
    """Self-attention of tokens, with one packed projection.

    bias: of the projection to q, k and v. qkv_order: of its rows, see `split_qkv`.
    """

    def __init__(
        self, dim: int, num_heads: int, *, bias: bool = False, qkv_order: QKVOrder = "new"
    ) -> None:
        super().__init__()
        self.num_heads, self.qkv_order = num_heads, qkv_order
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: (N, L, C) -> (N, L, C). mask: as for the op `attention`."""
        q, k, v = split_qkv(self.qkv(x), self.num_heads, self.qkv_order)
        return self.out(attention(q, k, v, mask=mask).flatten(2))


class CrossAttention(nn.Module):
    """Cross-attention from tokens to the context.

    `project(context)` does not depend on the step, so `UNet.project_context` runs it once per
    prompt.
    """

    def __init__(self, dim: int, context_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(context_dim, 2 * dim, bias=False)
        self.out = nn.Linear(dim, dim)

    def project(self, context: Tensor) -> Tensor:
        """context: (N, T, D) -> packed keys and values (N, T, 2, H, d)."""
        return self.kv(context).unflatten(2, (2, self.num_heads, -1))

    def forward(self, x: Tensor, kv: Tensor) -> Tensor:
        """x: (N, L, C); kv: the result of `project` -> (N, L, C)."""
        q = self.q(x).unflatten(2, (self.num_heads, -1))  # (N, L, H, d)
        k, v = kv.unbind(2)
        return self.out(attention(q, k, v).flatten(2))


class FeedForward(nn.Module):
    """Linear layer to 2 * 4C, GEGLU, linear layer back to C (Shazeer 2020)."""

    def __init__(self, dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 8 * dim)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        if fuses(self.proj, x):
            h = linear_geglu(x, self.proj.weight, self.proj.bias)
        else:
            h = geglu(self.proj(x))
        return self.out(self.dropout(h))


class GELUFeedForward(nn.Module):
    """Linear to `hidden`, GELU, linear back (Dosovitskiy et al. 2021, eq. 3).

    approximate: "tanh" for GELU's approximation by a tanh (Hendrycks & Gimpel 2016, section 2).
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        approximate: Literal["none", "tanh"] = "none",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.approximate = approximate
        self.fc1 = nn.Linear(dim, hidden)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., C) -> (..., C)."""
        return self.fc2(self.dropout(F.gelu(self.fc1(x), approximate=self.approximate)))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each preceded by a LayerNorm.

    self_attention: False for a second cross-attention in place of the self-attention.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        *,
        self_attention: bool = True,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = LayerNorm(dim), LayerNorm(dim), LayerNorm(dim)
        self.attn1: SelfAttention | CrossAttention = (
            SelfAttention(dim, num_heads)
            if self_attention
            else CrossAttention(dim, context_dim, num_heads)
        )
        self.attn2 = CrossAttention(dim, context_dim, num_heads)
        self.ff = FeedForward(dim, dropout)

    def cross_attentions(self) -> list[CrossAttention]:
        """The layers that read the context: one, or two without self-attention."""
        both = self.attn1, self.attn2
        return [layer for layer in both if isinstance(layer, CrossAttention)]

    def forward(self, x: Tensor, residual: Tensor | None, *kvs: Tensor) -> tuple[Tensor, Tensor]:
        """x, residual: (N, L, C); kvs: of each of `cross_attentions`, (R, T, 2, H, d) ->
        (h, residual), each (R, L, C).

        R is N, or a multiple: several contexts in turn for each row, see `repeated`.
        """
        rows = len(kvs[-1])
        h, x = self.norm1(x, residual)
        if isinstance(self.attn1, CrossAttention):
            h = self.attn1(repeated(h, rows), kvs[0])
            x = repeated(x, rows)
        else:
            h = self.attn1(h)
        h, x = self.norm2(h, x)
        h, x = repeated(h, rows), repeated(x, rows)
        h, x = self.norm3(self.attn2(h, kvs[-1]), x)
        return self.ff(h), x


class SpatialTransformer(nn.Module):
    """A stack of transformer blocks over the pixels (Rombach et al. 2022, section 3.3).

    The 1x1 convolutions around it in Stable Diffusion 1 and the linear layers in 2 and XL compute
    the same on channels_last data, so one linear layer implements both.
    """

    def __init__(
        self,
        channels: int,
        context_dim: int,
        num_heads: int,
        *,
        depth: int,
        num_groups: int,
        dropout: float = 0.0,
        self_attention: bool = True,
    ) -> None:
        super().__init__()
        self.index = (
            0  # position among the U-Net's transformers, set by the U-Net; selects keys and values
        )
        self.norm = GroupNorm(channels, num_groups, eps=1e-6, activation="none")
        self.proj_in = nn.Linear(channels, channels)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                channels, context_dim, num_heads, dropout, self_attention=self_attention
            )
            for _ in range(depth)
        )
        self.proj_out = zero_init(nn.Linear(channels, channels))

    def cross_attentions(self) -> list[CrossAttention]:
        """The layers that read the context, block by block."""
        blocks = [block for block in self.blocks if isinstance(block, TransformerBlock)]
        return [layer for block in blocks for layer in block.cross_attentions()]

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        kvs: list[Tensor],
        *,
        bias: Tensor | None = None,
        before_norm: bool = True,
    ) -> tuple[Addends, Tensor]:
        """Run the block.

        Args:
            x, residual: (N, C, H, W). bias: (C,). kvs: of each of `cross_attentions`, see
                `CrossAttention.project`; their rows are N or a multiple, as in `TransformerBlock`.
            before_norm: whether a norm follows, which can add the block's two addends.

        Returns:
            The block's result, (R, C, H, W), and its input, x + residual + bias, (N, C, H, W).
        """
        h, x = self.norm(x, residual=residual, channel_add=bias)
        h = self.proj_in(to_tokens(h))  # (N, L, C)
        pending: Tensor | None = None
        each = len(kvs) // len(self.blocks)
        for index, block in enumerate(self.blocks):
            h, pending = block(h, pending, *kvs[index * each : (index + 1) * each])
        base = repeated(x, len(h))
        return projected_addends(self.proj_out, h, pending, base, before_norm=before_norm), x


def projected_addends(
    layer: nn.Linear, h: Tensor, addend: Tensor | None, x: Tensor, *, before_norm: bool
) -> Addends:
    """layer(h + addend) as pixels, plus x; the sum is left to the next norm, if one follows.

    h, addend: (N, L, C). x: (N, C', H, W).
    """
    if not before_norm and fuses(layer, h) and is_channels_last(x):
        return Addends(from_tokens(linear_of_sums(layer, h, addend, to_tokens(x)), x))
    return Addends(from_tokens(linear_of_sums(layer, h, addend, None), x), x)


def norm_first(block: nn.Module) -> bool:
    """Whether a block is or begins with a norm, and so takes a residual and a bias."""
    return isinstance(block, ResBlock | AttentionBlock | SpatialTransformer | GroupNorm)


def move_together(parameters: Sequence[Tensor]) -> None:
    """Move parameters of one dtype next to each other in memory, in place, so that one product can
    serve for all of them (`joined`).

    Names, shapes and values stay, and changes in place (a merged LoRA) are seen. Moving the module
    afterwards takes them apart; then each layer runs on its own.
    """
    if joined(parameters) is not None:
        return
    flat = torch.cat([p.detach().flatten() for p in parameters])
    pieces = flat.split([p.numel() for p in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.data = piece.view(parameter.shape)


def joined(parameters: Sequence[Tensor | None]) -> Tensor | None:
    """Parameters that are neighbours in memory as one tensor, joined along the first dimension.
    None if they are not, or if one of them needs a gradient."""
    first = parameters[0]
    if first is None:
        return None
    storage, place, rows = first.untyped_storage()._cdata, first.storage_offset(), 0
    for p in parameters:
        if (
            p is None
            or (p.requires_grad and torch.is_grad_enabled())
            or p.dtype is not first.dtype
            or p.storage_offset() != place
            or p.untyped_storage()._cdata != storage
            or not p.is_contiguous()
        ):
            return None
        place += p.numel()
        rows += len(p)
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def one_product_serves(x: Tensor, layers: Sequence[nn.Linear]) -> bool:
    """Whether layers may be computed as one product: where launches cost much
    (`BIAS_IS_A_LAUNCH`), not while compiling or under `torch.func`, and if all are unmodified."""
    return (
        x.device.type in BIAS_IS_A_LAUNCH
        and not torch.compiler.is_compiling()
        and not transformed()
        and all(is_unmodified(layer, nn.Linear) for layer in layers)
    )


def embedding_parameters(blocks: Sequence[ResBlock]) -> list[list[Tensor]]:
    """The lists of parameters that `project_embedding` needs next to each other in memory."""
    kinds = zip(*((b.emb.weight, b.emb.bias, b.conv1.bias) for b in blocks), strict=True)
    return [[*parameters] for parameters in kinds]


def project_embedding(blocks: Sequence[ResBlock], emb: Tensor) -> list[Tensor] | None:
    """What each block's second norm adds per channel, for all blocks in one matrix product.

    emb: (N, E), activated. Returns per block the projection of emb plus the bias of the first
    convolution, (N, C'), a slice of columns; or None if each block has to project emb itself: with
    FiLM, unless `one_product_serves`, or if the parameters are not `joined`.
    """
    if not one_product_serves(emb, [b.emb for b in blocks]) or any(
        b.scale_shift_norm or not is_unmodified(b.conv1, nn.Conv2d) for b in blocks
    ):
        return None
    weight = joined([b.emb.weight for b in blocks])
    bias = joined([b.emb.bias for b in blocks])
    conv_bias = joined([b.conv1.bias for b in blocks])
    if weight is None or bias is None or conv_bias is None:
        return None
    more = conv_bias.expand(len(emb), -1)
    if torch.is_grad_enabled():
        y = F.linear(emb, weight, bias) + more
    else:
        y = linear_add(emb, weight, bias, residual=more)  # (N, sum of C')
    return [*y.split([b.out_channels for b in blocks], dim=1)]


def project_contexts(layers: Sequence[CrossAttention], context: Tensor) -> list[Tensor]:
    """`CrossAttention.project` of each layer, in one matrix product if possible
    (`one_product_serves` and the weights are `joined`).

    context: (N, T, D). Returns per layer (N, T, 2, H, d), any strides.
    """
    kvs = [layer.kv for layer in layers]
    together = bool(kvs) and one_product_serves(context, kvs)
    weight = joined([kv.weight for kv in kvs]) if together else None
    if weight is None:
        return [layer.project(context) for layer in layers]
    packed = F.linear(context, weight).split([kv.out_features for kv in kvs], dim=2)
    return [
        kv.unflatten(2, (2, layer.num_heads, -1)) for layer, kv in zip(layers, packed, strict=True)
    ]
