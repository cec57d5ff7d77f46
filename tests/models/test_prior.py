"""unCLIP's prior against diffusers' PriorTransformer, and as any other network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff.checkpoint.layouts.diffusers import prior as layout
from fastdiff.diffusion.losses import simple_loss
from fastdiff.diffusion.predictions import target
from fastdiff.diffusion.schedules import ScheduleConfig, noise_schedule
from fastdiff.models.prior import Prior, PriorConfig
from fastdiff.runtime.conditions import Condition
from tests.models.test_against_diffusers import assert_equal, config_json, peer_model, randn

SMALL: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "embedding_dim": 16,
    "num_embeddings": 7,
}


def given(n: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "x": randn(n, 16, dtype=dtype),
        "t": torch.tensor([981, 3])[:n],
        "added": randn(n, 16, dtype=dtype, seed=1),
        "context": randn(n, 7, 16, dtype=dtype, seed=2),
    }


def theirs_and_ours(folder: Path, dtype: torch.dtype) -> tuple[Any, Prior]:
    theirs = peer_model("PriorTransformer", SMALL, dtype)
    with torch.no_grad():
        for parameter in (theirs.positional_embedding, theirs.prd_embedding):
            parameter.copy_(randn(*parameter.shape, dtype=dtype, seed=3))
        theirs.clip_std.add_(1.0)
    theirs.save_pretrained(folder)
    model = fastdiff.load(folder, dtype=dtype)
    assert model.prediction == "x0"
    assert isinstance(model.denoiser, Prior)
    return theirs, model.denoiser


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@torch.no_grad()
def test_equal_to_diffusers_with_the_same_file(dtype: torch.dtype, tmp_path: Path) -> None:
    theirs, ours = theirs_and_ours(tmp_path, dtype)
    count = sum(p.numel() for p in theirs.parameters())
    assert sum(p.numel() for p in ours.parameters()) == count
    arguments = given(2, dtype)
    x, t, added, context = (arguments[key] for key in ("x", "t", "added", "context"))
    mask = torch.arange(7) < torch.tensor([[7], [3]])
    expected = theirs(
        x, t, added, encoder_hidden_states=context, attention_mask=mask
    ).predicted_image_embedding
    projected = ours.project_context(context, mask)
    assert_equal(ours(x, t, context=projected, added=added), expected)
    full = torch.ones_like(mask)
    expected = theirs(
        x, t, added, encoder_hidden_states=context, attention_mask=full
    ).predicted_image_embedding
    assert_equal(ours(x, t, context=context, added=added), expected)
    assert_equal(ours.denormalized(x), theirs.post_process_latents(x))


@torch.no_grad()
def test_padding_is_not_seen(tmp_path: Path) -> None:
    _, ours = theirs_and_ours(tmp_path, torch.float64)
    arguments = given(1, torch.float64)
    x, t, added, context = (arguments[key] for key in ("x", "t", "added", "context"))
    mask = torch.arange(7)[None] < 3
    changed = context.clone()
    changed[:, 3:] = 7.0
    one, two = (
        ours(x, t, context=ours.project_context(text, mask), added=added)
        for text in (context, changed)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, ours(x, t, context=context, added=added))


def test_it_trains_on_the_existing_loss() -> None:
    """x0 prediction: the loss is the mean square of what is missing from the embedding."""
    torch.manual_seed(0)
    model = Prior(PriorConfig(in_channels=8, context_tokens=3, width=16, depth=1, num_heads=2))
    schedule = noise_schedule(ScheduleConfig(kind="cosine"))
    x0, noise, t = torch.randn(4, 8), torch.randn(4, 8), torch.tensor([0, 10, 500, 999])
    text, tokens = torch.randn(4, 8), torch.randn(4, 3, 8)
    alpha, sigma = (table(t).float()[:, None] for table in (schedule.alpha, schedule.sigma))
    out = model(alpha * x0 + sigma * noise, t, context=tokens, added=text)
    wanted = target("x0", x0, noise, alpha, sigma)
    assert torch.equal(wanted, x0)
    simple_loss(out, wanted).backward()
    zero = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.any())
    ]
    assert not zero


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 15)}, r"x must be \(N, 16\), got \(2, 15\)"),
        ({"context": None}, r"context must be \(N, 7, 16\) for this model, got None"),
        ({"context": torch.zeros(2, 6, 16)}, r"context must be \(N, 7, 16\), got \(2, 6, 16\)"),
        ({"added": None}, r"added must be vectors of shape \(2, 16\), got None"),
    ],
)
def test_wrong_input_is_one_clear_line(change: dict[str, Any], message: str) -> None:
    model = Prior(PriorConfig(in_channels=16, context_tokens=7, width=24, depth=1, num_heads=2))
    with pytest.raises(ValueError, match=message):
        model(**(given(2, torch.float32) | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"added_emb_type": None}, "added_emb_type must be 'prd', got None"),
        ({"norm_in_type": "layer"}, "norm_in_type must be None, got 'layer'"),
        ({"clip_embed_dim": 5}, "clip_embed_dim must be absent or 16, got 5"),
        ({"more": 1}, "more must be absent or off"),
    ],
)
def test_other_priors_are_refused(change: dict[str, Any], message: str) -> None:
    data = config_json(peer_model("PriorTransformer", SMALL, torch.float32))
    with pytest.raises(ValueError, match=message):
        layout.config(data | change)


def test_conditions_with_masks_mix() -> None:
    masks = torch.tensor([[True, False, False]]), torch.tensor([[True, True, False]])
    one, two = (Condition(context=torch.ones(1, 3, 2), mask=mask) for mask in masks)
    mixed = one.mixed(two, 0.5).mask
    assert mixed is not None
    assert mixed.tolist() == [[True, True, False]]
