"""U-ViT: a vision transformer with long skips whose inputs are all tokens.

Bao et al. 2023 (arXiv 2209.12152). Class or text, timestep and patches are tokens, each with a
learned position embedding. Long skips connect the first half of the blocks to the second half, the
first block to the last: a linear layer reads both, concatenated (section 3.1). The network can end
in a 3x3 convolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from fastdiff.models.layers import (
    GELUFeedForward,
    LayerNorm,
    SelfAttention,
    checkpointed,
    from_patches,
    timestep_embedding,
    to_tokens,
)
from fastdiff.models.network import (
    Context,
    Network,
    check_conditions,
    check_image,
    check_no_mask,
    check_patches,
    embed_labels,
    register,
)


@dataclass(frozen=True, kw_only=True)
class UViTConfig:
    """The architecture of a `UViT`."""

    in_channels: int  # channels of x
    out_channels: int  # channels of the prediction; with learned_sigma twice those of x
    width: int  # width of a token
    depth: int  # blocks, not counting the middle one; half of them have a skip from the other half
    num_heads: int  # attention heads of every block; divides width
    patch_size: int = 2  # side of the square of pixels of x in a token
    sample_size: int = 32  # height and width of x, fixed by the learned positions
    mlp_ratio: float = 4.0  # width of the hidden layers relative to a token
    qkv_bias: bool = False  # whether the projections to q, k and v have biases
    time_mlp: bool = False  # two linear layers between the timestep's sinusoids and its token
    timestep_offset: float = 0.0  # added to t; the published models count from 1
    num_classes: int | None = None  # class labels 0 .. num_classes - 1
    null_class: bool = False  # one more label, index num_classes: "no class", for guidance
    context_dim: int | None = None  # width of the context tokens, instead of classes
    context_tokens: int | None = None  # number of context tokens, fixed by the learned positions
    learned_sigma: bool = False  # the second half of the output interpolates the log variance
    conv_out: bool = True  # end in a 3x3 convolution
    dropout: float = 0.0  # probability, after attention and inside MLPs

    def __post_init__(self) -> None:
        def require(holds: bool, message: str) -> None:
            if not holds:
                raise ValueError(f"UViTConfig: {message}")

        require(self.depth % 2 == 0, f"depth must be even, got {self.depth}")
        require(self.width % 2 == 0, f"width must be even, got {self.width}")
        check_patches(self, require)
        for name in ("context_dim", "context_tokens"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} must be None or positive, got {value}")
        require(
            (self.context_dim is None) == (self.context_tokens is None),
            f"context_dim and context_tokens must be set together, got {self.context_dim} and "
            f"{self.context_tokens}",
        )
        require(
            self.context_dim is None or self.num_classes is None,
            f"num_classes and context_dim cannot be combined, got {self.num_classes} and "
            f"{self.context_dim}; set only one of them",
        )
        require(
            abs(self.timestep_offset) < float("inf"),
            f"timestep_offset must be finite, got {self.timestep_offset}",
        )

    @property
    def hidden(self) -> int:
        """Width of the hidden layers."""
        return int(self.width * self.mlp_ratio)

    @property
    def condition_tokens(self) -> int:
        """Number of tokens before the patches: class, timestep and context."""
        return 1 + (self.num_classes is not None) + (self.context_tokens or 0)

    @property
    def added_condition_dim(self) -> None:
        return None

    @property
    def size_multiple(self) -> int:
        return self.patch_size

    @property
    def num_blocks(self) -> int:
        return self.depth + 1


class UViTBlock(nn.Module):
    """Attention and MLP, each after a norm; with `skip`, a linear layer merges the skip first."""

    def __init__(self, config: UViTConfig, *, skip: bool = False) -> None:
        super().__init__()
        width = config.width
        self.skip_linear = nn.Linear(2 * width, width) if skip else None
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.attn = SelfAttention(width, config.num_heads, bias=config.qkv_bias)
        self.dropout = nn.Dropout(config.dropout)
        self.mlp = GELUFeedForward(width, config.hidden, dropout=config.dropout)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """x, skip: (N, T, C) -> (N, T, C)."""
        if self.skip_linear is not None:
            assert skip is not None
            x = self.skip_linear(torch.cat([x, skip], dim=2))
        h, _ = self.norm1(x)
        h, x = self.norm2(self.dropout(self.attn(h)), x)
        return x + self.mlp(h)


@register(UViTConfig)
class UViT(Network):
    """Predict the noise (or v, or x0) in x at timestep t."""

    config: UViTConfig

    def __init__(self, config: UViTConfig) -> None:
        super().__init__()
        self.config = config
        self.only_side = config.sample_size
        self.gradient_checkpointing = False  # recompute each block in the backward pass
        width, patch, out = config.width, config.patch_size, config.out_channels
        self.patch_embed = nn.Conv2d(config.in_channels, width, patch, stride=patch)
        if config.time_mlp:
            self.time_embed = nn.Sequential(
                nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width)
            )
        if config.num_classes is not None:
            self.label_embed = nn.Embedding(config.num_classes + config.null_class, width)
        if config.context_dim is not None:
            self.context_embed = nn.Linear(config.context_dim, width)
        patches = (config.sample_size // patch) ** 2
        self.pos_embed = nn.Parameter(torch.zeros(1, config.condition_tokens + patches, width))
        half = config.depth // 2
        self.in_blocks = nn.ModuleList(UViTBlock(config) for _ in range(half))
        self.middle_block = UViTBlock(config)
        self.out_blocks = nn.ModuleList(UViTBlock(config, skip=True) for _ in range(half))
        self.norm_out = LayerNorm(width)
        self.linear_out = nn.Linear(width, patch * patch * out)
        self.conv_out = nn.Conv2d(out, out, 3, padding=1) if config.conv_out else nn.Identity()
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def embed(self, t: Tensor, y: Tensor | None = None, added: Tensor | None = None) -> Tensor:
        """See `Network.embed`.

        Returns (N, k*width): the token of the class, if the model has classes, and of the timestep.
        """
        config = self.config
        check_conditions(config, len(t), y, added)
        token = timestep_embedding(t.float() + config.timestep_offset, config.width)
        token = token.to(self.pos_embed.dtype)
        if config.time_mlp:
            token = self.time_embed(token)
        if y is None:
            return token
        return torch.cat([embed_labels(self.label_embed, y), token], dim=1)

    def project_context(self, context: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """Project the context's tokens to the width of the model; there is no mask.

        context: (N, context_tokens, context_dim). Returns [(N, context_tokens, width)].

        Raises:
            ValueError: the model does not read a context, or the context has another shape.
        """
        config = self.config
        if config.context_dim is None:
            raise ValueError("context must be None for a model without context; leave it out")
        wanted = config.context_tokens, config.context_dim
        if context.ndim != 3 or context.shape[1:] != wanted:
            raise ValueError(
                f"context must be (N, {wanted[0]}, {wanted[1]}), got {tuple(context.shape)}; "
                "use the text encoder that the model was trained with, and a prompt that fits it"
            )
        check_no_mask(mask)
        return [self.context_embed(context)]

    def check_input(self, x: Tensor, context: Tensor | Context | None) -> None:
        """Raise ValueError unless `body` can run on x: (N, in_channels, sample_size, sample_size)
        and this context."""
        check_image(self.config, x, context)
        side = self.only_side
        if x.shape[2:] != (side, side):
            raise ValueError(
                f"H and W of x must be {side} x {side}, got {x.shape[2]} x {x.shape[3]}: this "
                "model learned one position embedding per patch; resize the input"
            )

    def body(self, x: Tensor, emb: Tensor, context: Tensor | Context | None = None) -> Tensor:
        """See `Network.body`. x: (N, in_channels, H, W). Returns (N, out_channels, H, W)."""
        config, patch = self.config, self.config.patch_size
        grid = x.shape[2] // patch, x.shape[3] // patch
        if isinstance(context, Tensor):
            context = self.project_context(context)
        given = cast("list[Tensor]", context or [])
        tokens = [
            emb.unflatten(1, (-1, config.width)),  # (N, 1 or 2, width)
            *given,  # (N, context_tokens, width)
            to_tokens(self.patch_embed(x)),  # (N, L, width)
        ]
        h = torch.cat(tokens, dim=1) + self.pos_embed  # (N, T + L, width)
        skips: list[Tensor] = []
        for block in self.in_blocks:
            h = self._run(block, h)
            skips.append(h)
        h = self._run(self.middle_block, h)
        for block in self.out_blocks:
            h = self._run(block, h, skips.pop())
        h, _ = self.norm_out(h)
        h = self.linear_out(h[:, config.condition_tokens :])  # (N, L, p*p*out_channels)
        return self.conv_out(from_patches(h, grid, patch))

    def _run(self, block: nn.Module, *args: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return cast(Tensor, checkpointed(block, *args))
        return cast(Tensor, block(*args))
