"""Prompts to the tokens that a denoiser attends to, through CLIP text encoders.

    prompt -> fragments with weights -> tokens -> chunks [BOS, 75 tokens, EOS] -> encoder
           -> (chunks * 77, D), the encoders' outputs side by side along D

``BREAK`` ends a chunk early: its rest is padding, as for the last one.

The transformers themselves are Hugging Face's (`transformers`, an optional extra); nothing here
imports it.

A weight w moves a token's vector along the line from what the encoder returns there for an empty
prompt, z' = z_empty + w (z - z_empty): 0 takes the word out, 1 leaves it. No mean is restored
afterwards. (Scaling z and restoring the mean of all vectors, as the web UI that the syntax comes
from did at first, divides by a mean that is near 0 for Stable Diffusion XL.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.models.prompts import Fragment, read_prompt

MAX_CHUNKS = 64
"""Longest prompt, in chunks of 75 tokens: each is a column of keys in every cross-attention."""


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """A text transformer, its tokenizer, and what of its output conditions the U-Net."""

    model: nn.Module
    """transformers' CLIPTextModel or CLIPTextModelWithProjection."""
    tokenizer: Any | None = None
    """transformers' CLIPTokenizer; None where a file holds weights and no vocabulary."""
    skip: int = 0
    """Layers left out at the end: 0 takes the last (Stable Diffusion 1), 1 the one before (XL)."""
    final_norm: bool = True
    """Whether the final LayerNorm follows; XL leaves it out."""
    pooled: bool = False
    """Whether its projected end-of-text vector conditions the U-Net too (XL's second encoder)."""


@dataclass(frozen=True)
class EncodedPrompt:
    """What a prompt becomes.

    tokens: (1, chunks * 77, D), the encoders' vectors joined along D. pooled: (1, P), the projected
    end-of-text vector of the first chunk; None where no encoder gives one.
    """

    tokens: Tensor
    pooled: Tensor | None = None

    def zeros(self) -> EncodedPrompt:
        """The same shapes, all zeros: what Stable Diffusion XL was trained with for "no prompt"."""
        pooled = None if self.pooled is None else torch.zeros_like(self.pooled)
        return EncodedPrompt(torch.zeros_like(self.tokens), pooled)


def encode_prompt(
    encoders: Sequence[TextEncoder],
    prompt: str,
    *,
    chunks: int | None = None,
    clip_skip: int = 0,
    emphasis: bool = True,
) -> EncodedPrompt:
    """Encode one prompt of any length up to MAX_CHUNKS * 75 tokens.

    Args:
        encoders: in the order in which their vectors are joined.
        prompt: any text, the empty one too.
        chunks: fill up with empty chunks to this many, as a prompt and its negative one need the
            same number; None takes what the prompt needs (`count_chunks`).
        clip_skip: layers left out beyond the encoder's own `skip`; the web UI's "clip skip 2" is 1.
        emphasis: read brackets as weights and ``BREAK`` as the end of a chunk; False takes all as
            text, as diffusers does.

    Raises:
        ValueError: the prompt is too long, not text or in a syntax that is not supported
            (`fastdiff.models.prompts`), an encoder has no tokenizer, or clip_skip leaves no layer.
    """
    if not encoders:
        raise ValueError(
            "expected a text encoder for the prompt, got none; load a checkpoint that has one"
        )
    parts = read_prompt(prompt, emphasis=emphasis)
    rows = [_tokenize(encoder, parts) for encoder in encoders]
    needed = max(map(len, rows))
    if chunks is not None and chunks < needed:
        raise ValueError(f"the prompt needs {needed} chunks, got chunks={chunks}; give more")
    made = [
        _encode(encoder, tokens, chunks or needed, clip_skip)
        for encoder, tokens in zip(encoders, rows, strict=True)
    ]
    pooled = [vector for _, vector in made if vector is not None]
    return EncodedPrompt(
        torch.cat([tokens for tokens, _ in made], dim=-1), pooled[-1] if pooled else None
    )


def count_chunks(encoders: Sequence[TextEncoder], prompt: str, *, emphasis: bool = True) -> int:
    """Chunks of 75 tokens that a prompt takes, at least 1; the encoders' largest number.

    Raises:
        ValueError: as `encode_prompt`.
    """
    parts = read_prompt(prompt, emphasis=emphasis)
    return max(len(_tokenize(encoder, parts)) for encoder in encoders)


