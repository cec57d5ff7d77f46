"""Encoded prompts equal diffusers' and, where it has no such thing, the transformer run by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff.models.text import MAX_CHUNKS, EncodedPrompt, TextEncoder, count_chunks, encode_prompt
from tests.support import diffusers_models
from tests.support.diffusers_models import text_encoder
from tests.support.peers import import_diffusers

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
PROMPTS = {
    "words": "a photo of a red cat",
    "empty": "",
    "space": "  ",
    "unicode": "猫 🐈‍⬛ naïve Ω ﷽ e\u0301",
    "brackets": "a (red) [cat] \\(dog\\)",
    "marks": "a <|endoftext|> cat <|startoftext|>",
    "73": "cat " * 73,
    "75": "cat " * 75,
}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return diffusers_models.tokenizer(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def other_words(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Padded with "!", as Stable Diffusion 2 and XL's second encoder."""
    return diffusers_models.tokenizer(tmp_path_factory.mktemp("other"), pad_token="!")


def plain(words: Any, dtype: torch.dtype = torch.float64, **change: Any) -> TextEncoder:
    return TextEncoder(model=text_encoder(words).to(dtype), tokenizer=words, **change)


def xl(words: Any, other_words: Any, dtype: torch.dtype = torch.float64) -> list[TextEncoder]:
    second = text_encoder(other_words, width=24, projection=16).to(dtype)
    return [
        plain(words, dtype, skip=1, final_norm=False),
        TextEncoder(model=second, tokenizer=other_words, skip=1, final_norm=False, pooled=True),
    ]


