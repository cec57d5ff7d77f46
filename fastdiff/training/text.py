"""Conditioning on captions: a text transformer that is trained jointly with the denoiser.

Rombach et al. 2022 (arXiv 2112.10752), section 3.3: the transformer's tokens are keys and values of
the denoiser's cross-attention, and one loss trains both. Its tokenizer is learned from the captions
of the training data.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.models.network import Network
from fastdiff.models.text import TextEncoder
from fastdiff.models.text_transformer import TextTransformer, TextTransformerConfig
from fastdiff.models.tokenizer import Tokenizer
from fastdiff.runtime.conditions import Condition

LEAST_VOCABULARY = 260
"""Bytes, special tokens and the end of a word."""


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """A text transformer as wide as the denoiser's context_dim; without layers there is none."""

    layers: int = 0
    """Transformer blocks; 0: the run has no text."""

    heads: int = 4
    """Heads of every attention."""

    tokens: int = 32
    """Tokens of a caption, start and end included; longer captions are cut, longer prompts split.
    """

    vocabulary: int = 2048
    """Largest number of token ids; the tokenizer has fewer if the captions do not need more."""

    dropout: float = 0.0
    """Probability, in the feed-forwards."""

    full_caption: float = 0.6
    """Share of pictures that are trained on with their full caption; the others get one of their
    alternatives, if they have any."""

    def __post_init__(self) -> None:
        if self.layers < 0:
            raise ValueError(f"text layers must be 0 or more, got {self.layers}")
        if self.vocabulary < LEAST_VOCABULARY:
            raise ValueError(
                f"text vocabulary must be at least {LEAST_VOCABULARY}, got {self.vocabulary}"
            )
        if self.tokens < 3 or self.heads < 1:
            raise ValueError(
                "text tokens must be at least 3 and heads at least 1, got "
                f"{self.tokens} and {self.heads}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"text dropout must be in [0, 1), got {self.dropout}")
        if not 0 <= self.full_caption <= 1:
            raise ValueError(f"text full_caption must be 0 to 1, got {self.full_caption}")


def architecture(
    config: TextConfig, vocabulary: int, width: int, *, pooled: bool
) -> TextTransformerConfig:
    """The text transformer of a run; the other arguments as for `Captions.transformer`."""
    return TextTransformerConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        max_position_embeddings=config.tokens,
        dropout=config.dropout,
        pooled=pooled,
    )


class Conditioned(nn.Module):
    """A denoiser and the text transformer that it is trained with, as one network."""

    def __init__(self, denoiser: Network, encoder: TextTransformer) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.encoder = encoder

    def forward(self, x: Tensor, t: Tensor, *, ids: Tensor, y: Tensor | None = None) -> Tensor:
        """x: (N, C, h, w); t: (N,); ids: (N, T) int64; y: (N,) classes. Returns (N, out, h, w)."""
        context, pooled = self.encoder.encode_both(ids)
        prediction: Tensor = self.denoiser(x, t, context=context, y=y, added=pooled)
        return prediction


