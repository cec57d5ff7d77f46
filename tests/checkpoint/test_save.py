"""diffusers loads what fastdiff saves and computes the same; loading it again is bit-exact."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fastdiff
from fastdiff.checkpoint.layouts.bundle import load_bundle, save_bundle
from fastdiff.checkpoint.layouts.diffusers.read import unet_config
from fastdiff.checkpoint.layouts.diffusers.write import save_diffusers, unet_options
from fastdiff.checkpoint.model import Model
from fastdiff.cli import main
from fastdiff.diffusion.schedules import ScheduleConfig
from fastdiff.models.autoencoder import Autoencoder, AutoencoderConfig
from fastdiff.models.presets import UNETS
from fastdiff.models.unet import UNet, UNetConfig
from tests.checkpoint import layouts
from tests.checkpoint.pipelines import VAE_KL, pipeline, text_model, tokenizer
from tests.checkpoint.test_open import (
    KINDS,
    compvis_state,
    same,
    same_autoencoder,
    same_text,
    same_unet,
)
from tests.models.test_against_diffusers import ADM, SDXL, assert_equal, peer_model
from tests.support.peers import import_diffusers
from tests.support.tiny import randomize

Models = dict[str, nn.Module]
Saved = Callable[[str], tuple[Path, Models]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    made: dict[str, tuple[Path, Models]] = {}

    def get(kind: str) -> tuple[Path, Models]:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind) / "pipeline"
            made[kind] = folder, pipeline(kind, folder, torch.float32)
        return made[kind]

    return get


def identical(one: nn.Module | None, other: nn.Module | None) -> None:
    assert one is not None
    assert other is not None
    state, again = one.state_dict(), other.state_dict()
    assert state.keys() == again.keys()
    for key, value in state.items():
        assert value.dtype == again[key].dtype
        assert torch.equal(value, again[key]), key


def loaded_by_diffusers(folder: Path) -> Any:
    diffusers: Any = import_diffusers("DiffusionPipeline")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipeline_comes_back(saved: Saved, kind: str, tmp_path: Path) -> None:
    folder, models = saved(kind)
    checkpoint = fastdiff.load(folder)
    save_diffusers(checkpoint, tmp_path / "again")
    again = fastdiff.load(tmp_path / "again")
    identical(checkpoint.denoiser, again.denoiser)
    identical(checkpoint.autoencoder, again.autoencoder)
    for one, other in zip(checkpoint.text_encoders, again.text_encoders, strict=True):
        identical(one.model, other.model)
        assert (one.skip, one.final_norm, one.pooled) == (
            other.skip,
            other.final_norm,
            other.pooled,
        )
        ids = "a quick brown fox"
        assert one.tokenizer(ids).input_ids == other.tokenizer(ids).input_ids
    for name in ("schedule", "prediction", "sampler", "scale_factor", "image_size"):
        assert getattr(checkpoint, name) == getattr(again, name), name
    # the very tensors of the pipeline, under the very names
    for name in ("unet", "vae", "vqvae"):
        if (folder / name).is_dir():
            file = "diffusion_pytorch_model.safetensors"
            theirs, ours = (
                load_file(folder / name / file),
                load_file(tmp_path / "again" / name / file),
            )
            assert theirs.keys() == ours.keys()
            assert all(torch.equal(value, ours[key]) for key, value in theirs.items())
    loaded = loaded_by_diffusers(tmp_path / "again")
    assert type(loaded).__name__ == type_of(kind)
    same(again, {name: getattr(loaded, name) for name in models})


def type_of(kind: str) -> str:
    return {
        "sdxl": "StableDiffusionXLPipeline",
        "ldm": "LDMPipeline",
        "sd1-inpaint": "StableDiffusionInpaintPipeline",
    }.get(kind, "StableDiffusionPipeline")


def test_sdxls_refiner_as_a_single_file(tmp_path: Path) -> None:
    """One text encoder, the second; diffusers' pipeline asks for a score among the sizes."""
    options = {**SDXL, "cross_attention_dim": 16, "projection_class_embeddings_input_dim": 44}
    unet = peer_model("UNet2DConditionModel", options, torch.float32)
    vae = peer_model("AutoencoderKL", VAE_KL, torch.float32)
    text = text_model(
        "CLIPTextModelWithProjection", 16, 3, torch.float32, projection_dim=4, hidden_act="gelu"
    )
    state = {}
    for prefix, part in (
        ("model.diffusion_model.", layouts.openai_unet(unet.state_dict(), 2)),
        ("first_stage_model.", layouts.ddpm(vae.state_dict(), 2)),
        ("conditioner.embedders.0.model.", layouts.open_clip(text.state_dict())),
    ):
        state |= {prefix + key: value.clone() for key, value in part.items()}
    save_file(state, tmp_path / "x")
    tokenizer(tmp_path / "words")
    checkpoint = fastdiff.load(tmp_path / "x", head_dim=16, tokenizer=tmp_path / "words")
    same_text(checkpoint.text_encoders[0].model, text)
    checkpoint.provenance["addition_time_embed_dim"] = 8  # 256 in the published model
    for name in ("first", "again"):
        save_diffusers(checkpoint, tmp_path / name)
        loaded = loaded_by_diffusers(tmp_path / name)
        assert type(loaded).__name__ == "StableDiffusionXLImg2ImgPipeline"
        assert loaded.config.requires_aesthetics_score is True
        assert loaded.text_encoder is None
        same_text(loaded.text_encoder_2, text)
        assert torch.equal(loaded.unet.conv_out.weight, unet.conv_out.weight)
        checkpoint = fastdiff.load(tmp_path / name)
        assert checkpoint.provenance["requires_aesthetics_score"] is True


