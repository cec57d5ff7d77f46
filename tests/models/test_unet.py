"""What no peer has, and what must hold whatever the layout."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdiff.models.layers import AttentionBlock, FeedForward, ResBlock, timestep_embedding
from fastdiff.models.unet import UNet, UNetConfig

CONFIGS = {
    "ddpm": UNetConfig(
        in_channels=3,
        out_channels=3,
        model_channels=16,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_depth=(0, 1),
        num_heads=1,
        downsample_padding="asymmetric",
        time_embedding="ddpm",
        norm_groups=8,
    ),
    "adm": UNetConfig(
        in_channels=3,
        out_channels=6,
        model_channels=16,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_depth=(0, 1),
        head_dim=8,
        num_classes=10,
        null_class=True,
        scale_shift_norm=True,
        resblock_updown=True,
        qkv_order="legacy",
        learned_sigma=True,
        norm_groups=8,
    ),
    "sdxl": UNetConfig(
        in_channels=4,
        out_channels=4,
        model_channels=16,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_depth=(0, 2),
        middle_depth=2,
        head_dim=8,
        context_dim=12,
        added_condition_dim=20,
        norm_groups=8,
    ),
    "glide": UNetConfig(
        in_channels=3,
        out_channels=6,
        model_channels=16,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_depth=(0, 1),
        head_dim=8,
        context_dim=12,
        context_attention="appended",
        added_condition_dim=20,
        added_layers=1,
        scale_shift_norm=True,
        resblock_updown=True,
        qkv_order="legacy",
        learned_sigma=True,
        norm_groups=8,
    ),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> UNet:
    """A U-Net without a zero parameter, so that every one of them matters."""
    model = UNet(CONFIGS[name]).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    return model


def inputs(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    config, generator = CONFIGS[name], torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    result = {"x": randn(2, config.in_channels, 8, 4), "t": torch.tensor([500, 20])}
    if config.num_classes is not None:
        result["y"] = torch.tensor([3, config.num_classes])
    if config.context_dim is not None:
        result["context"] = randn(2, 5, config.context_dim)
    if config.added_condition_dim is not None:
        result["added"] = randn(2, config.added_condition_dim)
    return result


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_reach_every_parameter_with_and_without_checkpointing(name: str) -> None:
    model, arguments = build(name, torch.float64), inputs(name, torch.float64)
    gradients = []
    for checkpointing in (False, True):
        model.gradient_checkpointing = checkpointing
        model.zero_grad()
        model(**arguments).square().mean().backward()
        gradients.append({k: p.grad.clone() for k, p in model.named_parameters()})
    zero = [key for key, gradient in gradients[0].items() if not gradient.any()]
    assert not zero
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][key], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("checkpointing", "calls"), [(False, 1), (True, 2)])
def test_checkpointing_runs_a_block_again_in_the_backward_pass(
    checkpointing: bool, calls: int
) -> None:
    model, seen = build("ddpm"), []
    model.gradient_checkpointing = checkpointing
    for block in (model.input_blocks[1][0], model.middle_block[1], model.output_blocks[0][0]):
        block.register_forward_pre_hook(lambda module, _: seen.append(module))
    model(**inputs("ddpm")).sum().backward()
    assert len(seen) == 3 * calls


@torch.no_grad()
def test_dropout_is_in_both_kinds_of_block_and_only_while_training() -> None:
    config = dataclasses.replace(CONFIGS["sdxl"], dropout=0.5)
    places = [m for m in UNet(config).modules() if isinstance(m, ResBlock | FeedForward)]
    for block in places:
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.1)
        if isinstance(block, ResBlock):
            arguments = (torch.ones(1, block.in_channels, 4, 4), None, torch.ones(1, 64))
        else:
            arguments = (torch.ones(1, 4, block.proj.in_features),)
        runs = [block(*arguments) for _ in range(2)]
        runs = [run[0].x if isinstance(run, tuple) else run for run in runs]
        assert not torch.equal(*runs)
        block.eval()
        still = [block(*arguments) for _ in range(2)]
        still = [run[0].x if isinstance(run, tuple) else run for run in still]
        assert torch.equal(*still)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_channels_last_is_kept_from_the_first_convolution_to_the_last(name: str) -> None:
    model, arguments = build(name), inputs(name)
    expected = model(**arguments)
    model = model.to(memory_format=torch.channels_last)
    arguments["x"] = arguments["x"].contiguous(memory_format=torch.channels_last)
    seen = []

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(module)
        assert args[0].is_contiguous(memory_format=torch.channels_last), module
        assert output.is_contiguous(memory_format=torch.channels_last), module

    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    for convolution in convolutions:
        convolution.register_forward_hook(hook)
    actual = model(**arguments)
    assert len(seen) == len(convolutions)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_a_new_model_predicts_zero_and_starts_as_the_papers_say(name: str) -> None:
    assert not UNet(CONFIGS[name])(**inputs(name)).any()


@pytest.mark.parametrize("order", ["legacy", "new"])
def test_attention_orders_of_openai(order: str) -> None:
    """guided-diffusion: QKVAttentionLegacy reads rows as (H, 3, d), QKVAttention as (3, H, d)."""
    heads, d, n, h, w = 2, 4, 2, 3, 2
    c = heads * d
    torch.manual_seed(0)
    block = AttentionBlock(c, heads, num_groups=2, eps=1e-5, qkv_order=order).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(n, c, h, w, dtype=torch.float64)

    tokens = nn.functional.group_norm(x, 2, block.norm.weight, block.norm.bias, 1e-5).flatten(2)
    out = torch.empty(n, c, h * w, dtype=torch.float64)
    for head in range(heads):
        for part in range(n):
            starts = [
                3 * d * head + d * i if order == "legacy" else c * i + d * head for i in range(3)
            ]
            q, k, v = (
                block.qkv.weight[i : i + d] @ tokens[part] + block.qkv.bias[i : i + d, None]
                for i in starts
            )
            weights = torch.softmax(q.T @ k / math.sqrt(d), dim=1)  # (query, key)
            out[part, head * d : (head + 1) * d] = v @ weights.T
    expected = (block.proj.weight @ out + block.proj.bias[:, None]).view(n, c, h, w)
    actual, residual = block(x)
    assert residual is x
    assert actual.residual is x
    torch.testing.assert_close(actual.x, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["openai", "ddpm"])
def test_timestep_embedding_is_the_published_formula(kind: str) -> None:
    dim = 6
    t = torch.tensor([0.0, 1.0, 37.5, 999.0])
    actual = timestep_embedding(t, dim, kind)
    half = dim // 2
    for row, step in zip(actual, t.tolist(), strict=True):
        n = half if kind == "openai" else half - 1
        angles = [step * 10000 ** (-i / n) for i in range(half)]
        sin, cos = [math.sin(a) for a in angles], [math.cos(a) for a in angles]
        expected = torch.tensor(cos + sin if kind == "openai" else sin + cos)
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-4)  # fp32 angles up to 1000


def test_the_orders_of_ho_and_of_diffusers() -> None:
    """The formulas of both codes, operation by operation, to the last bit."""
    t, dim, half = torch.arange(1000), 128, 64
    original = math.log(10000) / (half - 1)
    original = torch.exp(torch.arange(half, dtype=torch.float32) * -original)
    theirs = -math.log(10000) * torch.arange(half, dtype=torch.float32)
    theirs = torch.exp(theirs / (half - 1))
    for kind, frequencies in (("ddpm-original", original), ("ddpm", theirs)):
        angles = t.float()[:, None] * frequencies[None, :]
        expected = torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)
        assert torch.equal(timestep_embedding(t, dim, kind), expected), kind
    assert (original - theirs).abs().max() > 1e-8


@torch.no_grad()
def test_embedding_and_context_can_be_computed_ahead() -> None:
    model, arguments = build("sdxl", torch.float64), inputs("sdxl", torch.float64)
    x, t, context, added = (arguments[key] for key in ("x", "t", "context", "added"))
    emb = model.embed(t, added=added)
    ahead = model.body(x, emb, model.project_context(context))
    assert torch.equal(ahead, model(x, t, context=context, added=added))
    one_step = model(x, torch.tensor(500), context=context, added=added)
    assert torch.equal(one_step, model(x, torch.tensor([500, 500]), context=context, added=added))
    # sample 0 has t = 500; another batch size may sum in another order
    torch.testing.assert_close(one_step[0], ahead[0], rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_a_mixture_of_classes_is_the_mixture_of_their_embeddings() -> None:
    model, t = build("adm", torch.float64), torch.tensor([7, 500])
    table = model.label_embed.weight
    weights = torch.zeros(2, len(table), dtype=torch.float64)
    weights[:, 1] = 1
    torch.testing.assert_close(
        model.embed(t, weights), model.embed(t, torch.tensor([1, 1])), rtol=0, atol=1e-14
    )
    weights[:, 1], weights[:, 4] = 0.25, 0.75
    mixed = model.embed(t, weights)
    table[2] = 0.25 * table[1] + 0.75 * table[4]
    torch.testing.assert_close(mixed, model.embed(t, torch.tensor([2, 2])), rtol=0, atol=1e-13)
    with pytest.raises(ValueError, match=r"y must be weights of shape \(2, 11\), got \(2, 3\)"):
        model.embed(t, torch.zeros(2, 3))


@torch.no_grad()
def test_classes_and_the_null_class_differ() -> None:
    model, arguments = build("adm"), inputs("adm")
    rows = [model(arguments["x"][:1], torch.tensor(5), y=torch.tensor([y])) for y in (0, 1, 10)]
    assert not any(torch.equal(a, b) for a, b in ((rows[0], rows[1]), (rows[1], rows[2])))
    with pytest.raises(IndexError):
        model(arguments["x"][:1], torch.tensor(5), y=torch.tensor([11]))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("ddpm", {"x": torch.zeros(2, 4, 8, 4)}, r"x must be \(N, 3, H, W\), got \(2, 4, 8, 4\)"),
        ("ddpm", {"x": torch.zeros(2, 3, 7, 4)}, "must be positive multiples of 2, got 7 x 4"),
        ("ddpm", {"x": torch.zeros(2, 3, 0, 4)}, "must be positive multiples of 2, got 0 x 4"),
        ("ddpm", {"t": torch.zeros(3)}, r"t must be \(\) or \(2,\), got \(3,\)"),
        ("ddpm", {"y": torch.zeros(2, dtype=torch.int64)}, "y must be None for this model"),
        ("ddpm", {"context": torch.zeros(2, 5, 12)}, "context must be None for this model"),
        ("adm", {"y": None}, r"y must be int64 class labels of shape \(2,\), got None"),
        ("sdxl", {"context": None}, r"context must be \(N, T, 12\) for this model, got None"),
        (
            "sdxl",
            {"context": torch.zeros(2, 5, 13)},
            r"context must be \(N, T, 12\), got \(2, 5, 13\)",
        ),
        ("sdxl", {"added": None}, r"added must be vectors of shape \(2, 20\), got None"),
    ],
)
def test_wrong_input_is_one_clear_line(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        UNet(CONFIGS[name])(**(inputs(name) | change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_depth": (0, 1, 1)}, "attention_depth must have 2 entries"),
        ({"attention_depth": (0, 2)}, "must be 0 or 1 without context_dim"),
        ({"num_heads": None}, "give one of num_heads and head_dim"),
        ({"num_heads": 5}, "must divide the width"),
        ({"norm_groups": 7}, "norm_groups must divide"),
        ({"model_channels": 4, "channel_mult": (2, 4)}, "norm_groups must divide model_channels"),
        ({"num_heads": 0}, "num_heads must be None or positive, got 0"),
        ({"num_heads": None, "head_dim": -8}, "head_dim must be None or positive, got -8"),
        ({"num_classes": 0}, "num_classes must be None or positive, got 0"),
        ({"channel_mult": (0, 2)}, r"channel_mult must be positive, got \(0, 2\)"),
        ({"norm_eps": 0.0}, "norm_eps must be positive, got 0"),
        ({"downsample_padding": "same"}, "downsample_padding must be one of .* got 'same'"),
        ({"time_embedding": "adm"}, "time_embedding must be one of .* got 'adm'"),
        ({"qkv_order": "old"}, "qkv_order must be one of .* got 'old'"),
        ({"null_class": True}, "null_class needs num_classes"),
        ({"context_attention": "appended"}, "'appended' needs context_dim, got None"),
        ({"context_attention": "joint"}, "context_attention must be one of .* got 'joint'"),
        ({"added_layers": 3}, "added_layers must be 0, 1 or 2, got 3"),
        (
            {"added_layers": 0, "added_condition_dim": 20},
            "added_condition_dim must be 64 without added_layers, got 20",
        ),
        ({"learned_sigma": True}, "out_channels must be even with learned_sigma, got 3"),
        ({"dropout": 1.0}, "dropout must be in"),
    ],
)
def test_wrong_config_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIGS["ddpm"], **change)
