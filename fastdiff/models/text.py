"""Encode prompts with CLIP text encoders into the tokens that a denoiser attends to.

    prompt -> fragments with weights -> tokens -> chunks [BOS, 75 tokens, EOS] -> encoder
           -> (chunks * 77, D), the encoders' outputs concatenated along D

``BREAK`` ends a chunk early; the rest of it is padded, like the last chunk.

The text transformers are Hugging Face's (`transformers`, an optional extra); this module does not
import it.

A weight w scales the difference between a token's vector z and the encoder's vector z_empty at the
same position for an empty prompt: z' = z_empty + w (z - z_empty). A weight of 0 removes the word
and 1 has no effect. The mean is not restored afterwards. (The web UI that the syntax comes from
first scaled z and then restored the mean of all vectors, which divides by a mean that is near 0 for
Stable Diffusion XL.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastdiff.models.prompts import Fragment, read_prompt

MAX_CHUNKS = 64
"""Longest prompt, in chunks of 75 tokens; every chunk adds keys to every cross-attention."""


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """A text transformer, its tokenizer, and which of its outputs condition the U-Net."""

    model: nn.Module
    """transformers' CLIPTextModel or CLIPTextModelWithProjection."""
    tokenizer: Any | None = None
    """transformers' CLIPTokenizer; None if the file contained weights but no vocabulary."""
    skip: int = 0
    """Layers skipped at the end: 0 uses the last (Stable Diffusion 1), 1 the one before (XL)."""
    final_norm: bool = True
    """Whether the final LayerNorm is applied; XL does not apply it."""
    pooled: bool = False
    """Whether its `text_embeds` also condition the U-Net: the projected end-of-text vector of XL's
    second encoder, the mean of the tokens of a `TextTransformer`."""


@dataclass(frozen=True)
class EncodedPrompt:
    """The vectors of an encoded prompt.

    tokens: (1, chunks * 77, D), the encoders' vectors concatenated along D. pooled: (1, P), the
    projected end-of-text vector of the first chunk; None if no encoder provides one. mask:
    (1, tokens) bool, False for padding; None if the denoiser was trained to read padding too.
    """

    tokens: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None

    def zeros(self) -> EncodedPrompt:
        """Zeros of the same shapes, with which Stable Diffusion XL was trained for "no prompt"."""
        pooled = None if self.pooled is None else torch.zeros_like(self.pooled)
        return EncodedPrompt(torch.zeros_like(self.tokens), pooled, self.mask)


class JointEncoder(Protocol):
    """A text encoder of fixed length that was trained together with its denoiser."""

    @property
    def model(self) -> nn.Module:
        """The network, with a `config` that has a `hidden_size`."""

    @property
    def tokenizer(self) -> Any | None:
        """What turns text into ids; None if the file contained weights but no vocabulary."""

    @property
    def facts(self) -> list[Any]:
        """What the shapes of the weights do not determine, for the hash of a model."""

    def encode(self, prompt: str) -> EncodedPrompt:
        """Encode one prompt.

        Raises:
            ValueError: it is too long, not text, or there is no tokenizer.
        """


