"""GLIDE as published, in plain PyTorch: its tensors by OpenAI's names, and what they compute.

Written from Nichol et al. 2021 and from the names and shapes of the published files; nothing here
uses fastdiff's modules.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Size:
    """What distinguishes the published models, and a small one of the same structure."""

    width: int
    multipliers: tuple[int, ...]
    blocks: int
    attended: tuple[int, ...]  # levels
    inputs: int
    head: int = 64
    text_width: int = 512
    text_depth: int = 16
    tokens: int = 128
    vocabulary: int = 50257
    groups: int = 32


BASE = Size(192, (1, 2, 3, 4), 3, (1, 2, 3), 3)
INPAINT = Size(192, (1, 2, 3, 4), 3, (1, 2, 3), 7)
UPSAMPLER = Size(192, (1, 1, 2, 2, 4, 4), 2, (3, 4, 5), 6)
TINY = Size(16, (1, 2), 1, (1,), 3, head=8, text_width=16, text_depth=2, tokens=6, vocabulary=300,
            groups=8)  # fmt: skip


def plan(size: Size) -> tuple[list[list[tuple[str, int, int]]], list[list[tuple[str, int, int]]]]:
    """Blocks of each stage down (the middle is the last one) and up: (kind, channels in, out)."""
    widths = [size.width * m for m in size.multipliers]
    down: list[list[tuple[str, int, int]]] = [[("conv", size.inputs, size.width)]]
    now, skips = size.width, [size.width]
    for level, width in enumerate(widths):
        for _ in range(size.blocks):
            stage = [("res", now, width)]
            stage += [("attention", width, width)] if level in size.attended else []
            down.append(stage)
            now = width
            skips.append(now)
        if level + 1 < len(widths):
            down.append([("down", now, now)])
            skips.append(now)
    down.append([("res", now, now), ("attention", now, now), ("res", now, now)])
    up = []
    for level in reversed(range(len(widths))):
        for number in range(size.blocks + 1):
            stage = [("res", now + skips.pop(), widths[level])]
            now = widths[level]
            stage += [("attention", now, now)] if level in size.attended else []
            stage += [("up", now, now)] if level and number == size.blocks else []
            up.append(stage)
    return down, up


def stage_names(size: Size) -> list[tuple[str, list[tuple[str, int, int]]]]:
    down, up = plan(size)
    named = [(f"input_blocks.{i}", stage) for i, stage in enumerate(down[:-1])]
    named.append(("middle_block", down[-1]))
    return named + [(f"output_blocks.{i}", stage) for i, stage in enumerate(up)]


def shapes(size: Size) -> Shapes:
    """Name -> shape of every tensor of a file."""
    wide, text = 4 * size.width, size.text_width
    found: Shapes = {
        "positional_embedding": (size.tokens, text),
        "padding_embedding": (size.tokens, text),
        "token_embedding.weight": (size.vocabulary, text),
    }

    def layer(name: str, *shape: int) -> None:
        found[f"{name}.weight"] = shape
        found[f"{name}.bias"] = shape[:1]

    layer("time_embed.0", wide, size.width)
    layer("time_embed.2", wide, wide)
    layer("transformer_proj", wide, text)
    layer("final_ln", text)
    for index in range(size.text_depth):
        block = f"transformer.resblocks.{index}"
        layer(f"{block}.attn.c_qkv", 3 * text, text)
        layer(f"{block}.attn.c_proj", text, text)
        layer(f"{block}.ln_1", text)
        layer(f"{block}.mlp.c_fc", 4 * text, text)
        layer(f"{block}.mlp.c_proj", text, 4 * text)
        layer(f"{block}.ln_2", text)
    for name, stage in stage_names(size):
        for number, (kind, before, after) in enumerate(stage):
            block = f"{name}.{number}"
            if kind == "conv":
                layer(block, after, before, 3, 3)
            elif kind == "attention":
                layer(f"{block}.norm", after)
                layer(f"{block}.qkv", 3 * after, after, 1)
                layer(f"{block}.encoder_kv", 2 * after, text, 1)
                layer(f"{block}.proj_out", after, after, 1)
            else:
                layer(f"{block}.in_layers.0", before)
                layer(f"{block}.in_layers.2", after, before, 3, 3)
                layer(f"{block}.emb_layers.1", 2 * after, wide)
                layer(f"{block}.out_layers.0", after)
                layer(f"{block}.out_layers.3", after, after, 3, 3)
                if before != after:
                    layer(f"{block}.skip_connection", after, before, 1, 1)
    layer("out.0", size.width)
    layer("out.2", 6, size.width, 3, 3)
    return found


def draw(size: Size, seed: int = 0) -> Weights:
    """Random fp64 weights, none of which is zero or one."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in shapes(size).items():
        numbers = torch.randn(shape, generator=generator, dtype=torch.float64)
        scale = math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.1
        gain = len(shape) == 1 and name.endswith("weight")
        made[name] = gain + scale * numbers
    return made


