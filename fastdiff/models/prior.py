"""The diffusion prior of unCLIP: a CLIP image embedding from a text.

Ramesh et al. 2022 (arXiv 2204.06125, section 2.2). A causal transformer reads the text's tokens,
its embedding, the timestep, the noised image embedding and a learned last token; from what comes
out at the last one it predicts the embedding without noise (`prediction` "x0"). x is one vector per
sample, in units in which CLIP's embeddings have mean 0 and variance 1 (`mean`, `std`).
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
    timestep_embedding,
)
from fastdiff.models.network import Context, Network, check_conditions, register

AFTER_TEXT = 4
"""Tokens after those of the text: its embedding, the timestep, x and the learned one."""


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """The architecture of a `Prior`."""

    in_channels: int  # width of CLIP's embeddings and of the text's tokens
    context_tokens: int  # tokens of a text, padding included
    width: int  # width of a token inside
    depth: int  # number of blocks
    num_heads: int  # attention heads of every block; divides width
    dropout: float = 0.0  # probability, inside MLPs

    def __post_init__(self) -> None:
        for name in ("in_channels", "context_tokens", "width", "depth", "num_heads"):
            value = getattr(self, name)
            if value <= 0:
                raise ValueError(f"PriorConfig: {name} must be positive, got {value}")
        if self.width % 2 or self.width % self.num_heads:
            raise ValueError(
                f"PriorConfig: width must be even and a multiple of num_heads {self.num_heads}, "
                f"got {self.width}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"PriorConfig: dropout must be in [0, 1), got {self.dropout}")

    @property
    def out_channels(self) -> int:
        return self.in_channels

    @property
    def learned_sigma(self) -> bool:
        return False

    @property
    def num_classes(self) -> None:
        return None

    @property
    def null_class(self) -> bool:
        return False

    @property
    def context_dim(self) -> int:
        return self.in_channels

    @property
    def added_condition_dim(self) -> int:
        """Width of the text's embedding."""
        return self.in_channels

    @property
    def size_multiple(self) -> int:
        return 1

    @property
    def num_blocks(self) -> int:
        return self.depth

    @property
    def tokens(self) -> int:
        """Number of tokens that the blocks read."""
        return self.context_tokens + AFTER_TEXT


class PriorBlock(nn.Module):
    """Causal self-attention and MLP, each after a norm."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        width = config.width
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.attn = SelfAttention(width, config.num_heads, bias=True)
        self.mlp = GELUFeedForward(width, 4 * width, dropout=config.dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x: (N, T, C). mask: (N or 1, 1, T, T) bool, True where a token sees another."""
        h, x = self.norm1(x)
        h, x = self.norm2(self.attn(h, mask), x)
        return x + self.mlp(h)


@register(PriorConfig)
class Prior(Network):
    """Predict the image embedding in x at timestep t."""

    config: PriorConfig
    row_pixels = 256  # the tokens of one embedding keep all cores busy

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # recompute each block in the backward pass
        width, channels = config.width, config.in_channels
        self.time_embed = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.linear_in = nn.Linear(channels, width)
        self.added_embed = nn.Linear(channels, width)
        self.context_embed = nn.Linear(channels, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.tokens, width))
        self.query = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(PriorBlock(config) for _ in range(config.depth))
        self.norm_out = LayerNorm(width)
        self.linear_out = nn.Linear(width, channels)
        # statistics of CLIP's image embeddings, which are measured and not trained
        self.mean = nn.Parameter(torch.zeros(1, channels), requires_grad=False)
        self.std = nn.Parameter(torch.ones(1, channels), requires_grad=False)
        for parameter in (self.pos_embed, self.query):
            nn.init.normal_(parameter, std=0.01)

    def embed(self, t: Tensor, y: Tensor | None = None, added: Tensor | None = None) -> Tensor:
        """See `Network.embed`.

        added: (N, in_channels), the text's embedding. Returns (N, 2 * width): its token and that of
        the timestep.
        """
        check_conditions(self.config, len(t), y, added)
        assert added is not None
        dtype = self.linear_in.weight.dtype
        time = self.time_embed(timestep_embedding(t, self.config.width).to(dtype))  # (N, width)
        return torch.cat([self.added_embed(added.to(dtype)), time], dim=1)

    def project_context(self, context: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """Project the text's tokens to the width of the model.

        context: (N, context_tokens, in_channels). mask: (N, context_tokens) bool, False for
        padding. Returns [(N, context_tokens, width)], and the mask if there is one.

        Raises:
            ValueError: another shape.
        """
        wanted = self.config.context_tokens, self.config.in_channels
        if context.ndim != 3 or context.shape[1:] != wanted:
            raise ValueError(
                f"context must be (N, {wanted[0]}, {wanted[1]}), got {tuple(context.shape)}; "
                "use the text encoder that the model was trained with"
            )
        return [self.context_embed(context), *([] if mask is None else [mask])]

    def check_input(self, x: Tensor, context: Tensor | Context | None) -> None:
        """Raise ValueError unless `body` can run on x: (N, in_channels) and this context."""
        channels = self.config.in_channels
        if x.ndim != 2 or x.shape[1] != channels:
            raise ValueError(
                f"x must be (N, {channels}), got {tuple(x.shape)}; use embeddings of the CLIP that "
                "the model was trained with"
            )
        if context is None:
            raise ValueError(
                f"context must be (N, {self.config.context_tokens}, {channels}) for this model, "
                "got None; check context="
            )

    def body(self, x: Tensor, emb: Tensor, context: Tensor | Context | None = None) -> Tensor:
        """See `Network.body`. x: (N, in_channels). Returns its shape."""
        if isinstance(context, Tensor):
            context = self.project_context(context)
        text, *masks = cast("list[Tensor]", context)
        tokens = [
            text,  # (N, context_tokens, width)
            emb.unflatten(1, (2, -1)),  # (N, 2, width)
            self.linear_in(x)[:, None],  # (N, 1, width)
            self.query.expand(len(x), -1, -1),
        ]
        h = torch.cat(tokens, dim=1) + self.pos_embed  # (N, T, width)
        seen = self._seen(h, masks)
        for block in self.blocks:
            h = self._run(block, h, seen)
        h, _ = self.norm_out(h[:, -1].contiguous())
        return self.linear_out(h)  # (N, in_channels)

    def _seen(self, h: Tensor, masks: list[Tensor]) -> Tensor:
        """What each token sees: those before it that are not padding, (N or 1, 1, T, T) bool."""
        count = h.shape[1]
        causal = torch.ones(count, count, dtype=torch.bool, device=h.device).tril()[None, None]
        if not masks:
            return causal
        there = nn.functional.pad(masks[0], (0, AFTER_TEXT), value=True)
        return causal & there[:, None, None]

    def denormalized(self, x: Tensor) -> Tensor:
        """An image embedding in CLIP's own units. x: (N, in_channels), what sampling made."""
        return x * self.std + self.mean

    def _run(self, block: nn.Module, *args: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return cast(Tensor, checkpointed(block, *args))
        return cast(Tensor, block(*args))
