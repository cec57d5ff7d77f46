"""Our U-Net and autoencoder equal diffusers' on the same random weights and inputs.

Layouts are the published ones with few channels. fp64 to 1e-10 of the output's size: a wrong
epsilon, a swapped gate or another order of heads cannot hide below that; inputs of size 1e-2 make
epsilons count.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdiff.checkpoint.layouts.diffusers.read import (
    autoencoder_config,
    convert_state_dict,
    unet_config,
)
from fastdiff.models.autoencoder import Autoencoder, Posterior, Quantized
from fastdiff.models.unet import UNet
from fastdiff.runtime import cpu_layers
from fastdiff.runtime.prepare import prepare
from tests.support.peers import import_diffusers

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
CASES = [
    pytest.param(torch.float64, 1.0, id="fp64"),
    pytest.param(torch.float64, 1e-2, id="fp64-small"),
    pytest.param(torch.float32, 1.0, id="fp32"),
]

SD = {  # Stable Diffusion 1: two of its four levels with attention, one without, d = 8
    "sample_size": 16,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (32, 64, 64),
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "norm_num_groups": 32,
}
SDXL = {  # depth per level, the deepest without upsampling; added condition 4 + 6 * 8 = 52
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (32, 64, 128),
    "transformer_layers_per_block": (1, 2, 3),
    "attention_head_dim": (2, 4, 8),
    "use_linear_projection": True,
    "cross_attention_dim": 24,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 52,
}
DDPM = {  # google/ddpm-cifar10-32: sin | cos, asymmetric padding, epsilon 1e-6, one head
    "sample_size": 16,
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
ADM = {  # guided-diffusion: scale-shift norm, residual blocks that resample, classes, learned sigma
    "sample_size": 16,
    "out_channels": 6,
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "resnet_time_scale_shift": "scale_shift",
    "attn_norm_num_groups": 32,
    "attention_head_dim": 16,
    "num_class_embeds": 10,
}
IDDPM = ADM | {  # scale-shift norm, but convolutions that resample
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "downsample_type": "conv",
    "upsample_type": "conv",
    "num_class_embeds": None,
    "layers_per_block": 3,
}
KARLO = {  # unCLIP's decoder: text appended to self-attention, image and text added to the time
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 6,
    "block_out_channels": (32, 64, 96),
    "down_block_types": ("ResnetDownsampleBlock2D",) + ("SimpleCrossAttnDownBlock2D",) * 2,
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D",) * 2 + ("ResnetUpsampleBlock2D",),
    "layers_per_block": 3,
    "attention_head_dim": 16,
    "cross_attention_dim": 24,
    "resnet_time_scale_shift": "scale_shift",
    "class_embed_type": "identity",
}
UNETS: dict[str, tuple[str, dict[str, Any]]] = {
    "karlo": ("UNet2DConditionModel", KARLO),
    "sd1": ("UNet2DConditionModel", SD),
    "sd1-inpaint": ("UNet2DConditionModel", SD | {"in_channels": 9}),
    "sd2": ("UNet2DConditionModel", SD | {"use_linear_projection": True}),
    "sd-classes": ("UNet2DConditionModel", SD | {"num_class_embeds": 10}),
    "sdxl": ("UNet2DConditionModel", SDXL),
    "ddpm": ("UNet2DModel", DDPM),
    "adm": ("UNet2DModel", ADM),
    "iddpm": ("UNet2DModel", IDDPM),
}
VAE = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 2,
}
VQ_ATTENTION = VAE | {  # VQ-f8: attention at the coarsest level
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    "num_vq_embeddings": 64,
}
AUTOENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "kl": ("AutoencoderKL", VAE),
    "vq": ("VQModel", VAE | {"num_vq_embeddings": 64}),
    "vq-attention": ("VQModel", VQ_ATTENTION),
}


def peer_model(class_name: str, options: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    """A diffusers model whose every parameter, norms included, is random."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(import_diffusers(class_name), class_name)(**options)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def config_json(model: nn.Module) -> dict[str, Any]:
    return json.loads(model.to_json_string())


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error <= TOLERANCE[ours.dtype], f"relative error {error:.1e}"


def fold_and_pack_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """`prepare` would leave layers as small as here alone."""
    monkeypatch.setattr(cpu_layers, "PACK_NUMBERS", 0)
    monkeypatch.setattr(cpu_layers, "FOLD_PIXELS", 0)


