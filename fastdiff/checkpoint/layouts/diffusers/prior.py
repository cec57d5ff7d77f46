"""diffusers' PriorTransformer: the diffusion prior of unCLIP (karlo)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fastdiff.checkpoint.build import Layers, Place, Plan, plan_model, source_names
from fastdiff.checkpoint.layouts.diffusers.options import Options
from fastdiff.checkpoint.weights import Sources, Weights
from fastdiff.models.prior import AFTER_TEXT, Prior, PriorBlock, PriorConfig

NAME = "PriorTransformer"
LAYERS: Layers = {
    PriorBlock: {
        "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
        "attn.out": ("attn1.to_out.0",),
        "norm2": ("norm3",),
        "mlp.fc1": ("ff.net.0.proj",),
        "mlp.fc2": ("ff.net.2",),
    }
}
FIXED: dict[str, Any] = {
    "additional_embeddings": AFTER_TEXT,
    "time_embed_act_fn": "silu",
    "norm_in_type": None,
    "embedding_proj_norm_type": None,
    "encoder_hid_proj_type": "linear",
    "added_emb_type": "prd",
}
"""Option -> the only value that our prior has; Kandinsky's and Shap-E's differ."""


def names(model: nn.Module) -> Sources:
    """(our parameter -> diffusers')."""
    assert isinstance(model, Prior)
    places: list[Place] = [
        ("time_embed.0", model.time_embed[0], "time_embedding.linear_1"),
        ("time_embed.2", model.time_embed[2], "time_embedding.linear_2"),
        ("linear_in", model.linear_in, "proj_in"),
        ("added_embed", model.added_embed, "embedding_proj"),
        ("context_embed", model.context_embed, "encoder_hidden_states_proj"),
        ("norm_out", model.norm_out, "norm_out"),
        ("linear_out", model.linear_out, "proj_to_clip_embeddings"),
    ]
    for index, block in enumerate(model.blocks):
        places.append((f"blocks.{index}", block, f"transformer_blocks.{index}"))
    return {
        "pos_embed": ("positional_embedding",),
        "query": ("prd_embedding",),
        "mean": ("clip_mean",),
        "std": ("clip_std",),
        **source_names(places, LAYERS),
    }


def config(data: Mapping[str, Any]) -> PriorConfig:
    """Our config for the `config.json` of a PriorTransformer.

    Raises:
        ValueError: an option that our prior does not have.
    """
    options = Options(data)
    for name, value in FIXED.items():
        if options.get(name, value) != value or (value and options.data.get(name, value) is None):
            raise options.fail(name, repr(value))
    channels, heads = options.get("embedding_dim", 768), options.get("num_attention_heads", 32)
    width = heads * options.get("attention_head_dim", 64)
    for name, value in (
        ("embedding_proj_dim", channels),
        ("clip_embed_dim", channels),
        ("time_embed_dim", width),
    ):
        if options.get(name, value) != value:
            raise options.fail(name, f"absent or {value}")
    made = PriorConfig(
        in_channels=channels,
        context_tokens=options.get("num_embeddings", 77),
        width=width,
        depth=options.get("num_layers", 20),
        num_heads=heads,
        dropout=options.get("dropout", 0.0),
    )
    options.finish()
    return made


def plan(config: PriorConfig, weights: Weights) -> Plan:
    """Plan a prior; old files also contain the causal mask, which we compute."""
    kept = {key: key for key in weights.places if key != "causal_attention_mask"}
    return plan_model(config, names, weights.renamed(kept))
