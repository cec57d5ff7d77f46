"""The text transformer of latent diffusion's txt2img, in CompVis' files and diffusers' folders.

CompVis' is an encoder of x-transformers: layers 2 i and 2 i + 1 are the attention and the MLP of
block i, each a list of norm and layer. Both layouts also hold the matrix that predicts tokens
(`to_logits`), which txt2img never runs; it is not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fastdiff.checkpoint import text_encoders
from fastdiff.checkpoint.build import Layers, Place, Plan, plan_model, source_names
from fastdiff.checkpoint.open import Loading
from fastdiff.checkpoint.weights import Sources, Weights, some
from fastdiff.models.bert import BERT, BERTBlock, BERTConfig, BERTEncoder

HEAD_DIM = 64
"""Width of every head of the published model."""
MARK = "attn_layers.layers.0.0.weight"
"""A tensor of CompVis' layout that no other text encoder has."""
UNREAD = "to_logits."
DIFFUSERS = "LDMBertModel"
DIFFUSERS_LAYERS: Layers = {
    BERTBlock: {
        "norm1": ("self_attn_layer_norm",),
        "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attn.out": ("self_attn.out_proj",),
        "norm2": ("final_layer_norm",),
        "mlp.fc1": ("fc1",),
        "mlp.fc2": ("fc2",),
    }
}


def compvis_names(model: nn.Module) -> Sources:
    """(our parameter -> CompVis')."""
    assert isinstance(model, BERT)
    found: Sources = {
        "token_embed.weight": ("token_emb.weight",),
        "pos_embed.weight": ("pos_emb.emb.weight",),
        "norm_out.weight": ("norm.weight",),
        "norm_out.bias": ("norm.bias",),
    }
    for index in range(model.config.depth):
        first, second = (f"attn_layers.layers.{2 * index + half}" for half in (0, 1))
        ours = f"blocks.{index}"
        rows = tuple(f"{first}.1.to_{part}.weight" for part in "qkv")
        found[f"{ours}.attn.qkv.weight"] = rows
        for leaf in ("weight", "bias"):
            found[f"{ours}.norm1.{leaf}"] = (f"{first}.0.{leaf}",)
            found[f"{ours}.attn.out.{leaf}"] = (f"{first}.1.to_out.{leaf}",)
            found[f"{ours}.norm2.{leaf}"] = (f"{second}.0.{leaf}",)
            found[f"{ours}.mlp.fc1.{leaf}"] = (f"{second}.1.net.0.0.{leaf}",)
            found[f"{ours}.mlp.fc2.{leaf}"] = (f"{second}.1.net.2.{leaf}",)
    return found


def diffusers_names(model: nn.Module) -> Sources:
    """(our parameter -> diffusers')."""
    assert isinstance(model, BERT)
    places: list[Place] = [
        ("token_embed", model.token_embed, "model.embed_tokens"),
        ("pos_embed", model.pos_embed, "model.embed_positions"),
        ("norm_out", model.norm_out, "model.layer_norm"),
    ]
    for index, block in enumerate(model.blocks):
        places.append((f"blocks.{index}", block, f"model.layers.{index}"))
    return source_names(places, DIFFUSERS_LAYERS)


def _without_logits(weights: Weights) -> Weights:
    return weights.renamed({key: key for key in weights.places if not key.startswith(UNREAD)})


def plan_compvis(weights: Weights, loading: Loading) -> Plan:
    """Plan the transformer under `cond_stage_model.transformer.` of a whole file.

    Raises:
        ValueError: names or shapes are not those of one.
    """
    shapes = weights.shapes
    try:
        vocabulary, width = shapes["token_emb.weight"]
        tokens = shapes["pos_emb.emb.weight"][0]
        inner = shapes["attn_layers.layers.0.1.to_q.weight"][0]
        hidden = shapes["attn_layers.layers.1.1.net.0.0.weight"][0]
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(
            f"{weights.path}: expected latent diffusion's text transformer, got "
            f"{some(sorted(shapes), 3)}; set text_encoders=False to load the rest"
        ) from error
    head_dim = HEAD_DIM if inner % HEAD_DIM == 0 else inner
    if head_dim != HEAD_DIM:
        loading.assumed.take("text head_dim", head_dim, "any divisor of it")
    layers = {key.split(".")[2] for key in shapes if key.startswith("attn_layers.layers.")}
    config = BERTConfig(
        vocabulary=vocabulary,
        tokens=tokens,
        width=width,
        depth=len(layers) // 2,
        num_heads=inner // head_dim,
        head_dim=head_dim,
        hidden=hidden,
    )
    return plan_model(config, compvis_names, _without_logits(weights))


def plan_folder(data: Mapping[str, Any], weights: Weights) -> Plan:
    """Plan the `bert` folder of diffusers' LDMTextToImagePipeline.

    data: its config.json.

    Raises:
        ValueError: it is incomplete or asks for what the transformer does not have.
    """
    for name, value in (("activation_function", "gelu"), ("scale_embedding", False)):
        if data.get(name, value) != value:
            raise ValueError(
                f"{weights.path}: {name} must be {value!r}, got {data[name]!r:.40}; set "
                "text_encoders=False to load the rest"
            )
    try:
        config = BERTConfig(
            vocabulary=int(data["vocab_size"]),
            tokens=int(data["max_position_embeddings"]),
            width=int(data["d_model"]),
            depth=int(data["encoder_layers"]),
            num_heads=int(data["encoder_attention_heads"]),
            head_dim=int(data["head_dim"]),
            hidden=int(data["encoder_ffn_dim"]),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{weights.path}: the config of the text transformer lacks or has a wrong {error}; "
            "give the whole config.json"
        ) from error
    return plan_model(config, diffusers_names, _without_logits(weights))


def encoder(plan: Plan, folder: Path | None, loading: Loading) -> BERTEncoder:
    """Read a planned transformer and the tokenizer in a folder, if there is one."""
    assert isinstance(plan.model, BERT)
    tokenizer = None
    if folder is not None:
        tokenizer = text_encoders.read_tokenizer(folder, "BertTokenizer")
        text_encoders.check_vocabulary(tokenizer, plan.model.config.vocabulary)
    return BERTEncoder(model=loading.fill(plan), tokenizer=tokenizer)