Token = tuple[int, float]
"""(id, weight)"""


def _tokenize(encoder: TextEncoder, parts: Sequence[Sequence[Fragment]]) -> list[list[Token]]:
    """The tokens of each chunk, without BOS, EOS and padding; one empty chunk for no text.

    Each part begins a chunk. As in the web UI, an empty part is an empty chunk, but for the last.
    """
    if encoder.tokenizer is None:
        raise ValueError(
            f"the {type(encoder.model).__name__} has no tokenizer, got weights alone; "
            "give the folder of the tokenizer that it was trained with"
        )
    size = _length(encoder) - 2
    chunks: list[list[Token]] = []
    for number, fragments in enumerate(parts, start=1):
        tokens: list[Token] = []
        for fragment in fragments:
            # verbose: the tokenizer would log that more than 77 do not fit, which is our business
            ids = encoder.tokenizer(fragment.text, add_special_tokens=False, verbose=False)
            tokens += [(token, fragment.weight) for token in ids["input_ids"]]
        pieces = [tokens[start : start + size] for start in range(0, len(tokens), size)]
        chunks += pieces or ([[]] if number < len(parts) or not chunks else [])
    if len(chunks) > MAX_CHUNKS:
        taken = (len(chunks) - 1) * size + len(chunks[-1])
        filled = ", as each BREAK fills its chunk" if len(parts) > 1 else ""
        raise ValueError(
            f"a prompt may have {MAX_CHUNKS * size:,} tokens, got {taken:,}{filled}; shorten it"
        )
    return chunks


def _length(encoder: TextEncoder) -> int:
    """Tokens the transformer reads at once, BOS and EOS included: 77."""
    return encoder.model.config.max_position_embeddings  # type: ignore[union-attr,return-value]


@torch.no_grad()
def _encode(
    encoder: TextEncoder, rows: Sequence[Sequence[Token]], chunks: int, clip_skip: int
) -> tuple[Tensor, Tensor | None]:
    """One encoder's vectors (1, chunks * 77, D) and, if it gives one, the pooled vector (1, P)."""
    rows = [*rows, *[[]] * (chunks - len(rows))]
    device = next(encoder.model.parameters()).device
    weights = torch.ones(chunks, _length(encoder), dtype=torch.float64)
    for row, tokens in zip(weights, rows, strict=True):
        row[1 : len(tokens) + 1] = row.new_tensor([weight for _, weight in tokens])
    ids = torch.tensor([_with_marks(encoder, [token for token, _ in row]) for row in rows])
    vectors, pooled = _run(encoder, ids.to(device), clip_skip)  # (chunks, 77, D)
    if bool((weights != 1).any()):
        empty, _ = _run(encoder, torch.tensor([_with_marks(encoder, [])], device=device), clip_skip)
        vectors = empty + weights.to(vectors)[..., None] * (vectors - empty)
    return vectors.flatten(0, 1)[None], None if pooled is None else pooled[:1]


def _with_marks(encoder: TextEncoder, tokens: list[int]) -> list[int]:
    """BOS, the tokens, EOS, and padding to the length."""
    tokenizer = encoder.tokenizer
    assert tokenizer is not None
    ids = [tokenizer.bos_token_id, *tokens, tokenizer.eos_token_id]
    return ids + [tokenizer.pad_token_id] * (_length(encoder) - len(ids))


def _run(encoder: TextEncoder, ids: Tensor, clip_skip: int) -> tuple[Tensor, Tensor | None]:
    """ids: (N, 77) -> the vectors (N, 77, D) of the chosen layer, pooled (N, P) or None."""
    skip = encoder.skip + clip_skip
    layers: int = encoder.model.config.num_hidden_layers  # type: ignore[union-attr,assignment]
    if clip_skip < 0 or skip >= layers:
        raise ValueError(
            f"clip_skip must lie in 0 to {layers - 1 - encoder.skip} for this text encoder of "
            f"{layers} layers, got {clip_skip}"
        )
    output = encoder.model(ids, output_hidden_states=True)
    vectors = output.hidden_states[-1 - skip]
    if encoder.final_norm:
        # transformers before 5 wraps the layers of CLIPTextModel in `text_model`
        layered: Any = getattr(encoder.model, "text_model", encoder.model)
        vectors = layered.final_layer_norm(vectors)
    return vectors, output.text_embeds if encoder.pooled else None
