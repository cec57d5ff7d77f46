"""Prompts at the edges of Unicode: what their tokens are by hand, or an error."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastdiff.generate.job import ImageToImageJob, InterpolationJob, TextJob, TextSettings
from fastdiff.models.prompts import Fragment, read_prompt
from fastdiff.models.tokenizer import BYTES, SPECIALS, Tokenizer

PROMPTS = {
    "empty": "",
    "only spaces": " \t\n\u00a0\u3000 ",
    "10,000 words": "cat " * 10_000,
    "emoji of several code points": "🐈‍⬛ 👩🏽‍🚀 🏴󠁧󠁢󠁷󠁬󠁳󠁿 ❤️",
    "right to left": "שלום עולם \u202eقطط\u202c",
    "control characters": "a\x07b \x1b[31m\x7f",
    "NUL": "a\0b\0",
    "combining": "e\u0301 z\u0337\u0353a\u0351l\u0322g\u0321o\u0338 नमस्ते",
    "invisible": "a\u200bb\ufeff\u2060",
    "not characters": "\ufffe\uffff\U0010ffff",
}


@pytest.mark.parametrize("case", PROMPTS)
def test_our_tokens_are_the_bytes_of_the_text(case: str) -> None:
    """Only white space is left out, and no text is cut: without merges, a token is a byte."""
    text, tokenizer = PROMPTS[case], Tokenizer([])
    first, *tokens, last = tokenizer(text)["input_ids"]
    assert (first, last) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    found = bytes(t - len(SPECIALS) for t in tokens if t != BYTES + len(SPECIALS))
    expected = unicodedata.normalize("NFKC", text).lower()
    assert found.decode() == "".join(expected.split())


def test_composed_and_combining_characters_are_one() -> None:
    tokenizer = Tokenizer([])
    assert tokenizer("e\u0301") == tokenizer("\u00e9") == tokenizer("\u00c9")


@pytest.mark.parametrize("prompt", ["(:1.3)", "((:1.3))", "[]", "((()))", "(:0)"])
def test_weights_of_nothing_are_the_empty_prompt(prompt: str) -> None:
    assert read_prompt(prompt) == read_prompt("") == [[]]
    assert read_prompt(prompt, emphasis=False) == [[Fragment(prompt)]]


IMAGE = torch.zeros(3, 8, 8)
JOBS: dict[str, Callable[[str], Any]] = {
    "txt2img": lambda prompt: TextJob(prompt=prompt),
    "img2img": lambda prompt: ImageToImageJob(image=IMAGE, prompt=prompt),
    "interpolate": lambda prompt: InterpolationJob(prompt="a", to_prompt=prompt),
    "negative": lambda prompt: TextSettings(negative=prompt),
}


@pytest.mark.parametrize("kind", JOBS)
@pytest.mark.parametrize("prompt", ["\ud800", "a\udcff", "\udc00\ud800"])
def test_lone_surrogates_are_refused_before_a_model_is_there(kind: str, prompt: str) -> None:
    """From "\\\\ud800" in JSON, or from a command line that is not UTF-8."""
    at = next(i for i, c in enumerate(prompt) if 0xD800 <= ord(c) <= 0xDFFF)
    with pytest.raises(ValueError, match=f"not valid Unicode at character {at}, got .*in UTF-8"):
        JOBS[kind](prompt)