@pytest.mark.parametrize(("dtype", "size"), CASES)
@pytest.mark.parametrize("name", UNETS)
@torch.no_grad()
def test_unet(name: str, dtype: torch.dtype, size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    class_name, options = UNETS[name]
    theirs = peer_model(class_name, options, dtype)
    ours = UNet(unet_config(config_json(theirs))).to(dtype).eval()
    ours.load_state_dict(convert_state_dict(theirs.state_dict(), ours))
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())

    n, config = 2, ours.config
    # 16 x 8: not square, so that H and W cannot be swapped unseen
    x = size * randn(n, config.in_channels, 16, 8, dtype=dtype)
    t = torch.tensor([981, 3])
    conditions: dict[str, Tensor] = {}
    peer_conditions: dict[str, Any] = {}
    if config.context_dim is not None:
        conditions["context"] = randn(n, 7, config.context_dim, dtype=dtype, seed=1)
        peer_conditions["encoder_hidden_states"] = conditions["context"]
    if config.num_classes is not None:
        conditions["y"] = torch.tensor([9, 2])
        peer_conditions["class_labels"] = conditions["y"]
    if config.added_condition_dim is not None and config.added_layers == 0:
        conditions["added"] = randn(n, 128, dtype=dtype, seed=2)
        peer_conditions["class_labels"] = conditions["added"]
        mask = torch.arange(7) < torch.tensor([[7], [3]])
        peer_conditions["attention_mask"] = mask
        conditions["context"] = ours.project_context(conditions["context"], mask)
    elif config.added_condition_dim is not None:
        text, time_ids = randn(n, 4, dtype=dtype, seed=2), torch.arange(12.0).view(n, 6) * 100
        sizes = theirs.add_time_proj(time_ids.flatten()).view(n, -1).to(dtype)
        conditions["added"] = torch.cat([text, sizes], dim=1)
        added = {"text_embeds": text, "time_ids": time_ids}
        peer_conditions["added_cond_kwargs"] = added
    expected = theirs(x, t, **peer_conditions).sample
    assert_equal(ours(x, t, **conditions), expected)
    if isinstance(conditions.get("context"), Tensor):
        conditions["context"] = ours.project_context(conditions["context"])
        assert_equal(ours(x, t, **conditions), expected)
    fold_and_pack_everything(monkeypatch)
    assert_equal(prepare(ours, dtype=dtype)(x, t, **conditions), expected)


@pytest.mark.parametrize("height_width", [(9, 7), (5, 8), (6, 1)], ids=str)
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
@torch.no_grad()
def test_unet_of_sizes_that_do_not_halve(name: str, height_width: tuple[int, int]) -> None:
    """diffusers brings the way up back to the sizes of the way down; so does ours."""
    class_name, options = UNETS[name]
    theirs = peer_model(class_name, options, torch.float64)
    ours = UNet(unet_config(config_json(theirs))).double().eval()
    ours.load_state_dict(convert_state_dict(theirs.state_dict(), ours))
    x, t = randn(2, 4, *height_width, dtype=torch.float64), torch.tensor([981, 3])
    context = randn(2, 7, 24, dtype=torch.float64, seed=1)
    text, added = randn(2, 4, dtype=torch.float64, seed=2), None
    peer: dict[str, Any] = {}
    if name == "sdxl":
        ids = torch.arange(12.0).view(2, 6) * 100
        sizes = theirs.add_time_proj(ids.flatten()).view(2, -1).double()
        added, peer["added_cond_kwargs"] = (
            torch.cat([text, sizes], dim=1),
            {"text_embeds": text, "time_ids": ids},
        )
    expected = theirs(x, t, encoder_hidden_states=context, **peer).sample
    assert expected.shape == x.shape
    assert_equal(ours(x, t, context=context, added=added), expected)
    prepared = prepare(ours, dtype=torch.float64)
    assert_equal(prepared(x, t, context=context, added=added), expected)


