"""The text transformer that is trained jointly with a denoiser (Rombach et al. 2022, section 3.3).

It is an unmasked transformer over a fixed number of tokens, padding included, whose outputs are
the keys and values of the denoiser's cross-attention (appendix E.2.1 there; the paper's has 32
layers of width 1280, ours are small). `TextEncoder` takes it as it takes CLIP. It may also return
the mean of a text's tokens, which a denoiser adds to its time embedding, as GLIDE does with its
last token: small denoisers learn from it what a text is about much sooner than from attention.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastdiff.configs import LATER
from fastdiff.kernels import layer_norm
from fastdiff.models.layers import FeedForward, SelfAttention


@dataclass(frozen=True, kw_only=True)
class TextTransformerConfig:
    """The architecture; fields that transformers' CLIP has, too, have the names they have there."""

    vocab_size: int
    """Number of token ids."""
    hidden_size: int
    """Width of the tokens, which is the denoiser's context_dim."""
    num_hidden_layers: int
    """Transformer blocks."""
    num_attention_heads: int
    """Heads of every attention."""
    max_position_embeddings: int
    """Tokens read at once, start and end included; longer prompts are split."""
    dropout: float = 0.0
    """Probability, in the feed-forwards."""
    pooled: bool = field(default=False, metadata=LATER)
    """Whether the mean of a text's tokens is returned as well."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, got {self.hidden_size} "
                f"and {self.num_attention_heads}"
            )
        if self.max_position_embeddings < 3:
            raise ValueError(
                "max_position_embeddings must be at least 3 (start, a token, end), got "
                f"{self.max_position_embeddings}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    @property
    def num_blocks(self) -> int:
        """Lower bound of the number of blocks with weights."""
        return self.num_hidden_layers

    @property
    def hidden_act(self) -> str:
        """The activation, as transformers names it."""
        return "geglu"

    @property
    def layer_norm_eps(self) -> float:
        """Epsilon of every LayerNorm."""
        return 1e-5

    @property
    def pad_token_id(self) -> int:
        """Id of padding, of `fastdiff.models.tokenizer.Tokenizer`."""
        return 0

    @property
    def eos_token_id(self) -> int:
        """Id of the end of a text, of `fastdiff.models.tokenizer.Tokenizer`."""
        return 2


class TextOutput(NamedTuple):
    """The tokens after each block, in the form of transformers."""

    hidden_states: tuple[Tensor, ...]
    """(N, T, D) each: the embeddings, then the output of each block; before the final norm."""
    text_embeds: Tensor | None = None
    """(N, D): the mean of the text's tokens after the final norm, start and end included; None
    unless the config says pooled."""


class TextTransformer(nn.Module):
    """Token and position embeddings, pre-norm transformer blocks, a final LayerNorm."""

    def __init__(self, config: TextTransformerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.position_embedding = nn.Parameter(torch.empty(config.max_position_embeddings, width))
        # CLIP's 0.02 and 0.01 vanish beside the first blocks' outputs: texts begin almost equal,
        # and a small denoiser takes thousands of steps to tell them apart.
        nn.init.normal_(self.token_embedding.weight, std=1.0)
        nn.init.normal_(self.position_embedding, std=0.3)
        self.layers = nn.ModuleList(TextBlock(config) for _ in range(config.num_hidden_layers))
        self.final_layer_norm = FusedLayerNorm(width)

    def forward(self, ids: Tensor, *, output_hidden_states: bool = True) -> TextOutput:
        """ids: (N, T) int64 with T up to max_position_embeddings. Returns every block's output."""
        states, pooled = self._states(ids), None
        if self.config.pooled:
            pooled = self.mean(self.final_layer_norm(states[-1]), ids)
        return TextOutput(tuple(states) if output_hidden_states else (states[-1],), pooled)

    def _states(self, ids: Tensor) -> list[Tensor]:
        """The embeddings, then every block's output."""
        states = [self.token_embedding(ids) + self.position_embedding[: ids.shape[1]]]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return states

    def encode(self, ids: Tensor) -> Tensor:
        """The context tokens: ids (N, T) -> (N, T, D)."""
        return self.encode_both(ids)[0]

    def encode_both(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """The context tokens, (N, T, D), and their mean, (N, D), None unless the config says
        pooled. ids: (N, T)."""
        normed: Tensor = self.final_layer_norm(self._states(ids)[-1])
        return normed, self.mean(normed, ids) if self.config.pooled else None

    def mean(self, tokens: Tensor, ids: Tensor) -> Tensor:
        """The mean of the tokens that are no padding: (N, T, D), ids (N, T) -> (N, D)."""
        words = (ids != self.config.pad_token_id)[..., None].to(tokens)
        return (tokens * words).sum(1) / words.sum(1).clamp(min=1)


class FusedLayerNorm(nn.LayerNorm):
    """PyTorch's LayerNorm, computed by fastdiff's op."""

    def forward(self, input: Tensor) -> Tensor:
        """input: (N, T, D) -> (N, T, D)."""
        return layer_norm(input, self.weight, self.bias, eps=self.eps)


class TextBlock(nn.Module):
    """Self-attention and feed-forward, each preceded by a LayerNorm and added to its input."""

    def __init__(self, config: TextTransformerConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm1, self.norm2 = FusedLayerNorm(width), FusedLayerNorm(width)
        self.attention = SelfAttention(width, config.num_attention_heads)
        self.ff = FeedForward(width, config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, T, D) -> (N, T, D)."""
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.ff(self.norm2(x))
        return out