def peer(words: Any, model: Any) -> Any:
    name = "StableDiffusionPipeline"
    return getattr(import_diffusers(name), name)(
        vae=None,
        text_encoder=model,
        tokenizer=words,
        unet=None,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def xl_peer(encoders: list[TextEncoder]) -> Any:
    name = "StableDiffusionXLPipeline"
    return getattr(import_diffusers(name), name)(
        vae=None,
        text_encoder=encoders[0].model,
        text_encoder_2=encoders[1].model,
        tokenizer=encoders[0].tokenizer,
        tokenizer_2=encoders[1].tokenizer,
        unet=None,
        scheduler=None,
    )


def assert_equal(ours: Tensor | None, theirs: Tensor) -> None:
    assert ours is not None
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error <= TOLERANCE[ours.dtype], f"relative error {error:.1e}"


def rows(words: Any, tokens: list[int]) -> Tensor:
    """One chunk as the transformer takes it, made by hand."""
    ids = [words.bos_token_id, *tokens, words.eos_token_id]
    return torch.tensor([ids + [words.pad_token_id] * (77 - len(ids))])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("pad", ["eos", "!"])
def test_stable_diffusion(
    words: Any, other_words: Any, prompt: str, dtype: torch.dtype, pad: str
) -> None:
    """1 pads with the end-of-text token, 2 with "!"."""
    encoder = plain(words if pad == "eos" else other_words, dtype)
    ours = encode_prompt([encoder], prompt, emphasis=False)
    theirs, _ = peer(encoder.tokenizer, encoder.model).encode_prompt(prompt, "cpu", 1, False)
    assert_equal(ours.tokens, theirs)
    assert ours.pooled is None


@pytest.mark.parametrize("skip", [1, 2])
def test_clip_skip(words: Any, skip: int) -> None:
    encoder = plain(words)
    ours = encode_prompt([encoder], "a red cat", clip_skip=skip)
    encoder.model.text_model = encoder.model  # where diffusers still looks for the last norm
    theirs, _ = peer(words, encoder.model).encode_prompt(
        "a red cat", "cpu", 1, False, clip_skip=skip
    )
    del encoder.model.text_model
    assert_equal(ours.tokens, theirs)
    assert not torch.equal(ours.tokens, encode_prompt([encoder], "a red cat").tokens)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_stable_diffusion_xl(words: Any, other_words: Any, prompt: str, dtype: torch.dtype) -> None:
    encoders = xl(words, other_words, dtype)
    theirs, _, pooled, _ = xl_peer(encoders).encode_prompt(
        prompt, device="cpu", do_classifier_free_guidance=False
    )
    ours = encode_prompt(encoders, prompt, emphasis=False)
    assert_equal(ours.tokens, theirs)
    assert_equal(ours.pooled, pooled)
    zeros = ours.zeros()
    assert zeros.pooled is not None
    assert zeros.tokens.shape == theirs.shape
    assert not zeros.tokens.any()
    assert not zeros.pooled.any()


def test_clip_skip_xl_counts_from_the_penultimate_layer(words: Any, other_words: Any) -> None:
    encoders = xl(words, other_words)
    theirs, *_ = xl_peer(encoders).encode_prompt(
        "a cat", device="cpu", do_classifier_free_guidance=False, clip_skip=1
    )
    assert_equal(encode_prompt(encoders, "a cat", clip_skip=1).tokens, theirs)


@pytest.mark.parametrize("count", [76, 150, 151])
def test_long_prompts_go_in_chunks(words: Any, other_words: Any, count: int) -> None:
    encoders = xl(words, other_words)
    prompt = " ".join(["cat", "red", "sky"][i % 3] for i in range(count))
    chunks = -(-count // 75)
    assert count_chunks(encoders, prompt) == chunks
    ours = encode_prompt(encoders, prompt)
    assert ours.tokens.shape == (1, 77 * chunks, 56)
    ids = words(prompt, add_special_tokens=False).input_ids
    expected, pooled = [], []
    for start in range(0, count, 75):
        parts = []
        for encoder in encoders:
            output = encoder.model(
                rows(encoder.tokenizer, ids[start : start + 75]), output_hidden_states=True
            )
            parts.append(output.hidden_states[-2])
        pooled.append(output.text_embeds)
        expected.append(torch.cat(parts, dim=-1))
    assert_equal(ours.tokens, torch.cat(expected, dim=1))
    assert_equal(ours.pooled, pooled[0])


def test_a_short_prompt_is_filled_up_with_empty_chunks(words: Any) -> None:
    encoder = plain(words)
    one, empty = (encode_prompt([encoder], prompt) for prompt in ("a cat", ""))
    filled = encode_prompt([encoder], "a cat", chunks=3)
    assert_equal(filled.tokens, torch.cat([one.tokens, empty.tokens, empty.tokens], dim=1))


def test_a_break_begins_a_new_chunk(words: Any, other_words: Any) -> None:
    """Padded as a prompt of its own, by both encoders; the pooled vector is the first chunk's."""
    encoders = xl(words, other_words)
    whole = encode_prompt(encoders, "a red cat BREAK blue (sky:1.5)BREAK")
    parts = [encode_prompt(encoders, prompt) for prompt in ("a red cat", "blue (sky:1.5)")]
    assert count_chunks(encoders, "a BREAK b BREAK c") == 3
    assert_equal(whole.tokens, torch.cat([part.tokens for part in parts], dim=1))
    assert parts[0].pooled is not None
    assert_equal(whole.pooled, parts[0].pooled)
    text = encode_prompt(encoders, "a red cat \\BREAK blue sky")
    assert_equal(
        text.tokens, encode_prompt(encoders, "a red cat BREAK blue sky", emphasis=False).tokens
    )


@pytest.mark.parametrize(
    ("prompt", "lengths"),
    [
        ("BREAK cat", [0, 1]),
        ("cat BREAK BREAK cat", [1, 0, 1]),
        ("cat " * 75 + "BREAK sky", [75, 1]),
        ("cat " * 76 + "BREAK sky BREAK", [75, 1, 1]),
    ],
)
def test_chunks_are_cut_as_the_web_ui_cuts_them(
    words: Any, prompt: str, lengths: list[int]
) -> None:
    encoder = plain(words)
    pieces = [encode_prompt([encoder], "cat " * n if n != 1 else "cat") for n in lengths]
    last = "sky" if "sky" in prompt else "cat"
    pieces[-1] = encode_prompt([encoder], last)
    assert count_chunks([encoder], prompt) == len(lengths)
    whole = encode_prompt([encoder], prompt)
    assert_equal(whole.tokens, torch.cat([piece.tokens for piece in pieces], dim=1))


def test_weights_move_vectors_from_the_empty_prompts(words: Any) -> None:
    encoder = plain(words)
    encoded = encode_prompt([encoder], "a (red:1.5) cat [dog] sky \\(x\\)").tokens
    z, empty = (
        encode_prompt([encoder], prompt, emphasis=False).tokens
        for prompt in ("a red cat dog sky (x)", "")
    )
    weights = torch.ones(77, dtype=torch.float64)
    weights[2], weights[4] = 1.5, 1 / 1.1  # BOS, a, red, cat, dog
    assert_equal(encoded, empty + weights[:, None] * (z - empty))
    assert (encoded - z).abs().max() > 0.1
    out = encode_prompt([encoder], "a (red:0) cat").tokens
    assert_equal(out[:, 2], empty[:, 2])


def test_weights_in_every_chunk_and_none_in_the_pooled_vector(words: Any, other_words: Any) -> None:
    encoders = xl(words, other_words)
    many = "cat " * 80
    ours = encode_prompt(encoders, f"{many}(red:2) sky")
    z, empty = (encode_prompt(encoders, prompt) for prompt in (f"{many}red sky", ""))
    expected = z.tokens.clone()
    place = 77 + 1 + 5
    expected[:, place] = 2 * z.tokens[:, place] - empty.tokens[:, 6]
    assert_equal(ours.tokens, expected)
    assert z.pooled is not None
    assert_equal(ours.pooled, z.pooled)


def test_the_longest_prompt(words: Any) -> None:
    encoder = plain(words, torch.float32)
    longest = encode_prompt([encoder], "cat " * (75 * MAX_CHUNKS))
    assert longest.tokens.shape == (1, 77 * MAX_CHUNKS, 32)
    with pytest.raises(ValueError, match="may have at most 4,800 tokens, got 10,000; shorten it"):
        encode_prompt([encoder], "cat " * 10_000)
    with pytest.raises(ValueError, match="got 4,801 \\(each BREAK pads a chunk\\); shorten it"):
        encode_prompt([encoder], "cat BREAK " * MAX_CHUNKS + "cat")


def test_prompts_and_encoders_that_do_not_fit(words: Any) -> None:
    encoder = plain(words)
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ([encoder], {"prompt": "a \udcff cat"}, "not valid Unicode at character 2"),
        ([encoder], {"prompt": None}, "must be text, got NoneType"),
        ([encoder], {"prompt": "a", "clip_skip": 3}, r"clip_skip must be 0 to 2 .* got 3"),
        ([encoder], {"prompt": "a", "clip_skip": -1}, "clip_skip must be 0 to 2"),
        (
            [encoder],
            {"prompt": "cat " * 80, "chunks": 1},
            "must be at least 2 for this prompt, got 1",
        ),
        ([], {"prompt": "a"}, "expected a text encoder"),
        ([TextEncoder(model=encoder.model)], {"prompt": "a"}, "CLIPTextModel has no tokenizer"),
    ]
    for encoders, call, message in cases:
        with pytest.raises(ValueError, match=message):
            encode_prompt(encoders, **call)


def test_nothing_is_trained_or_drawn(words: Any) -> None:
    encoder = plain(words)
    encoder.model.requires_grad_(True)
    first, second = (encode_prompt([encoder], "a (red:2) cat") for _ in range(2))
    assert isinstance(first, EncodedPrompt)
    assert torch.equal(first.tokens, second.tokens)
    assert not first.tokens.requires_grad


def test_transformers_four_layout(words: Any, tmp_path: Path) -> None:
    """Before transformers 5, a CLIPTextModel keeps its layers in `text_model`."""
    encoder = plain(words)

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text_model, self.config = encoder.model, encoder.model.config

        def forward(self, *args: Any, **options: Any) -> Any:
            return self.text_model(*args, **options)

    wrapped = TextEncoder(model=Wrapped(), tokenizer=words)
    assert_equal(encode_prompt([wrapped], "a cat").tokens, encode_prompt([encoder], "a cat").tokens)
