"""The text transformer of latent diffusion's txt2img (Rombach et al. 2022, app. E.2.1).

A transformer with BERT's tokens, trained from scratch together with the U-Net, which attends to its
last layer. Every prompt has the same number of tokens; those of padding are seen like all others.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.kernels import attention
from fastdiff.models.layers import GELUFeedForward, LayerNorm
from fastdiff.models.prompts import SHOWN
from fastdiff.models.text import EncodedPrompt


@dataclass(frozen=True, kw_only=True)
class BERTConfig:
    """The architecture of a `BERT`."""

    vocabulary: int  # number of tokens
    tokens: int  # tokens of every prompt, padding included
    width: int  # width of a token
    depth: int  # number of blocks
    num_heads: int  # attention heads of every block
    head_dim: int  # width of a head; all heads together may be narrower than a token
    hidden: int  # width of the hidden layers

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"BERTConfig: {name} must be positive, got {value}")

    @property
    def hidden_size(self) -> int:
        """Width of the tokens that the U-Net reads, under the name that transformers gives it."""
        return self.width

    @property
    def num_blocks(self) -> int:
        """Number of blocks with weights."""
        return self.depth


class NarrowAttention(nn.Module):
    """Self-attention whose heads are together narrower than a token."""

    def __init__(self, dim: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * num_heads * head_dim, bias=False)
        self.out = nn.Linear(num_heads * head_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, L, C) -> (N, L, C)."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).unbind(2)
        mixed: Tensor = self.out(attention(q, k, v).flatten(2))
        return mixed


class BERTBlock(nn.Module):
    """Self-attention and MLP, each after a norm."""

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(config.width), LayerNorm(config.width)
        self.attn = NarrowAttention(config.width, config.num_heads, config.head_dim)
        self.mlp = GELUFeedForward(config.width, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, T, C) -> (N, T, C)."""
        h, x = self.norm1(x)
        h, x = self.norm2(self.attn(h), x)
        return x + self.mlp(h)


class BERT(nn.Module):
    """Encode the ids of a prompt's tokens as vectors."""

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embed = nn.Embedding(config.vocabulary, config.width)
        self.pos_embed = nn.Embedding(config.tokens, config.width)
        self.blocks = nn.ModuleList(BERTBlock(config) for _ in range(config.depth))
        self.norm_out = LayerNorm(config.width)
        nn.init.normal_(self.token_embed.weight, std=0.02)
        nn.init.normal_(self.pos_embed.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """Encode prompts.

        Args:
            ids: (N, tokens) int64 token ids, those of padding included.

        Returns:
            (N, tokens, width).

        Raises:
            ValueError: another number of tokens, or an id that is not in the vocabulary.
        """
        config = self.config
        if ids.ndim != 2 or ids.shape[1] != config.tokens:
            raise ValueError(
                f"ids must be (N, {config.tokens}), got {tuple(ids.shape)}; pad with the "
                "tokenizer's padding"
            )
        if bool(((ids < 0) | (ids >= config.vocabulary)).any()):
            raise ValueError(
                f"ids must be 0 to {config.vocabulary - 1}, got {int(ids.min())} to "
                f"{int(ids.max())}; use the tokenizer that the model was trained with"
            )
        x: Tensor = self.token_embed(ids) + self.pos_embed.weight  # (N, T, width)
        for block in self.blocks:
            x = block(x)
        encoded: Tensor = self.norm_out(x)[0]
        return encoded


@dataclass(frozen=True, kw_only=True)
class BERTEncoder:
    """txt2img's transformer and its tokenizer; a `fastdiff.models.text.JointEncoder`."""

    model: BERT
    tokenizer: Any | None = None
    """transformers' BertTokenizer; None if the file contained weights but no vocabulary."""

    @property
    def facts(self) -> list[Any]:
        """What the weights' shapes do not determine, for the hash of a model."""
        return [self.model.config.num_heads, "bert"]

    @torch.no_grad()
    def encode(self, prompt: str) -> EncodedPrompt:
        """Encode one prompt.

        Raises:
            ValueError: it is too long, or there is no tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError(
                "the text transformer has no tokenizer, only weights; give the folder of BERT's "
                "vocabulary (vocab.txt, 30,522 tokens, uncased) as tokenizer= (--tokenizer FOLDER)"
            )
        ids = list(self.tokenizer(prompt, verbose=False)["input_ids"])
        if len(ids) > (most := self.model.config.tokens):
            raise ValueError(
                f"a prompt of this model may have at most {most} tokens, got {len(ids):,}; "
                "shorten it"
            )
        self._warn_of_unknown(prompt, ids)
        padded = ids + [self.tokenizer.pad_token_id] * (most - len(ids))
        device = self.model.token_embed.weight.device
        return EncodedPrompt(self.model(torch.tensor([padded], device=device)))

    def _warn_of_unknown(self, prompt: str, ids: list[int]) -> None:
        """BERT's words cover few scripts and no emoji; what they lack is one and the same token."""
        assert self.tokenizer is not None
        unknown = ids.count(self.tokenizer.unk_token_id)
        if unknown:
            warnings.warn(
                f"{unknown} of the {len(ids) - 2} tokens of the prompt {prompt[:SHOWN]!r} are not "
                "in the vocabulary, and the model cannot tell one from another; write it in words "
                "that it knows",
                stacklevel=2,
            )
