"""The jointly trained text transformer against its formula, and as a model's text encoder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.models.text import TextEncoder, encode_prompt
from fastdiff.models.text_transformer import TextTransformer, TextTransformerConfig
from fastdiff.models.tokenizer import Tokenizer
from tests.models.test_tokenizer import LEARNED

CONFIG = TextTransformerConfig(
    vocab_size=len(LEARNED),
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=16,
)


@pytest.fixture
def model() -> TextTransformer:
    torch.manual_seed(0)
    network = TextTransformer(CONFIG)
    for parameter in network.parameters():
        parameter.data.normal_(std=0.3)
    return network.eval().requires_grad_(False)


def by_formula(ids: Tensor, p: dict[str, Tensor], heads: int, layers: int) -> Tensor:
    """Pre-norm blocks as in x-transformers, in plain PyTorch."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], 1e-5)

    x = p["token_embedding.weight"][ids] + p["position_embedding"][: ids.shape[1]]
    for number in range(layers):
        at = f"layers.{number}"
        qkv = norm(x, f"{at}.norm1") @ p[f"{at}.attention.qkv.weight"].T
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)  # no mask: padding is seen
        mixed = (weights @ v).transpose(1, 2).flatten(2)
        x = x + mixed @ p[f"{at}.attention.out.weight"].T + p[f"{at}.attention.out.bias"]
        h = norm(x, f"{at}.norm2") @ p[f"{at}.ff.proj.weight"].T + p[f"{at}.ff.proj.bias"]
        value, gate = h.chunk(2, dim=-1)
        h = value * F.gelu(gate)
        x = x + h @ p[f"{at}.ff.out.weight"].T + p[f"{at}.ff.out.bias"]
    return norm(x, "final_layer_norm")


def test_it_is_its_formula(model: TextTransformer) -> None:
    ids = torch.randint(len(LEARNED), (3, 16), generator=torch.Generator().manual_seed(1))
    wide = {name: value.double() for name, value in model.state_dict().items()}
    expected = by_formula(ids, wide, heads=4, layers=2)
    torch.testing.assert_close(model.encode(ids).double(), expected, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(model.double().encode(ids), expected, atol=1e-12, rtol=1e-12)


def test_the_pooled_text_is_the_mean_of_its_words(model: TextTransformer) -> None:
    """Start and end count, padding does not; as context tokens they stay what they were."""
    pooled = TextTransformer(replace(CONFIG, pooled=True)).eval()
    pooled.load_state_dict(model.state_dict())
    ids = torch.tensor([[1, 9, 8, 7, 2, *[0] * 11], [1, 2, *[0] * 14]])
    tokens, mean = pooled.encode_both(ids)
    assert mean is not None
    torch.testing.assert_close(mean, torch.stack([tokens[0, :5].mean(0), tokens[1, :2].mean(0)]))
    torch.testing.assert_close(tokens, model.encode(ids))
    assert model.encode_both(ids)[1] is None
    encoder = TextEncoder(model=pooled, tokenizer=Tokenizer(LEARNED.merges), pooled=True)
    encoded = encode_prompt([encoder], "", emphasis=False)
    torch.testing.assert_close(encoded.pooled, mean[1:])


def test_captions_begin_apart() -> None:
    """With CLIP's deviations they are more alike, and a denoiser hears them much later."""
    torch.manual_seed(0)
    config = replace(CONFIG, hidden_size=192, pooled=True)
    network = TextTransformer(config).eval()
    source = torch.Generator().manual_seed(2)
    ids = torch.randint(3, len(LEARNED), (8, 16), generator=source)
    ids[:, 0], ids[:, 5], ids[:, 6:] = 1, 2, 0  # start, four words, end, padding

    def likeness() -> Tensor:
        mean = F.normalize(network.encode_both(ids)[1], dim=1)  # type: ignore[arg-type]
        return (mean @ mean.T).triu(1).sum() / 28

    assert likeness() < 0.7
    network.token_embedding.weight.data.normal_(std=0.02)
    network.position_embedding.data.normal_(std=0.01)
    assert likeness() > 0.9


def test_a_prompt_is_read_like_any_other_encoders(model: TextTransformer) -> None:
    """Start, tokens, end, padding; longer prompts in chunks; brackets weigh."""
    encoder = TextEncoder(model=model, tokenizer=LEARNED)
    words = "a red circle left of a blue square"
    ids = LEARNED(words)["input_ids"]
    padded = torch.tensor([ids + [LEARNED.pad_token_id] * (16 - len(ids))])
    tokens = encode_prompt([encoder], words).tokens
    assert tokens.shape == (1, 16, 32)
    assert torch.equal(tokens, model.encode(padded))
    assert encode_prompt([encoder], words * 2).tokens.shape == (1, 32, 32)
    empty = encode_prompt([encoder], "").tokens
    assert not torch.equal(empty, tokens)
    assert torch.allclose(encode_prompt([encoder], f"({words}:0)").tokens[:, 1:9], empty[:, 1:9])
    assert not torch.equal(encode_prompt([encoder], words, clip_skip=1).tokens, tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
        ({"hidden_size": 30}, "multiple of num_attention_heads, got 30 and 4"),
        ({"max_position_embeddings": 2}, "at least 3"),
        ({"dropout": 1.0}, "dropout must be in"),
    ],
)
def test_wrong_configs(change: dict[str, Any], message: str) -> None:
    from dataclasses import replace

    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


def test_its_end_is_the_tokenizers() -> None:
    assert CONFIG.eos_token_id == Tokenizer.eos_token_id
