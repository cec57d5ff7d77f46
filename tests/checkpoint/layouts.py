"""diffusers' weights under the names of other layouts, from those layouts' published names.

Written from the published names, not from the package's tables, so that the loaders are tested
against an independent source.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

State = dict[str, Tensor]

_OPENAI_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OPENAI_ENDS = {
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
    "class_embedding.": "label_emb.",
    "mid_block.resnets.0.": "middle_block.0.",
    "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.1.": "middle_block.2.",
}


def openai_unet(state: Mapping[str, Tensor], blocks: int, heads: int = 1, order: str = "") -> State:
    """OpenAI's and CompVis' names.

    blocks: residual blocks per level. heads, order: of attention without transformers; order
    "legacy" packs rows as (H, 3, d), "new" as (3, H, d).
    """
    attended = {key.rpartition("attentions.")[0] for key in state if "attentions." in key}
    result: State = {}
    for key, value in state.items():
        result[_openai_name(key, blocks, attended)] = value
    return _packed(result, heads, order) if order else result


def _openai_name(key: str, blocks: int, attended: set[str]) -> str:
    for ours, theirs in _OPENAI_ENDS.items():
        if key.startswith(ours):
            return theirs + _openai_inner(key[len(ours) :])
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", key)
    assert match, key
    way, level, kind, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if way == "down":
        number = 1 + level * (blocks + 1) + (blocks if kind == "downsamplers" else index)
        if kind == "downsamplers" and rest.startswith("conv."):
            return f"input_blocks.{number}.0.op.{rest[5:]}"
        position = int(kind == "attentions")
        return f"input_blocks.{number}.{position}.{_openai_inner(rest)}"
    number = level * (blocks + 1) + (blocks if kind == "upsamplers" else index)
    position = {"resnets": 0, "attentions": 1}.get(kind)
    if position is None:
        position = 2 if f"up_blocks.{level}." in attended else 1
    return f"output_blocks.{number}.{position}.{_openai_inner(rest)}"


def openai_classifier(state: Mapping[str, Tensor], pool: str) -> State:
    """guided-diffusion's names for a noisy classifier of ours, whose blocks have the same numbers.

    `out` is a list of layers. adaptive: norm, SiLU, mean, 1x1 convolution, flatten. attention:
    norm, SiLU, AttentionPool2d. spatial: linear, ReLU, linear. spatial_v2: linear, norm, SiLU,
    linear. Projections of attention are convolutions over one dimension, adaptive's over two.
    """
    out = {
        "adaptive": {"norm_out": "out.0", "linear_out": "out.3"},
        "attention": {
            "norm_out": "out.0",
            "pool.qkv": "out.2.qkv_proj",
            "pool.proj": "out.2.c_proj",
            "pool": "out.2",
        },
        "spatial": {"hidden": "out.0", "linear_out": "out.2"},
        "spatial_v2": {"hidden": "out.0", "norm_out": "out.1", "linear_out": "out.3"},
    }[pool]
    inside = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "emb": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "skip": "skip_connection",
        "proj": "proj_out",
    }
    result: State = {}
    for key, value in state.items():
        stem, _, leaf = key.rpartition(".")
        number, _, layer = stem.rpartition(".")
        if stem in out:
            name = f"{out[stem]}.{leaf.replace('positions', 'positional_embedding')}"
        elif re.fullmatch(r"input_blocks\.[1-9]\d*\.0\.conv", stem):
            name = f"{number}.op.{leaf}"
        elif stem.startswith(("input_blocks.", "middle_block.")) and layer in inside:
            name = f"{number}.{inside[layer]}.{leaf}"
        else:
            name = key
        extra = 2 * (name == "out.3.weight" and pool == "adaptive")
        if name.endswith((".qkv.weight", "proj.weight", "proj_out.weight")):
            extra = 1
        result[name] = value.reshape(*value.shape, *(1,) * extra)
    return result


def _openai_inner(rest: str) -> str:
    name, _, leaf = rest.partition(".")
    if name in _OPENAI_BLOCK:
        return f"{_OPENAI_BLOCK[name]}.{leaf}"
    return rest


def _packed(state: State, heads: int, order: str) -> State:
    """q, k, v into one convolution over one dimension, as in OpenAI's AttentionBlock."""
    result: State = {}
    for key, value in state.items():
        if ".to_q." in key:
            parts = [state[key.replace(".to_q.", f".to_{name}.")] for name in "qkv"]
            if order == "legacy":
                split = [part.unflatten(0, (heads, -1)) for part in parts]
                packed = torch.cat(split, dim=1).flatten(0, 1)
            else:
                packed = torch.cat(parts)
            name = key.replace(".to_q.", ".qkv.")
            result[name] = packed[..., None] if packed.ndim == 2 else packed
        elif ".to_out.0." in key:
            name = key.replace(".to_out.0.", ".proj_out.")
            result[name] = value[..., None] if value.ndim == 2 else value
        elif ".to_k." not in key and ".to_v." not in key:
            result[key.replace(".group_norm.", ".norm.")] = value
    return result


