"""DiT's and PixArt's blocks with `ada_layer_norm`: results, gradients, what sends them back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdiff
from fastdiff.integrations.diffusers_blocks import BasicTransformerBlock
from fastdiff.kernels import record_backends
from tests.models.test_against_diffusers import assert_equal, peer_model
from tests.models.test_dit import PEER

PIXART = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
    "cross_attention_dim": 16,
    "caption_channels": 12,
    "norm_num_groups": 4,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dit": ("DiTTransformer2DModel", PEER),
    "pixart": ("PixArtTransformer2DModel", PIXART),
}


def model(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    kind, options = MODELS[name]
    made = peer_model(kind, options, dtype)
    with torch.no_grad():  # tables of modulation that begin small would hide mistakes
        for key, parameter in made.named_parameters():
            if "scale_shift_table" in key:
                parameter.add_(torch.randn_like(parameter))
    return made


def call(module: nn.Module, name: str, x: Tensor) -> Tensor:
    t = torch.tensor([3, 700])
    if name == "dit":
        return module(x, timestep=t, class_labels=torch.tensor([1, 10])).sample
    words = torch.linspace(-1, 1, 2 * 5 * 12).reshape(2, 5, 12).to(x)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    extra = {"resolution": None, "aspect_ratio": None}
    return module(
        x,
        encoder_hidden_states=words,
        timestep=t,
        added_cond_kwargs=extra,
        encoder_attention_mask=mask,
    ).sample


def inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", MODELS)
def test_same_outputs_and_gradients(name: str, dtype: torch.dtype) -> None:
    plain = model(name, dtype)
    served = copy.deepcopy(plain)
    report = fastdiff.accelerate(served, strict=True)
    blocks = sum(isinstance(m, BasicTransformerBlock) for m in served.modules())
    assert blocks == MODELS[name][1]["num_layers"]
    assert report.count("transformer block") == (blocks, 0)
    found = []
    for module in (served, plain):
        x = inputs(dtype).requires_grad_()
        with record_backends() as ran:
            y = call(module, name, x)
        assert ("ada_layer_norm" in ran) == (module is served)
        (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y)).sum().backward()
        gradients = {k: p.grad for k, p in module.named_parameters() if p.grad is not None}
        found.append((y.detach(), x.grad, gradients))
    (y, dx, ours), (expected, wanted, theirs) = found
    assert_equal(y, expected)
    assert dx is not None
    assert wanted is not None
    tolerance = 1e-9 if dtype == torch.float64 else 2e-4
    assert (dx - wanted).abs().max() <= tolerance * wanted.abs().max()
    assert ours.keys() == theirs.keys()
    for key, gradient in theirs.items():
        assert gradient is not None
        # softmax does not see a key's bias: its gradient is rounding
        scale = 1.0 if key.endswith("to_k.bias") else float(gradient.abs().max())
        assert (ours[key] - gradient).abs().max() <= tolerance * scale, key


@pytest.mark.parametrize("name", MODELS)
def test_restored_it_is_the_original(name: str) -> None:
    plain = model(name, torch.float32)
    expected = call(plain, name, inputs(torch.float32))
    kinds = [type(m) for m in plain.modules()]
    report = fastdiff.accelerate(plain)
    assert [type(m) for m in plain.modules()] != kinds
    report.restore()
    assert [type(m) for m in plain.modules()] == kinds
    assert torch.equal(call(plain, name, inputs(torch.float32)), expected)


def test_a_hook_on_an_adaptive_norm_is_called() -> None:
    """The block then runs as diffusers wrote it, with the norm's input and its five results."""
    served = model("dit")
    expected = call(served, "dit", inputs())
    fastdiff.accelerate(served)
    seen = []
    norm = served.transformer_blocks[1].norm1
    handle = norm.register_forward_hook(lambda module, args, result: seen.append(len(result)))
    assert_equal(call(served, "dit", inputs()), expected)
    assert seen == [5]
    handle.remove()
    inner = served.transformer_blocks[1].norm3.register_forward_hook(lambda *_: seen.append(0))
    assert_equal(call(served, "dit", inputs()), expected)
    assert seen == [5, 0]
    inner.remove()
    call(served, "dit", inputs())
    assert seen == [5, 0]


def test_adaptive_norms_with_weights_are_left_and_listed() -> None:
    block = model("dit").transformer_blocks[0]
    block.norm3 = nn.LayerNorm(32).double()
    report = fastdiff.accelerate(nn.ModuleList([block]))
    (entry,) = [e for e in report.left if e.op == "transformer block"]
    assert "adaptive norms have weights of their own" in str(entry.reason)


def test_it_can_be_compiled_whole() -> None:
    served = model("dit")
    fastdiff.accelerate(served)
    expected = call(served, "dit", inputs())
    with torch.no_grad():
        block = torch.compile(served.transformer_blocks[0], backend="eager", fullgraph=True)
        h, t, y = torch.randn(2, 16, 32).double(), torch.tensor([3, 7]), torch.tensor([0, 10])
        assert_equal(
            block(h, timestep=t, class_labels=y),
            served.transformer_blocks[0](h, timestep=t, class_labels=y),
        )
    assert expected.isfinite().all()