AnyEncoder = TextEncoder | JointEncoder


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
        encoders: the encoders, in the order in which their vectors are concatenated.
        prompt: any text, which may be empty.
        chunks: pad with empty chunks to this number, because a prompt and its negative prompt need
            the same number; None: as many as the prompt needs (`count_chunks`).
        clip_skip: layers to skip in addition to the encoder's own `skip`; the web UI's "clip skip
            2" is 1.
        emphasis: read brackets as weights and ``BREAK`` as the end of a chunk; False: treat
            everything as text, as diffusers does.

    Raises:
        ValueError: the prompt is too long, not text, or uses unsupported syntax
            (`fastdiff.models.prompts`); an encoder has no tokenizer; or clip_skip leaves no layer.
    """
    if not encoders:
        raise ValueError(
            "expected a text encoder for the prompt, got none; load a checkpoint that contains one"
        )
    parts = read_prompt(prompt, emphasis=emphasis)
    rows = [_tokenize(encoder, parts) for encoder in encoders]
    needed = max(map(len, rows))
    if chunks is not None and chunks < needed:
        raise ValueError(
            f"chunks must be at least {needed} for this prompt, got {chunks}; None chooses it"
        )
    made = [
        _encode(encoder, tokens, chunks or needed, clip_skip)
        for encoder, tokens in zip(encoders, rows, strict=True)
    ]
    pooled = [vector for _, vector in made if vector is not None]
    return EncodedPrompt(
        torch.cat([tokens for tokens, _ in made], dim=-1), pooled[-1] if pooled else None
    )


def count_chunks(encoders: Sequence[TextEncoder], prompt: str, *, emphasis: bool = True) -> int:
    """Number of chunks of 75 tokens that a prompt needs: at least 1, the maximum over the encoders.

    Raises:
        ValueError: as for `encode_prompt`.
    """
    parts = read_prompt(prompt, emphasis=emphasis)
    return max(len(_tokenize(encoder, parts)) for encoder in encoders)


Token = tuple[int, float]
"""(id, weight)"""


def _tokenize(encoder: TextEncoder, parts: Sequence[Sequence[Fragment]]) -> list[list[Token]]:
    """The tokens of each chunk, without BOS, EOS and padding; one empty chunk if there is no text.

    Each part begins a new chunk. As in the web UI, an empty part is an empty chunk unless it is the
    last one.
    """
    if encoder.tokenizer is None:
        raise ValueError(
            f"the {type(encoder.model).__name__} has no tokenizer, only weights; "
            "give the folder of the tokenizer that it was trained with"
        )
    size, several = _length(encoder) - 2, _tokens_of_several_vectors(encoder.tokenizer)
    chunks: list[list[Token]] = []
    for number, fragments in enumerate(parts, start=1):
        tokens: list[Token] = []
        for fragment in fragments:
            # verbose=False: otherwise the tokenizer warns about more than 77 tokens, which we split
            ids = encoder.tokenizer(fragment.text, add_special_tokens=False, verbose=False)
            for token in ids["input_ids"]:
                tokens += [(each, fragment.weight) for each in several.get(token, (token,))]
        pieces = [tokens[start : start + size] for start in range(0, len(tokens), size)]
        chunks += pieces or ([[]] if number < len(parts) or not chunks else [])
    if len(chunks) > MAX_CHUNKS:
        taken = (len(chunks) - 1) * size + len(chunks[-1])
        filled = " (each BREAK pads a chunk)" if len(parts) > 1 else ""
        raise ValueError(
            f"a prompt may have at most {MAX_CHUNKS * size:,} tokens, got {taken:,}{filled}; "
            "shorten it"
        )
    return chunks


def _tokens_of_several_vectors(tokenizer: Any) -> dict[int, list[int]]:
    """The id of a textual inversion NAME -> those of NAME, NAME_1, ..., which it stands for."""
    added = getattr(tokenizer, "added_tokens_encoder", {})
    found: dict[int, list[int]] = {}
    for name, first in added.items():
        ids = [first]
        while (further := added.get(f"{name}_{len(ids)}")) is not None:
            ids.append(further)
        if len(ids) > 1:
            found[first] = ids
    return found


def _length(encoder: TextEncoder) -> int:
    """Number of tokens that the transformer reads at once, including BOS and EOS: 77."""
    return encoder.model.config.max_position_embeddings  # type: ignore[union-attr,return-value]


@torch.no_grad()
def _encode(
    encoder: TextEncoder, rows: Sequence[Sequence[Token]], chunks: int, clip_skip: int
) -> tuple[Tensor, Tensor | None]:
    """One encoder's vectors (1, chunks * 77, D), and its pooled vector (1, P) or None."""
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
    """BOS, the tokens, EOS, and padding to the full length."""
    tokenizer = encoder.tokenizer
    assert tokenizer is not None
    ids = [tokenizer.bos_token_id, *tokens, tokenizer.eos_token_id]
    return ids + [tokenizer.pad_token_id] * (_length(encoder) - len(ids))


def _run(encoder: TextEncoder, ids: Tensor, clip_skip: int) -> tuple[Tensor, Tensor | None]:
    """ids: (N, 77) -> vectors (N, 77, D) of the selected layer, pooled vectors (N, P) or None."""
    skip = encoder.skip + clip_skip
    layers: int = encoder.model.config.num_hidden_layers  # type: ignore[union-attr,assignment]
    if clip_skip < 0 or skip >= layers:
        raise ValueError(
            f"clip_skip must be 0 to {layers - 1 - encoder.skip} for this text encoder with "
            f"{layers} layers, got {clip_skip}"
        )
    output = encoder.model(ids, output_hidden_states=True)
    vectors = output.hidden_states[-1 - skip]
    if encoder.final_norm:
        # transformers before 5 wraps the layers of CLIPTextModel in `text_model`
        layered: Any = getattr(encoder.model, "text_model", encoder.model)
        vectors = layered.final_layer_norm(vectors)
    return vectors, output.text_embeds if encoder.pooled else None