@pytest.mark.parametrize(("dtype", "size"), CASES)
@pytest.mark.parametrize("name", AUTOENCODERS)
@torch.no_grad()
def test_autoencoder(
    name: str, dtype: torch.dtype, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    class_name, options = AUTOENCODERS[name]
    theirs = peer_model(class_name, options, dtype)
    if class_name == "VQModel":  # codes as far apart as the latents are
        theirs.quantize.embedding.weight.copy_(randn(64, 3, dtype=dtype, seed=3))
    ours = Autoencoder(autoencoder_config(config_json(theirs))).to(dtype).eval()
    ours.load_state_dict(convert_state_dict(theirs.state_dict(), ours))
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())

    x = size * randn(2, 3, 16, 8, dtype=dtype)
    latent, encoded = ours.encode(x), theirs.encode(x)
    if isinstance(latent, Posterior):
        assert_equal(latent.mean, encoded.latent_dist.mean)
        assert_equal(latent.logvar, encoded.latent_dist.logvar)
        assert_equal(latent.kl(), encoded.latent_dist.kl())
        noise = randn(*latent.mean.shape, dtype=dtype, seed=4)
        assert_equal(
            ours.encode_latent(x, noise),
            encoded.latent_dist.mean + encoded.latent_dist.std * noise,
        )
    else:
        assert isinstance(latent, Quantized)
        assert_equal(latent.z, encoded.latents)
        codes, loss, (_, _, indices) = theirs.quantize(encoded.latents)
        assert torch.equal(latent.indices.flatten(), indices)
        assert_equal(latent.z_q, codes)
        # the order of the published models: diffusers' default is legacy
        assert_equal(latent.loss(0.25, "legacy"), loss)
    z = size * randn(2, ours.config.latent_channels, 8, 4, dtype=dtype, seed=5)
    expected = theirs.decode(z).sample
    assert_equal(ours.decode(z), expected)
    fold_and_pack_everything(monkeypatch)
    assert_equal(prepare(ours, dtype=dtype).decode(z), expected)


def test_weights_that_do_not_fit_are_listed() -> None:
    theirs = peer_model("AutoencoderKL", VAE, torch.float32)
    ours = Autoencoder(autoencoder_config(config_json(theirs)))
    state = theirs.state_dict()
    state["encoder.conv_in.weights"] = state.pop("encoder.conv_in.weight")
    state["decoder.conv_out.bias"] = torch.zeros(5)
    with pytest.raises(ValueError, match="weights of this Autoencoder") as error:
        convert_state_dict(state, ours)
    message = str(error.value)
    assert "\n" not in message
    assert "encoder.conv_in.weights is unknown" in message
    assert "encoder.conv_in.weight is missing" in message
    assert "decoder.conv_out.bias has shape (5,), expected (3,)" in message


def test_attention_names_of_old_files_are_read() -> None:
    theirs = peer_model("AutoencoderKL", VAE, torch.float32)
    ours = Autoencoder(autoencoder_config(config_json(theirs)))
    renamed = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = theirs.state_dict()
    old = dict(state)
    for new_name, old_name in renamed.items():
        old = {key.replace(f".{new_name}.", f".{old_name}."): value for key, value in old.items()}
    assert old.keys() != state.keys()
    converted, expected = convert_state_dict(old, ours), convert_state_dict(state, ours)
    assert all(torch.equal(converted[key], expected[key]) for key in ours.state_dict())


@pytest.mark.parametrize(
    ("class_name", "change", "message"),
    [
        (
            "UNet2DConditionModel",
            {"act_fn": "gelu"},
            "act_fn must be 'silu' or 'swish', got 'gelu'",
        ),
        ("UNet2DConditionModel", {"dual_cross_attention": True}, "dual_cross_attention must be"),
        ("UNet2DConditionModel", {"freq_shift": 1}, "freq_shift must be 0 with flip_sin_to_cos"),
        ("UNet2DConditionModel", {"class_embed_type": "timestep"}, "class_embed_type must be"),
        (
            "UNet2DConditionModel",
            {"mid_block_only_cross_attention": True},
            "mid_block_only_cross_attention must be absent or off",
        ),
        # the last level has no attention, but the middle has its heads: 32 wide, the others 8
        (
            "UNet2DConditionModel",
            {"attention_head_dim": (4, 8, 2)},
            "attention_head_dim must be one number of heads, or one width of head",
        ),
        ("UNet2DConditionModel", {"block_out_channels": None}, "block_out_channels is missing"),
        ("UNet2DConditionModel", {"layers_per_block": None}, "layers_per_block is missing"),
        ("UNet2DConditionModel", {"_class_name": "DiT"}, "_class_name must be"),
    ],
)
def test_options_that_we_do_not_have_are_named(
    class_name: str, change: dict[str, Any], message: str
) -> None:
    data = {"_class_name": class_name, "in_channels": 4, "out_channels": 4, "layers_per_block": 2}
    with pytest.raises(ValueError, match=message):
        unet_config(data | SD | change)
    unet_config(data | SD)