def test_a_legacy_attention_order_is_put_right(tmp_path: Path) -> None:
    """OpenAI's rows (H, 3, d) become diffusers' q, k and v."""
    theirs = peer_model("UNet2DModel", ADM, torch.float32)
    state = layouts.openai_unet(theirs.state_dict(), 2, 4, "legacy")
    torch.save(state, tmp_path / "model")
    checkpoint = fastdiff.load(tmp_path / "model", head_dim=16, qkv_order="legacy")
    save_diffusers(checkpoint, tmp_path / "folder")
    loaded = loaded_by_diffusers(tmp_path / "folder")
    assert type(loaded).__name__ == "DDPMPipeline"
    for key, value in theirs.state_dict().items():
        assert torch.equal(loaded.unet.state_dict()[key], value), key
    again = fastdiff.load(tmp_path / "folder", dtype=torch.float64)
    same_unet(again.denoiser, theirs)
    assert again.schedule is not None


NOT_IN_DIFFUSERS = {
    "iddpm-imagenet64": "num_heads 4",  # at levels of several widths
    "ldm4-inpainting-big": "num_heads 8",  # the same
    "adm-imagenet512": "time_channels 256, expected 128",  # a sinusoid twice its first level
    "emoji": "added_layers 1",  # one linear layer for the mean of a caption's tokens
    "scenes": "added_layers 1",
    "glide": "added_layers 1",  # one linear layer for the pooled text
    "glide-inpaint": "added_layers 1",
    "glide-upsampler": "added_layers 1",
}


@pytest.mark.parametrize("name", sorted(UNETS.keys() - NOT_IN_DIFFUSERS.keys()))
def test_published_architectures_have_a_config_of_diffusers(name: str) -> None:
    """Read back, each is itself, but for what diffusers keeps elsewhere or not at all."""
    config = UNETS[name]
    again = unet_config(unet_options(config, linear_projections=False))
    for width, depth in zip(config.widths, config.attention_depth, strict=True):
        assert not depth or again.heads(width) == config.heads(width)
    assert again.heads(config.widths[-1]) == config.heads(config.widths[-1])
    classes = None if config.num_classes is None else config.num_classes + config.null_class
    kept = replace(
        config,
        learned_sigma=config.learned_sigma and config.context_attention == "appended",
        qkv_order="new",
        null_class=False,
        num_classes=classes,
    )
    assert replace(again, num_heads=1, head_dim=None) == replace(kept, num_heads=1, head_dim=None)


@pytest.mark.parametrize(("name", "what"), NOT_IN_DIFFUSERS.items())
def test_architectures_that_diffusers_cannot_describe(name: str, what: str) -> None:
    with pytest.raises(ValueError, match=f"diffusers has no U-Net with {what}"):
        unet_options(UNETS[name], linear_projections=False)


def test_the_shipped_model_in_diffusers(tmp_path: Path) -> None:
    """Classes and a KL autoencoder: LDMPipeline's parts, and the same numbers."""
    checkpoint = fastdiff.load("digits")
    save_diffusers(checkpoint, tmp_path / "digits")
    loaded = loaded_by_diffusers(tmp_path / "digits")
    again = fastdiff.load(tmp_path / "digits")
    identical(checkpoint.denoiser, again.denoiser)
    identical(checkpoint.autoencoder, again.autoencoder)
    assert (again.scale_factor, again.schedule) == (checkpoint.scale_factor, checkpoint.schedule)
    x, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 10])
    t = torch.tensor([3, 700])
    assert checkpoint.denoiser is not None
    assert checkpoint.autoencoder is not None
    with torch.no_grad():
        assert_equal(checkpoint.denoiser(x, t, y=y), loaded.unet(x, t, class_labels=y).sample)
        assert_equal(checkpoint.autoencoder.decode(x), loaded.vqvae.decode(x).sample)


