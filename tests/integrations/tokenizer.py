"""A tokenizer of single letters and a small random text encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.peers import import_transformers
from tests.support.tiny import randomize

LETTERS = [chr(code) for code in range(97, 123)]
WORDS = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(letter + "</w>" for letter in LETTERS)]


def tokenizer(folder: Path) -> Any:
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(WORDS)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    kind = import_transformers("CLIPTokenizer").CLIPTokenizer
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    return kind(*files, model_max_length=77)


def text_encoder(width: int, seed: int = 0) -> Any:
    """CLIP's of one layer, in eval mode."""
    transformers = import_transformers("CLIPTextConfig", "CLIPTextModel")
    config = transformers.CLIPTextConfig(
        vocab_size=len(WORDS), hidden_size=width, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=77, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return randomize(transformers.CLIPTextModel(config), seed).eval()
