"""The text transformer of GLIDE (Nichol et al. 2021, arXiv 2112.10741, section 3.1).

The U-Net of GLIDE is `fastdiff.models.unet.UNet` with `context_attention="appended"`: each of its
attentions appends keys and values of the text's tokens to those of the pixels, and the last token
is added to the time embedding. What makes those tokens is here: a transformer of tokens that all
see each other, trained together with the U-Net. Prompts are padded with learned vectors, one per
place, so nothing is masked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.models.layers import GELUFeedForward, LayerNorm, SelfAttention
from fastdiff.models.text import EncodedPrompt

PADDING = -1
"""In place of a token's id: no token, the learned padding of this place."""


@dataclass(frozen=True, kw_only=True)
class GLIDETextConfig:
    """The architecture of a `GLIDEText`."""

    vocabulary: int  # number of tokens, the last of which ends a text
    tokens: int  # tokens of every prompt, padding included
    width: int  # width of a token
    depth: int  # number of blocks
    num_heads: int  # attention heads of every block; divides width

    def __post_init__(self) -> None:
        for name in ("vocabulary", "tokens", "width", "depth", "num_heads"):
            value = getattr(self, name)
            if value <= 0:
                raise ValueError(f"GLIDETextConfig: {name} must be positive, got {value}")
        if self.width % self.num_heads:
            raise ValueError(
                f"GLIDETextConfig: num_heads must divide width, got {self.num_heads} and "
                f"{self.width}"
            )

    @property
    def hidden_size(self) -> int:
        """Width of the tokens that the U-Net reads, under the name that transformers gives it."""
        return self.width

    @property
    def num_blocks(self) -> int:
        """Number of blocks with weights."""
        return self.depth


class GLIDETextBlock(nn.Module):
    """Self-attention and MLP, each after a norm."""

    def __init__(self, config: GLIDETextConfig) -> None:
        super().__init__()
        width = config.width
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.attn = SelfAttention(width, config.num_heads, bias=True, qkv_order="legacy")
        self.mlp = GELUFeedForward(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, T, C) -> (N, T, C)."""
        h, x = self.norm1(x)
        h, x = self.norm2(self.attn(h), x)
        return x + self.mlp(h)


class GLIDEText(nn.Module):
    """Encode the ids of a prompt's tokens as vectors."""

    def __init__(self, config: GLIDETextConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embed = nn.Embedding(config.vocabulary, config.width)
        self.pos_embed = nn.Parameter(torch.empty(config.tokens, config.width))
        self.padding_embed = nn.Parameter(torch.empty(config.tokens, config.width))
        self.blocks = nn.ModuleList(GLIDETextBlock(config) for _ in range(config.depth))
        self.norm_out = LayerNorm(config.width)
        nn.init.normal_(self.token_embed.weight, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.01)
        nn.init.normal_(self.padding_embed, std=0.01)

    def forward(self, ids: Tensor) -> Tensor:
        """Encode prompts.

        Args:
            ids: (N, tokens) int64 token ids, `PADDING` after the end of a prompt.

        Returns:
            (N, tokens, width); the last one, [:, -1], is the vector for the time embedding.

        Raises:
            ValueError: another number of tokens, or an id that is not in the vocabulary.
        """
        config = self.config
        if ids.ndim != 2 or ids.shape[1] != config.tokens:
            raise ValueError(
                f"ids must be (N, {config.tokens}), got {tuple(ids.shape)}; pad with {PADDING}"
            )
        if bool(((ids < PADDING) | (ids >= config.vocabulary)).any()):
            raise ValueError(
                f"ids must be {PADDING} or 0 to {config.vocabulary - 1}, got {int(ids.min())} to "
                f"{int(ids.max())}; use the tokenizer that the model was trained with"
            )
        padding = (ids == PADDING)[..., None]
        embedded = self.token_embed(ids.clamp(min=0)) + self.pos_embed
        x = torch.where(padding, self.padding_embed, embedded)  # (N, T, width)
        for block in self.blocks:
            x = block(x)
        encoded: Tensor = self.norm_out(x)[0]
        return encoded


@dataclass(frozen=True, kw_only=True)
class GLIDEEncoder:
    """GLIDE's text transformer and its tokenizer; a `fastdiff.models.text.JointEncoder`."""

    model: GLIDEText
    tokenizer: Any | None = None
    """transformers' GPT2Tokenizer; None if the file contained weights but no vocabulary."""

    @property
    def facts(self) -> list[Any]:
        """What the weights' shapes do not determine, for the hash of a model."""
        return [self.model.config.num_heads, "glide"]

    def check_prompt(self, prompt: str) -> list[int]:
        """The ids of a prompt's tokens.

        Raises:
            ValueError: it is too long, or there is no tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError(
                "the text transformer of GLIDE has no tokenizer, only weights; give the folder of "
                "its vocabulary (vocab.json and merges.txt of GPT-2, 50,257 tokens) as tokenizer= "
                "(--tokenizer FOLDER)"
            )
        # GLIDE was trained on captions in lower case
        ids = list(self.tokenizer(prompt.lower(), verbose=False)["input_ids"])
        if len(ids) > (most := self.model.config.tokens):
            raise ValueError(
                f"a prompt of this model may have at most {most} tokens, got {len(ids):,}; "
                "shorten it"
            )
        return ids

    @torch.no_grad()
    def encode(self, prompt: str) -> EncodedPrompt:
        """Encode one prompt; an empty one is what guidance leads away from.

        Raises:
            ValueError: as for `check_prompt`.
        """
        ids = self.check_prompt(prompt)
        padded = ids + [PADDING] * (self.model.config.tokens - len(ids))
        device = self.model.pos_embed.device
        tokens = self.model(torch.tensor([padded], device=device))
        return EncodedPrompt(tokens, tokens[:, -1])