def text(w: Weights, size: Size, ids: Tensor, there: Tensor) -> Tensor:
    """ids: (N, T). there: (N, T), False for padding. Returns (N, T, C)."""
    x = w["token_embedding.weight"][ids] + w["positional_embedding"]
    x = torch.where(there[..., None], x, w["padding_embedding"].expand_as(x))
    for index in range(size.text_depth):
        part = f"transformer.resblocks.{index}."
        h = _norm(w, f"{part}ln_1", x)
        heads = size.text_width // size.head
        qkv = _linear(w, f"{part}attn.c_qkv", h).unflatten(2, (heads, 3, size.head))
        q, k, v = qkv.unbind(3)
        scores = torch.einsum("nthc,nshc->nhts", q, k) / math.sqrt(size.head)
        h = torch.einsum("nhts,nshc->nthc", scores.softmax(3), v).flatten(2)
        x = x + _linear(w, f"{part}attn.c_proj", h)
        h = F.gelu(_linear(w, f"{part}mlp.c_fc", _norm(w, f"{part}ln_2", x)))
        x = x + _linear(w, f"{part}mlp.c_proj", h)
    return _norm(w, "final_ln", x)


def unet(w: Weights, size: Size, x: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
    """x: (N, inputs, H, W). t: (N,). tokens: the result of `text`. Returns (N, 6, H, W)."""
    half = size.width // 2
    # fp32 frequencies, as published
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    angles = t[:, None].float() * frequencies
    sinusoids = torch.cat([angles.cos(), angles.sin()], 1).to(x)
    emb = _linear(w, "time_embed.2", F.silu(_linear(w, "time_embed.0", sinusoids)))
    emb = emb + _linear(w, "transformer_proj", tokens[:, -1])
    h, skips = x, []
    for name, stage in stage_names(size):
        if name.startswith("output"):
            h = torch.cat([h, skips.pop()], 1)
        for number, (kind, _, _) in enumerate(stage):
            h = _block(w, size, f"{name}.{number}", kind, h, emb, tokens)
        if name.startswith("input"):
            skips.append(h)
    h = F.silu(_group_norm(w, size, "out.0", h))
    return _conv(w, "out.2", h)


def _block(
    w: Weights, size: Size, name: str, kind: str, x: Tensor, emb: Tensor, tokens: Tensor
) -> Tensor:
    if kind == "conv":
        return _conv(w, name, x)
    if kind == "attention":
        return x + _attention(w, size, name, x, tokens)
    h = F.silu(_group_norm(w, size, f"{name}.in_layers.0", x))
    if kind == "down":
        h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
    elif kind == "up":
        h, x = (F.interpolate(part, scale_factor=2, mode="nearest") for part in (h, x))
    h = _conv(w, f"{name}.in_layers.2", h)
    scale, shift = _linear(w, f"{name}.emb_layers.1", F.silu(emb))[..., None, None].chunk(2, 1)
    h = F.silu(_group_norm(w, size, f"{name}.out_layers.0", h) * (1 + scale) + shift)
    h = _conv(w, f"{name}.out_layers.3", h)
    shortcut = f"{name}.skip_connection"
    if f"{shortcut}.weight" in w:
        x = F.conv2d(x, w[f"{shortcut}.weight"], w[f"{shortcut}.bias"])
    return x + h


def _attention(w: Weights, size: Size, name: str, x: Tensor, tokens: Tensor) -> Tensor:
    """Keys and values of the text come first, then those of the pixels."""
    channels = x.shape[1]
    heads = channels // size.head
    flat = _group_norm(w, size, f"{name}.norm", x).flatten(2)
    qkv = F.conv1d(flat, w[f"{name}.qkv.weight"], w[f"{name}.qkv.bias"])
    q, k, v = qkv.unflatten(1, (heads, 3, size.head)).unbind(2)  # (N, H, d, L)
    kv = F.conv1d(tokens.mT, w[f"{name}.encoder_kv.weight"], w[f"{name}.encoder_kv.bias"])
    text_k, text_v = kv.unflatten(1, (heads, 2, size.head)).unbind(2)
    k, v = torch.cat([text_k, k], 3), torch.cat([text_v, v], 3)
    weights = (torch.einsum("nhcl,nhcs->nhls", q, k) / math.sqrt(size.head)).softmax(3)
    h = torch.einsum("nhls,nhcs->nhcl", weights, v).flatten(1, 2)
    h = F.conv1d(h, w[f"{name}.proj_out.weight"], w[f"{name}.proj_out.bias"])
    return h.view_as(x)


def _linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def _conv(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], padding=1)


def _norm(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])


def _group_norm(w: Weights, size: Size, name: str, x: Tensor) -> Tensor:
    return F.group_norm(x, size.groups, w[f"{name}.weight"], w[f"{name}.bias"])