def ddpm(state: Mapping[str, Tensor], levels: int) -> State:
    """The names of DDPM's ports (U-Net) and of CompVis' autoencoders."""
    result: State = {}
    for key, value in state.items():
        name = key
        for ours, theirs in (
            ("time_embedding.linear_1", "temb.dense.0"),
            ("time_embedding.linear_2", "temb.dense.1"),
            ("mid_block.resnets.0", "mid.block_1"),
            ("mid_block.resnets.1", "mid.block_2"),
            ("mid_block.attentions.0", "mid.attn_1"),
            ("conv_norm_out", "norm_out"),
            ("time_emb_proj", "temb_proj"),
            ("conv_shortcut", "nin_shortcut"),
            ("group_norm", "norm"),
            ("to_out.0", "proj_out"),
        ):
            name = name.replace(ours, theirs)
        name = re.sub(r"\.to_([qkv])\.", r".\1.", name)
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
        name = re.sub(r"down_blocks\.(\d+)\.attentions\.", r"down.\1.attn.", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", name)
        if match := re.search(r"up_blocks\.(\d+)\.(\w+)\.(\d+)\.", name):
            level = levels - 1 - int(match[1])
            inner = {"resnets": f"block.{match[3]}", "attentions": f"attn.{match[3]}"}
            new = f"up.{level}.{inner.get(match[2], 'upsample')}."
            name = name.replace(match[0], new)
        linear = ".attn" in name and value.ndim == 2
        result[name] = value[:, :, None, None] if linear else value
    return result


def ddim_list(
    state: Mapping[str, Tensor],
    averaged: Mapping[str, Tensor] | None,
    *,
    epoch: int,
    step: int,
    parallel: bool = True,
) -> list[object]:
    """What the trainer of DDIM's authors saves, given weights under DDPM's names.

    The weights are those of a DataParallel module, whose names begin with "module."; the averages
    are named as the module inside.
    """
    names = list(state)
    optimizer = {
        "state": {n: {"step": step, "exp_avg": state[key]} for n, key in enumerate(names)},
        "param_groups": [{"lr": 2e-4, "amsgrad": False, "params": list(range(len(names)))}],
    }
    prefix = "module." * parallel
    states: list[object] = [{prefix + k: v for k, v in state.items()}, optimizer, epoch, step]
    return states if averaged is None else [*states, dict(averaged)]


def open_clip(state: Mapping[str, Tensor]) -> State:
    """OpenCLIP's names for the weights of transformers' CLIP text model."""
    result: State = {}
    for key, number in state.items():
        name, value = key.removeprefix("text_model."), number
        if ".k_proj." in name or ".v_proj." in name or "position_ids" in name:
            continue
        if ".q_proj." in name:
            value = torch.cat([state[key.replace(".q_proj.", f".{n}_proj.")] for n in "qkv"])
        for ours, theirs in (
            ("encoder.layers.", "transformer.resblocks."),
            ("self_attn.q_proj.", "attn.in_proj_"),
            ("self_attn.out_proj", "attn.out_proj"),
            ("layer_norm1", "ln_1"),
            ("layer_norm2", "ln_2"),
            ("mlp.fc1", "mlp.c_fc"),
            ("mlp.fc2", "mlp.c_proj"),
            ("final_layer_norm", "ln_final"),
            ("embeddings.token_embedding", "token_embedding"),
            ("embeddings.position_embedding.weight", "positional_embedding"),
        ):
            name = name.replace(ours, theirs)
        if name == "text_projection.weight":
            name, value = "text_projection", value.T.contiguous()
        result[name] = value
    return result
