"""The contrastive net of noised pictures: it sees the timestep, and its gradient is exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff.configs import from_dict, to_dict
from fastdiff.diffusion.gradients import Similarity, gradient_of
from fastdiff.models.contrastive import Contrastive, ContrastiveConfig
from fastdiff.models.text_transformer import TextTransformerConfig
from tests.support.tiny import randomize

TEXT = TextTransformerConfig(
    vocab_size=300,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=8,
)
CONFIG = ContrastiveConfig(text=TEXT, widths=(8, 16), dim=6, noised=True)
IDS = torch.tensor([[1, 5, 6, 2, 0, 0], [1, 7, 2, 0, 0, 0]])


def net(**change: Any) -> Contrastive:
    fields = {**{name: getattr(CONFIG, name) for name in ("text", "widths", "dim", "noised")}}
    made = Contrastive(ContrastiveConfig(**{**fields, **change}))
    randomize(made, 1)
    return made.double().eval()


def pictures(count: int = 2) -> Tensor:
    source = torch.Generator().manual_seed(2)
    return torch.randn(count, 3, 8, 8, generator=source, dtype=torch.float64)


def test_the_timestep_counts_for_each_picture_on_its_own() -> None:
    clip, x = net(), pictures()
    t = torch.tensor([10.0, 900.0])
    both = clip.embed_images(x, t)
    assert both.dtype == torch.float64
    for row in range(2):
        alone = clip.embed_images(x[row : row + 1], t[row : row + 1])[0]
        torch.testing.assert_close(both[row], alone, rtol=1e-12, atol=1e-12)
    assert (both[0] - clip.embed_images(x, t.flip(0))[0]).abs().max() > 0.01


def test_the_gradient_of_the_dot_product_is_that_of_finite_differences() -> None:
    """Along a random direction, central differences in fp64."""
    clip, x, t = net().requires_grad_(False), pictures(), torch.tensor([30.0, 700.0])
    caption = clip.scale * clip.embed_text(IDS)[0]
    similarity = Similarity(clip.embed_images, caption)
    found = gradient_of(similarity, x, t, torch.zeros(2, dtype=torch.int64))
    way, h = pictures().flip(0), 1e-5
    ahead, behind = (similarity(x + sign * h * way, t, t) for sign in (1, -1))
    expected = (ahead - behind) / (2 * h)
    torch.testing.assert_close((found * way).sum((1, 2, 3)), expected, rtol=1e-6, atol=1e-8)
    assert expected.abs().min() > 1e-3


def test_a_net_and_its_timesteps_need_each_other() -> None:
    x, t = pictures(), torch.zeros(2)
    with pytest.raises(ValueError, match="takes the timesteps of noised pictures, got none"):
        net().embed_images(x)
    net().embed_images(x, t)
    with pytest.raises(ValueError, match="was not trained on noised pictures, got timesteps"):
        net(noised=False).embed_images(x, t)
    net(noised=False).embed_images(x)


def test_configs_of_older_versions_keep_their_form() -> None:
    """The judge of drawings is cached under a hash of its config."""
    older = ContrastiveConfig(text=TEXT)
    assert "noised" not in to_dict(older)
    assert from_dict(ContrastiveConfig, to_dict(CONFIG)) == CONFIG
