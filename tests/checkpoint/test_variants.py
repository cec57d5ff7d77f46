"""Variants of the published architectures that few files have, each against diffusers' layers.

ADM-512's narrow first level, changes of resolution without convolutions, first stages without
attention, and the list that the trainer of DDIM's authors saves.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdiff
from fastdiff.checkpoint.layouts.diffusers.write import save_diffusers
from fastdiff.checkpoint.save import save
from fastdiff.checkpoint.weights import Weights
from fastdiff.diffusion.schedules import ScheduleConfig
from fastdiff.models.unet import UNet, UNetConfig
from tests.checkpoint import layouts
from tests.checkpoint.pipelines import pipeline
from tests.checkpoint.test_open import (
    DTYPES,
    OriginalSinusoid,
    compvis_state,
    openai_by_width,
    same_autoencoder,
    same_unet,
)
from tests.models.test_against_diffusers import ADM, DDPM, IDDPM, VAE, peer_model

NO_ATTENTION = VAE | {"mid_block_add_attention": False}


def with_wide_embedding(width: int) -> Any:
    """diffusers' ADM, whose time embedding is computed from `width` sinusoids.

    guided-diffusion's 512x512 model has 256 with a first level of 128 channels.
    """
    from diffusers.models.embeddings import TimestepEmbedding, Timesteps

    theirs: Any = peer_model("UNet2DModel", ADM, torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        theirs.time_proj = Timesteps(width, True, 0)
        theirs.time_embedding = TimestepEmbedding(width, 4 * width)
        theirs.class_embedding = nn.Embedding(10, 4 * width)
        for module in theirs.modules():
            if (layer := getattr(module, "time_emb_proj", None)) is not None:
                module.time_emb_proj = nn.Linear(4 * width, layer.out_features)
    return theirs.double().eval()


def without_convolutions(options: dict[str, Any]) -> Any:
    """diffusers' network with its own layers for conv_resample=False between the levels."""
    from diffusers.models.downsampling import Downsample2D
    from diffusers.models.upsampling import Upsample2D

    theirs: Any = peer_model("UNet2DModel", options, torch.float64)
    for blocks, name, kind in (
        (theirs.down_blocks, "downsamplers", Downsample2D),
        (theirs.up_blocks, "upsamplers", Upsample2D),
    ):
        for block in blocks:
            for layer in getattr(block, name, None) or ():
                index = list(getattr(block, name)).index(layer)
                getattr(block, name)[index] = kind(layer.channels, use_conv=False)
    return theirs.eval()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_first_level_narrower_than_the_embedding(dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = with_wide_embedding(64)
    torch.save(openai_by_width(theirs.state_dict(), 2, 16, "legacy"), tmp_path / "model")
    model = fastdiff.load(
        tmp_path / "model", dtype=dtype, head_dim=16, qkv_order="legacy", image_size=16
    )
    same_unet(model.denoiser, theirs)
    assert model.denoiser is not None
    config = model.denoiser.config
    assert (config.model_channels, config.time_channels, config.emb_dim) == (32, 64, 256)
    with pytest.raises(ValueError, match="no U-Net with time_channels 64, expected 32"):
        save_diffusers(model, tmp_path / "folder")
    save(model, tmp_path / "bundle")
    again = fastdiff.load(tmp_path / "bundle", dtype=dtype)
    same_unet(again.denoiser, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_openais_conv_resample_false(dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = without_convolutions(IDDPM)
    state = openai_by_width(theirs.state_dict(), 3, 16, "new")
    assert not any(".op." in key or "input_blocks.4." in key for key in state)
    torch.save(state, tmp_path / "model")
    model = fastdiff.load(tmp_path / "model", dtype=dtype, head_dim=16, qkv_order="new")
    same_unet(model.denoiser, theirs)
    assert model.denoiser is not None
    assert not model.denoiser.config.conv_resample
    assert model.denoiser.config.size_multiple == 4
    with pytest.raises(ValueError, match="no U-Net with conv_resample False, expected True"):
        save_diffusers(model, tmp_path / "folder")


def test_without_convolutions_odd_sides_are_refused(tmp_path: Path) -> None:
    """A mean of 2x2 squares drops the last row of an odd side, so the way up could not meet it."""
    config = UNetConfig(
        in_channels=3,
        out_channels=3,
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_depth=(0, 0),
        head_dim=16,
        conv_resample=False,
    )
    unet = UNet(config)
    with pytest.raises(ValueError, match="multiple"):
        unet(torch.zeros(1, 3, 9, 8), torch.tensor([1]))
    with pytest.raises(ValueError, match="no meaning with resblock_updown=True"):
        UNetConfig(**{**vars(config), "resblock_updown": True})


@pytest.mark.parametrize("stray", ["input_blocks.4.0.op.weight", "output_blocks.3.1.conv.weight"])
def test_half_of_the_convolutions_missing(
    stray: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that lost some of its tensors is not one without convolutions."""
    state = openai_by_width(without_convolutions(IDDPM).state_dict(), 3, 16, "new")
    torch.save({**state, stray: torch.zeros(32, 32, 3, 3)}, tmp_path / "model")
    monkeypatch.setattr(Weights, "copy_into", None)  # whoever reads a number fails
    with pytest.raises(ValueError, match="expected a U-Net, got"):
        fastdiff.load(tmp_path / "model", head_dim=16, qkv_order="new")


def ddpm_peer(*, resampled: bool = True) -> Any:
    theirs: Any = peer_model("UNet2DModel", DDPM, torch.float64)
    if not resampled:
        theirs = without_convolutions(DDPM)
    theirs.time_proj = OriginalSinusoid(theirs.config.block_out_channels[0])
    return theirs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ddpms_resamp_with_conv_false(dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = ddpm_peer(resampled=False)
    torch.save(layouts.ddpm(theirs.state_dict(), 3), tmp_path / "model")
    model = fastdiff.load(tmp_path / "model", dtype=dtype)
    same_unet(model.denoiser, theirs)
    assert model.denoiser is not None
    assert not model.denoiser.config.conv_resample


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_the_list_of_ddims_trainer(parallel: bool, legacy: bool, tmp_path: Path) -> None:
    theirs = ddpm_peer()
    named = layouts.ddpm(theirs.state_dict(), 3)
    raw = {key: value + 0.1 for key, value in named.items()}
    states = layouts.ddim_list(raw, named, epoch=7, step=5000, parallel=parallel)
    path = tmp_path / "ckpt.pth"
    torch.save(states, path, _use_new_zipfile_serialization=not legacy)

    model = fastdiff.load(path, dtype=torch.float64)
    same_unet(model.denoiser, theirs)  # the averages
    assert (model.layout, model.schedule) == ("ddpm", ScheduleConfig())
    told = {key: model.provenance[key] for key in ("epoch", "step", "averaged weights")}
    assert told == {"epoch": 7, "step": 5000, "averaged weights": True}

    trained = copy.deepcopy(theirs)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.1)
    model = fastdiff.load(path, dtype=torch.float64, ema=False)
    same_unet(model.denoiser, trained)
    assert model.provenance["averaged weights"] is False


def test_a_list_without_averages(tmp_path: Path) -> None:
    theirs = ddpm_peer()
    named = layouts.ddpm(theirs.state_dict(), 3)
    torch.save(layouts.ddim_list(named, None, epoch=1, step=2), tmp_path / "x")
    model = fastdiff.load(tmp_path / "x", dtype=torch.float64)
    same_unet(model.denoiser, theirs)
    assert model.provenance["averaged weights"] is False


def test_lists_that_do_not_fit(tmp_path: Path) -> None:
    named = layouts.ddpm(ddpm_peer().state_dict(), 3)
    path = tmp_path / "x"

    def refused(value: object, message: str) -> None:
        torch.save(value, path)
        with pytest.raises(ValueError, match=message) as error:
            fastdiff.load(path)
        assert "\n" not in str(error.value)

    partial = {key: value for key, value in named.items() if "conv_in" not in key}
    refused(
        layouts.ddim_list(named, partial, epoch=1, step=2),
        r"averaged weights are missing: conv_in\.bias, conv_in\.weight; set ema=False",
    )
    stray = {**named, "logvar": torch.zeros(1000)}  # the "bayesian" model of the same program
    refused(layouts.ddim_list(stray, None, epoch=1, step=2), "logvar is unknown")
    refused([named["conv_in.bias"], {}], "expected a dictionary of tensors .*got a list of 2")
    refused([{"a": torch.zeros(1)}, 3], r"tensors of no known layout: 0\.a")


def compvis_first_stage(theirs: Any) -> dict[str, Tensor]:
    return layouts.ddpm(theirs.state_dict(), 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["AutoencoderKL", "VQModel"])
def test_first_stages_without_attention(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    options = NO_ATTENTION | ({"num_vq_embeddings": 64} if kind == "VQModel" else {})
    theirs: Any = peer_model(kind, options, torch.float64)
    torch.save(compvis_first_stage(theirs), tmp_path / "model")
    model = fastdiff.load(tmp_path / "model", dtype=dtype)
    same_autoencoder(model.autoencoder, theirs)
    assert model.autoencoder is not None
    assert not model.autoencoder.config.middle_attention

    theirs.save_pretrained(tmp_path / "folder")
    same_autoencoder(fastdiff.load(tmp_path / "folder", dtype=dtype).autoencoder, theirs)
    save_diffusers(model, tmp_path / "ours")
    assert (
        json.loads((tmp_path / "ours" / "config.json").read_text())["mid_block_add_attention"]
        is False
    )
    same_autoencoder(fastdiff.load(tmp_path / "ours", dtype=dtype).autoencoder, theirs)


def test_a_first_stage_that_is_also_the_conditioner(tmp_path: Path) -> None:
    """LDM's inpainting_big: the same module under two names, a U-Net with 7 channels."""
    models = pipeline("ldm", tmp_path / "m", torch.float64)
    state = compvis_state("ldm", models)
    first = {k: v for k, v in state.items() if k.startswith("first_stage_model.")}
    second = {k.replace("first_stage_model.", "cond_stage_model."): v for k, v in first.items()}
    torch.save({**state, **second}, tmp_path / "x")
    model = fastdiff.load(tmp_path / "x", dtype=torch.float64)
    same_autoencoder(model.autoencoder, models["vqvae"])
    same_unet(model.denoiser, models["unet"])
    assert "the masked one" in model.provenance["condition"]
    other = {key: value.clone() for key, value in second.items()}
    torch.save({**state, **other}, tmp_path / "x")  # another network of the same shapes
    with pytest.raises(ValueError, match="which CLIP does not have"):
        fastdiff.load(tmp_path / "x", dtype=torch.float64)
