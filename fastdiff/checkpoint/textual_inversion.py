"""Textual inversion: learned vectors of new tokens, added to a model's text encoder when it loads.

Gal et al. 2022 (arXiv 2208.01618), section 4: a new word's embedding v* stands for a concept. Read
are diffusers' files, one tensor named after its token, (D,) or (n, D), and AUTOMATIC1111's,
`emb_params` or `string_to_param`, (n, D). The n vectors become the tokens NAME, NAME_1, ..., as
diffusers names them; NAME in a prompt is replaced by all of them (`fastdiff.models.text`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.checkpoint.formats import open_weights
from fastdiff.checkpoint.model import Model
from fastdiff.checkpoint.weights import some
from fastdiff.models.text import TextEncoder


def read_spec(spec: str) -> tuple[str, Path]:
    """A token and its file from NAME=FILE.

    >>> read_spec("<cat-toy>=cat.safetensors")
    ('<cat-toy>', PosixPath('cat.safetensors'))

    Raises:
        ValueError: a part is missing, or the name contains spaces.
    """
    name, found, place = spec.partition("=")
    if not found or not name or not place or name.split() != [name]:
        raise ValueError(
            f"embedding must be NAME=FILE with a name without spaces, got {spec!r:.80}; the name "
            "is the word that stands for the embedding in prompts"
        )
    return name, Path(place)


def read_vectors(path: Path) -> Tensor:
    """The vectors of a file, (n, D), in its dtype.

    Raises:
        ValueError: the file does not contain one embedding.
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; give a textual inversion file")
    weights = open_weights(path)
    keys = [*weights.places]
    if len(keys) != 1:
        raise ValueError(
            f"{path}: expected one tensor with the vectors of a token, got {len(keys)} "
            f"({some(keys)}); give a textual inversion for Stable Diffusion 1 or 2"
        )
    vectors = weights.tensor(keys[0])
    vectors = vectors[None] if vectors.ndim == 1 else vectors
    if vectors.ndim != 2 or not vectors.numel() or not vectors.is_floating_point():
        raise ValueError(
            f"{path}: {keys[0]} must be (D,) or (n, D) and floating point, got "
            f"{tuple(vectors.shape)} in {vectors.dtype}; give a textual inversion file"
        )
    return vectors


def add_embedding(model: Model, name: str, path: Path) -> Model:
    """Add a token to a model's text encoder, in place; returns the model with its provenance.

    Args:
        model: with one CLIP text encoder and its tokenizer (Stable Diffusion 1 and 2).
        name: the word for it in prompts.
        path: a .safetensors, .bin or .pt file.

    Raises:
        ValueError: the model has no such text encoder, the vectors have another width, or the
            tokenizer already has a token of this name.
        FileNotFoundError: there is no such file.
    """
    encoder = _encoder_of(model)
    tokenizer: Any = encoder.tokenizer
    vectors = read_vectors(path)
    table = _table(encoder)
    if vectors.shape[1] != table.embedding_dim:
        raise ValueError(
            f"{path} has vectors of width {vectors.shape[1]}, the text encoder's have "
            f"{table.embedding_dim}; use an embedding that was trained for this kind of model"
        )
    names = [name, *(f"{name}_{index}" for index in range(1, len(vectors)))]
    vocabulary = tokenizer.get_vocab()
    if taken := [each for each in names if each in vocabulary]:
        raise ValueError(
            f"the tokenizer already has the token {taken[0]!r:.60}; choose another name for {path}"
        )
    tokenizer.add_tokens(names)
    _set_rows(encoder, table, tokenizer.convert_tokens_to_ids(names), vectors)
    added = [*model.provenance.get("embedding", ()), f"{name}={path}"]
    return replace(model, provenance={**model.provenance, "embedding": added}, stored_hash="")


def add_all(model: Model, specs: Sequence[str]) -> Model:
    """Add embeddings given as NAME=FILE, in their order."""
    for spec in specs:
        model = add_embedding(model, *read_spec(spec))
    return model


def _encoder_of(model: Model) -> TextEncoder:
    encoders = [encoder for encoder in model.text_encoders if isinstance(encoder, TextEncoder)]
    if len(encoders) != 1 or len(model.text_encoders) != 1:
        raise ValueError(
            f"an embedding needs a model with one CLIP text encoder, got {len(encoders)} of "
            f"{len(model.text_encoders)} text encoders; leave embedding out"
        )
    if encoders[0].tokenizer is None:
        raise ValueError(
            "an embedding needs the tokenizer of the model, which was not loaded; give tokenizer"
        )
    return encoders[0]


def _table(encoder: TextEncoder) -> nn.Embedding:
    model: Any = encoder.model
    table: nn.Embedding = model.get_input_embeddings()
    return table


def _set_rows(
    encoder: TextEncoder, table: nn.Embedding, ids: Sequence[int], vectors: Tensor
) -> None:
    """Give the encoder a table of embeddings with these rows. vectors: (len(ids), D)."""
    old = table.weight
    rows = max(len(old), max(ids) + 1)
    new = old.detach().new_zeros(rows, table.embedding_dim)
    new[: len(old)] = old.detach()
    new[torch.tensor(ids, device=new.device)] = vectors.to(new)
    table.weight = nn.Parameter(new, requires_grad=old.requires_grad)
    table.num_embeddings = rows
    model: Any = encoder.model
    model.config.vocab_size = rows
