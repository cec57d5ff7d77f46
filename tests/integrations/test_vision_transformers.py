"""Blocks of DiT, PixArt, SD3 and Flux with our ops: results, gradients, what sends them back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdiff
from fastdiff.integrations.diffusers_blocks import (
    BasicTransformerBlock,
    JointTransformerBlock,
    gated,
    modulated,
)
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
SD3 = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "sample_size": 8,
    "patch_size": 2,
    "joint_attention_dim": 12,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 10,
    "pos_embed_max_size": 8,
}
FLUX = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 2,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 10,
    "axes_dims_rope": [4, 4, 8],
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dit": ("DiTTransformer2DModel", PEER),
    "pixart": ("PixArtTransformer2DModel", PIXART),
    "sd3": ("SD3Transformer2DModel", SD3),
    "sd3.5": ("SD3Transformer2DModel", {**SD3, "dual_attention_layers": (0, 1)}),
    "flux": ("FluxTransformer2DModel", FLUX),
}
SERVED = {"dit": 3, "pixart": 2, "sd3": 3, "sd3.5": 3, "flux": 0}
"""Model -> transformer blocks that are swapped. Of Flux's blocks only the norms are."""
WITHOUT_REST = ("dit", "pixart")
"""Models of which nothing is left; the others have attentions of their own."""


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
    pooled = torch.linspace(1, -1, 20).reshape(2, 10).to(x)
    if name.startswith("sd3"):
        said = {"encoder_hidden_states": words, "pooled_projections": pooled}
        return module(x, timestep=t, **said).sample
    if name == "flux":
        tokens = x.flatten(2).mT  # (2, 64, 4)
        places = torch.stack([torch.arange(64) * k for k in (0, 1, 2)], dim=1).to(x)
        return module(
            tokens,
            encoder_hidden_states=words,
            pooled_projections=pooled,
            timestep=t / 1000,
            img_ids=places,
            txt_ids=places[:5] * 0,
        ).sample
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
    report = fastdiff.accelerate(served, strict=name in WITHOUT_REST)
    kinds = BasicTransformerBlock, JointTransformerBlock
    blocks = sum(isinstance(m, kinds) for m in served.modules())
    assert blocks == SERVED[name]
    assert report.count("transformer block") == (blocks, 0)
    assert report.count("adaptive norm")[1] == 0
    found = []
    for module in (served, plain):
        x = inputs(dtype).requires_grad_()
        with record_backends() as ran:
            y = call(module, name, x)
        assert ("ada_layer_norm" in ran) == (module is served)
        assert ("gate_residual" in ran) == (module is served and bool(blocks))
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


@pytest.mark.parametrize("name", ["sd3", "sd3.5"])
def test_hooks_inside_sd3s_blocks_are_called(name: str) -> None:
    """On an adaptive norm, on the norm inside it, and on the block's own norm before the MLP."""
    served = model(name)
    expected = call(served, name, inputs())
    fastdiff.accelerate(served)
    block, seen = served.transformer_blocks[0], []
    for part in (block.norm1, block.norm1_context.norm, block.norm2):
        handle = part.register_forward_hook(lambda module, *_: seen.append(module))
        assert_equal(call(served, name, inputs()), expected)
        assert seen.pop() is part
        handle.remove()
    call(served, name, inputs())
    assert not seen


def test_chunked_feed_forward_runs_as_diffusers_wrote_it() -> None:
    served = model("sd3")
    served.enable_forward_chunking(chunk_size=1, dim=1)
    expected = call(served, "sd3", inputs())
    fastdiff.accelerate(served)
    with record_backends() as ran:
        assert_equal(call(served, "sd3", inputs()), expected)
    assert "gate_residual" not in ran


def test_other_norms_under_an_adaptive_one_are_left_and_listed() -> None:
    from diffusers.models.normalization import AdaLayerNormContinuous as Theirs

    norms = nn.ModuleList(
        [Theirs(8, 6, norm_type="rms_norm"), Theirs(8, 6), Theirs(8, 6, elementwise_affine=False)]
    )
    x, emb = torch.randn(2, 5, 8), torch.randn(2, 6)
    expected = [norm(x, emb) for norm in norms]
    report = fastdiff.accelerate(norms)
    left = [str(entry.reason) for entry in report.left if entry.op == "adaptive norm"]
    assert [type(norm) is Theirs for norm in norms] == [True, True, False]
    assert "RMSNorm" in left[0]
    assert "weights of its own" in left[1]
    for norm, plain in zip(norms, expected, strict=True):
        assert_equal(norm(x, emb), plain)


@pytest.mark.parametrize("shape", [(1, 6), (2, 6)])
def test_dtypes_and_shapes_that_pytorch_broadcasts(shape: tuple[int, int]) -> None:
    """One embedding for all samples, or a scale in fp32 on bf16 tokens, which PyTorch widens."""
    from diffusers.models.normalization import AdaLayerNormContinuous as Theirs

    plain = Theirs(8, 6, elementwise_affine=False)
    norm = copy.deepcopy(plain)
    fastdiff.accelerate(nn.ModuleList([norm]), strict=True)
    x, emb = torch.randn(2, 5, 8), torch.randn(*shape)
    assert_equal(norm(x, emb), plain(x, emb))
    scale, shift = torch.randn(2, 2, 8)
    narrow = x.bfloat16()
    found = modulated(nn.LayerNorm(8, elementwise_affine=False), narrow, scale, shift)
    assert found.dtype == torch.float32
    assert gated(narrow, scale, narrow).dtype == torch.float32