class Captions:
    """The captions of a data set as token ids, and which of them a step takes.

    Attributes:
        tokenizer: learned from the captions.
    """

    def __init__(self, captions: Sequence[Sequence[str]], config: TextConfig) -> None:
        """captions: of each image; the first is the full one."""
        self.config = config
        self.full = tuple(own[0] for own in captions)
        texts = [text for own in captions for text in own]
        self.tokenizer = Tokenizer.learn(texts, config.vocabulary)
        self._warn_of_cuts(texts)
        self.table = self.ids(texts)  # (all captions, T)
        self.counts = torch.tensor([len(own) for own in captions])
        self.starts = self.counts.cumsum(0) - self.counts

    def _warn_of_cuts(self, texts: Sequence[str]) -> None:
        lengths = [len(self.tokenizer(text)["input_ids"]) for text in texts]
        cut = sum(length > self.config.tokens for length in lengths)
        if cut:
            warnings.warn(
                f"{cut:,} of {len(texts):,} captions are cut to {self.config.tokens} tokens, start "
                f"and end included; the longest has {max(lengths):,}: raise text tokens to keep it",
                stacklevel=3,
            )

    def ids(self, texts: Sequence[str]) -> Tensor:
        """Token ids of texts, cut or padded: (N, tokens) int64."""
        tokenizer, length = self.tokenizer, self.config.tokens
        rows = torch.full((len(texts), length), tokenizer.pad_token_id)
        for row, text in zip(rows, texts, strict=True):
            words = tokenizer(text, add_special_tokens=False)["input_ids"][: length - 2]
            row[: len(words) + 2] = row.new_tensor(
                [tokenizer.bos_token_id, *words, tokenizer.eos_token_id]
            )
        return rows

    def drawn(self, indices: Tensor, uniform: Tensor, dropped: Tensor) -> Tensor:
        """Ids of one caption of each image: (N, tokens) int64.

        indices: (N,) of the images. uniform: (N, 2) fp64 in [0, 1): whether it is the full caption,
        and which of the others. dropped: (N,) bool: the empty caption instead.
        """
        others = self.counts[indices] - 1
        which = 1 + (uniform[:, 1] * others).long()
        full = (uniform[:, 0] < self.config.full_caption) | (others == 0)
        rows = self.starts[indices] + torch.where(full, 0, which)
        return torch.where(dropped[:, None], self.ids([""]), self.table[rows])

    def transformer(self, width: int, *, pooled: bool = False) -> TextTransformerConfig:
        """The text transformer for a denoiser whose context has this width; pooled: and that adds
        the mean of a text's tokens to its time embedding."""
        return architecture(self.config, len(self.tokenizer), width, pooled=pooled)

    def encoder(self, network: TextTransformer) -> TextEncoder:
        """The conditioner of a model."""
        pooled = network.config.pooled
        return TextEncoder(model=network, tokenizer=self.tokenizer, pooled=pooled)

    def examples(self, count: int) -> list[str]:
        """Full captions for previews, evenly spread over the data set."""
        return [self.full[place] for place in self.places(count).tolist()]

    def places(self, count: int) -> Tensor:
        """The images of `examples`: (count,) int64."""
        return torch.linspace(0, len(self.full) - 1, count).long()

    @torch.no_grad()
    def conditions(
        self, network: TextTransformer, texts: Sequence[str], *, guided: bool
    ) -> tuple[list[Condition], list[Condition] | None]:
        """Conditions of texts, and if guided of as many empty ones; equal texts share an object."""
        device = next(network.parameters()).device

        def condition(text: str) -> Condition:
            context, pooled = network.encode_both(self.ids([text]).to(device))
            return Condition(context=context, added=pooled)

        made = {text: condition(text) for text in dict.fromkeys([*texts, ""])}
        return [made[text] for text in texts], [made[""]] * len(texts) if guided else None


def check_text(text: TextConfig, model: Any, source: str, captioned: Sequence[str]) -> None:
    """Raise ValueError unless a run's text, denoiser and data belong together."""
    added = model.added_condition_dim
    if added is not None and (not text.layers or added != model.context_dim):
        raise ValueError(
            "training adds no vector to the time embedding but the mean of a caption's tokens, got "
            f"added_condition_dim={added} with {text.layers} text layers; set it to the model's "
            f"context_dim, {model.context_dim}, or leave it out"
        )
    if (model.context_dim is None) != (text.layers == 0):
        raise ValueError(
            f"a denoiser that attends to text and a text transformer need each other, got "
            f"context_dim={model.context_dim} and {text.layers} text layers; set model context_dim "
            "and text layers, or neither"
        )
    if not text.layers:
        return
    if source not in captioned:
        raise ValueError(
            f"training on text needs captions, and data source {source!r} has none; use "
            f"{' or '.join(captioned)}"
        )
    wanted = getattr(model, "context_tokens", text.tokens)
    if wanted != text.tokens:
        raise ValueError(
            f"text tokens must be {wanted}, the denoiser's context_tokens, got {text.tokens}"
        )
    if model.context_dim % text.heads:
        raise ValueError(
            f"model context_dim must be a multiple of text heads, got {model.context_dim} and "
            f"{text.heads}"
        )