def test_half_precision_and_an_autoencoder_alone(saved: Saved, tmp_path: Path) -> None:
    folder, models = saved("sd1")
    checkpoint = fastdiff.load(folder / "vae")
    save_diffusers(checkpoint, tmp_path / "vae", dtype=torch.float16)
    state = load_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    for key, value in models["vae"].state_dict().items():
        assert torch.equal(state[key], value.half()), key
    again = fastdiff.load(tmp_path / "vae", dtype=torch.float64)
    diffusers: Any = import_diffusers("AutoencoderKL")
    same_autoencoder(again.autoencoder, diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae"))


def test_a_bundle_and_back(saved: Saved, tmp_path: Path) -> None:
    folder, _ = saved("ldm")
    checkpoint = fastdiff.load(folder)
    weights_hash = save_bundle(checkpoint, tmp_path / "bundle")
    assert load_bundle(tmp_path / "bundle").weights_hash == weights_hash
    again = fastdiff.load(tmp_path / "bundle")
    identical(checkpoint.denoiser, again.denoiser)
    identical(checkpoint.autoencoder, again.autoencoder)
    assert again.schedule == checkpoint.schedule
    text, _ = saved("sd1")
    with pytest.raises(ValueError, match="load them with image_size="):
        save_bundle(fastdiff.load(text / "vae"), tmp_path / "no")
    vae = fastdiff.load(text / "vae", image_size=48)
    save_bundle(vae, tmp_path / "vae")
    assert fastdiff.load(tmp_path / "vae").image_size == 48
    with pytest.raises(ValueError, match="cannot contain text encoders"):
        save_bundle(fastdiff.load(text), tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_what_diffusers_lacks_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    config = UNetConfig(
        in_channels=3,
        out_channels=3,
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_depth=(1, 1),
        num_heads=4,
    )
    unet = UNet(config)
    checkpoint = Model(layout="", denoiser=unet, schedule=ScheduleConfig())
    with pytest.raises(ValueError, match="diffusers has no U-Net with num_heads 4"):
        save_diffusers(checkpoint, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_convert(saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`fastdiff convert` on a single file: diffusers loads it, and assumptions are printed."""
    folder, models = saved("sd1")
    source = tmp_path / "any.name"
    torch.save({"state_dict": compvis_state("sd1", models)}, source)
    target = tmp_path / "out"
    words = ["convert", str(source), str(target), "--prediction", "v", "--num-heads", "4"]
    words += ["--tokenizer", str(folder.parent / "words"), "--scale-factor", "0.5"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "compvis" in out
    assert "assumed schedule" in out
    assert "assumed prediction" not in out
    loaded = loaded_by_diffusers(target)
    assert loaded.vae.config.scaling_factor == 0.5
    assert loaded.scheduler.config.prediction_type == "v_prediction"
    for key, value in models["unet"].state_dict().items():
        assert torch.equal(loaded.unet.state_dict()[key], value), key
    assert main(words) == 2
    assert "already exists" in capsys.readouterr().err
    half = ["convert", str(target), str(tmp_path / "half"), "--dtype", "fp16"]
    assert main(half) == 0
    state = load_file(tmp_path / "half" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float16}
    text = load_file(tmp_path / "half" / "text_encoder" / "model.safetensors")
    assert {value.dtype for value in text.values()} == {torch.float16}
    assert main(["convert", str(target), str(tmp_path / "b"), "--to", "bundle"]) == 0
    assert "text encoders, which a bundle cannot store" in capsys.readouterr().out
    assert fastdiff.load(tmp_path / "b").layout == "bundle"


def test_an_autoencoder_of_every_kind_has_a_config(tmp_path: Path) -> None:
    for index, config in enumerate(
        (
            AutoencoderConfig(
                model_channels=32,
                channel_mult=(1, 2),
                num_res_blocks=1,
                attention=(False, False),
            ),
            AutoencoderConfig(
                regularization="vq",
                model_channels=32,
                channel_mult=(1, 2),
                latent_channels=3,
                attention=(False, True),
                codebook_size=16,
                norm_groups=16,
            ),
        )
    ):
        model = Autoencoder(config)
        randomize(model, index)
        save_diffusers(
            Model(layout="", autoencoder=model.eval(), scale_factor=0.5), tmp_path / str(index)
        )
        again = fastdiff.load(tmp_path / str(index))
        identical(model, again.autoencoder)
        assert again.autoencoder is not None
        assert again.autoencoder.config == config
        assert again.scale_factor == 0.5
