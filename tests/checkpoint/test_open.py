"""Whatever layout a checkpoint has, our outputs equal diffusers' on the same weights.

Pipelines are saved by diffusers; files of other layouts are made from the same weights by
`layouts.py`. fp64 to 1e-10 and fp32 to 1e-5 of the output's size.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import fastdiff
from fastdiff.checkpoint.model import Model
from fastdiff.checkpoint.save import save
from fastdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig
from fastdiff.models.autoencoder import Autoencoder, Posterior
from fastdiff.models.unet import UNet
from tests.checkpoint import layouts
from tests.checkpoint.pipelines import LDM, pipeline
from tests.models.test_against_diffusers import (
    ADM,
    DDPM,
    IDDPM,
    VAE,
    assert_equal,
    peer_model,
    randn,
)

SD_SCHEDULE = ScheduleConfig(kind="scaled_linear", beta_start=0.00085, beta_end=0.012)
KINDS = ("sd1", "sd1-inpaint", "sd2", "sdxl", "ldm")
DTYPES = (torch.float64, torch.float32)
Models = dict[str, nn.Module]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Models]]:
    made: dict[str, tuple[Path, Models]] = {}

    def get(kind: str) -> tuple[Path, Models]:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind) / "pipeline"
            made[kind] = folder, pipeline(kind, folder)
        return made[kind]

    return get


@torch.no_grad()
def same_unet(ours: UNet | None, theirs: Any) -> None:
    """Two samples of 16 x 8 with every condition that the U-Net has."""
    assert ours is not None
    assert not ours.training
    config = ours.config
    dtype = next(ours.parameters()).dtype
    theirs = copy.deepcopy(theirs).to(dtype)  # fp32 and back would lose digits
    x, t = randn(2, config.in_channels, 16, 8, dtype=dtype), torch.tensor([981, 3])
    mine: dict[str, Any] = {}
    peer: dict[str, Any] = {}
    if config.context_dim is not None:
        mine["context"] = randn(2, 7, config.context_dim, dtype=dtype, seed=1)
        peer["encoder_hidden_states"] = mine["context"]
    if config.num_classes is not None:
        mine["y"] = peer["class_labels"] = torch.tensor([9, 2])
    if config.added_condition_dim is not None:
        text, ids = randn(2, 4, dtype=dtype, seed=2), torch.arange(12.0).view(2, 6) * 100
        sizes = theirs.add_time_proj(ids.flatten()).view(2, -1).to(dtype)
        mine["added"] = torch.cat([text, sizes], dim=1)
        peer["added_cond_kwargs"] = {"text_embeds": text, "time_ids": ids}
    assert_equal(ours(x, t, **mine), theirs(x, t, **peer).sample)


@torch.no_grad()
def same_autoencoder(ours: Autoencoder | None, theirs: Any) -> None:
    assert ours is not None
    dtype = next(ours.parameters()).dtype
    theirs = copy.deepcopy(theirs).to(dtype)  # fp32 and back would lose digits
    x = randn(2, 3, 16, 8, dtype=dtype)
    latent, encoded = ours.encode(x), theirs.encode(x)
    if isinstance(latent, Posterior):
        assert_equal(latent.mean, encoded.latent_dist.mean)
        assert_equal(latent.logvar, encoded.latent_dist.logvar)
    else:
        assert_equal(latent.z, encoded.latents)
    z = randn(2, ours.config.latent_channels, 8, 4, dtype=dtype, seed=5)
    assert_equal(ours.decode(z), theirs.decode(z).sample)


@torch.no_grad()
def same_text(ours: nn.Module, theirs: Any, layer: int = -1) -> None:
    dtype = next(ours.parameters()).dtype
    ids = torch.randint(0, 52, (2, 16), generator=torch.Generator().manual_seed(0))
    ids[:, 9:] = 53
    ids[:, 0] = 52
    mine = ours(ids, output_hidden_states=True)
    peer = copy.deepcopy(theirs).to(dtype)(ids, output_hidden_states=True)
    assert_equal(mine.hidden_states[layer], peer.hidden_states[layer])
    if hasattr(peer, "text_embeds"):
        assert_equal(mine.text_embeds, peer.text_embeds)


def same(checkpoint: Model, models: Models) -> None:
    same_unet(checkpoint.denoiser, models["unet"])
    same_autoencoder(checkpoint.autoencoder, models.get("vae", models.get("vqvae")))
    text = [models[name] for name in ("text_encoder", "text_encoder_2") if name in models]
    assert len(checkpoint.text_encoders) == len(text)
    for ours, theirs in zip(checkpoint.text_encoders, text, strict=True):
        same_text(ours.model, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_pipeline_of_diffusers(saved: Any, kind: str, dtype: torch.dtype) -> None:
    folder, models = saved(kind)
    checkpoint = fastdiff.load(folder, dtype=dtype)
    same(checkpoint, models)
    assert checkpoint.layout == "diffusers"
    assert checkpoint.prediction == "eps"
    for encoder in checkpoint.text_encoders:
        ids = encoder.tokenizer("a b", padding="max_length", max_length=16).input_ids
        assert ids[:4] == [52, 26, 27, 53]
    if kind == "ldm":
        assert checkpoint.scale_factor == 1.0
        assert checkpoint.schedule == ScheduleConfig()
    else:
        assert checkpoint.schedule == SD_SCHEDULE
        assert checkpoint.scale_factor == (0.13025 if kind == "sdxl" else 0.18215)
        assert checkpoint.sampler is not None
        assert checkpoint.sampler.sampler == "euler"
    described = [(e.skip, e.final_norm, e.pooled) for e in checkpoint.text_encoders]
    expected = {"sdxl": [(1, False, False), (1, False, True)], "ldm": []}
    assert described == expected.get(kind, [(0, True, False)])


def compvis_state(kind: str, models: Models) -> dict[str, Tensor]:
    """The whole single file, with what training leaves in one."""
    unet, vae = models["unet"], models.get("vae", models.get("vqvae"))
    assert vae is not None
    if kind == "ldm":
        named = openai_by_width(unet.state_dict(), 2, 32, "legacy")
    else:
        named = layouts.openai_unet(unet.state_dict(), 2)
    state = {f"model.diffusion_model.{key}": value for key, value in named.items()}
    named = layouts.ddpm(vae.state_dict(), 2)
    state |= {f"first_stage_model.{key}": value for key, value in named.items()}
    if kind.startswith("sd1"):
        text = models["text_encoder"].state_dict()
        prefix = "cond_stage_model.transformer.text_model."
        state |= {prefix + key.removeprefix("text_model."): value for key, value in text.items()}
        state[f"{prefix}embeddings.position_ids"] = torch.arange(16)[None]
    elif kind == "sd2":
        text = layouts.open_clip(models["text_encoder"].state_dict())
        # one layer more, which is never run
        last = {k.replace("resblocks.2.", "resblocks.3."): v * 2 for k, v in text.items()}
        text = {**last, **text, "logit_scale": torch.tensor(1.0)}
        text["text_projection"] = torch.zeros(24, 24)
        state |= {f"cond_stage_model.model.{key}": value for key, value in text.items()}
    elif kind == "sdxl":
        first = models["text_encoder"].state_dict()
        prefix = "conditioner.embedders.0.transformer.text_model."
        state |= {prefix + key.removeprefix("text_model."): value for key, value in first.items()}
        second = layouts.open_clip(models["text_encoder_2"].state_dict())
        state |= {f"conditioner.embedders.1.model.{key}": value for key, value in second.items()}
    return {key: value.clone() for key, value in state.items()}


def openai_by_width(state: dict[str, Tensor], blocks: int, head_dim: int, order: str) -> Any:
    """Packed attention whose number of heads depends on the level's width."""
    result: dict[str, Tensor] = {}
    widths = {value.shape[0] for key, value in state.items() if ".to_q.weight" in key}
    for width in widths:
        packed = layouts.openai_unet(state, blocks, width // head_dim, order)
        for key, value in packed.items():
            if ".qkv." not in key or value.shape[0] == 3 * width:
                result[key] = value
    return result


def compvis_options(kind: str) -> dict[str, Any]:
    """What the few channels of the tests keep from being recognised as the published models."""
    return {"ldm": {}, "sd2": {"num_heads": 4}, "sdxl": {"head_dim": 16}}.get(
        kind, {"num_heads": 4}
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_single_file_of_compvis(
    saved: Any, kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder, models = saved(kind)
    file = tmp_path / "named after nothing"
    save_file(compvis_state(kind, {k: m.to(torch.float64) for k, m in models.items()}), file)
    checkpoint = fastdiff.load(
        file, dtype=dtype, tokenizer=folder.parent / "words", **compvis_options(kind)
    )
    same(checkpoint, models)
    assert checkpoint.layout == "compvis"
    assert checkpoint.scale_factor == {"sdxl": 0.13025, "ldm": 1.0}.get(kind, 0.18215)
    assert checkpoint.provenance["assumed"]["prediction"] == "eps"
    described = [(e.skip, e.final_norm, e.pooled) for e in checkpoint.text_encoders]
    expected = {"sdxl": [(1, False, False), (1, False, True)], "ldm": []}
    assert described == expected.get(kind, [(0, True, False)])
    assert all(encoder.tokenizer is not None for encoder in checkpoint.text_encoders)


def test_a_training_file_with_averages_and_tables(saved: Any, tmp_path: Path) -> None:
    """A .ckpt as CompVis' trainer writes it: nested, averaged weights, betas, a scale factor."""
    _, models = saved("ldm")
    state = compvis_state("ldm", models)
    names = [key.removeprefix("model.") for key in state if key.startswith("model.")]
    ema = {"model_ema." + key.replace(".", ""): state[f"model.{key}"] for key in names}
    raw = {key: value * 2 if key.startswith("model.") else value for key, value in state.items()}
    schedule = ScheduleConfig(kind="scaled_linear", beta_start=0.0015, beta_end=0.0195)
    betas = NoiseSchedule(schedule).betas.float()
    tables = {
        "betas": betas,
        "alphas_cumprod": (1 - betas).cumprod(0),
        "sqrt_alphas_cumprod": betas,
        "posterior_mean_coef1": betas,
        "log_one_minus_alphas_cumprod": betas,
        "logvar": betas,
        "scale_factor": torch.tensor(0.75),
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(7),
        "first_stage_model.loss.logvar": torch.zeros(()),
    }
    path = tmp_path / "last"
    torch.save({"state_dict": {**raw, **ema, **tables}, "global_step": 7, "lr": 0.1}, path)
    checkpoint = fastdiff.load(path, dtype=torch.float64)
    same_unet(checkpoint.denoiser, models["unet"])
    assert checkpoint.schedule == schedule
    assert checkpoint.scale_factor == 0.75
    assert checkpoint.provenance["facts"] == {"global_step": 7, "lr": 0.1}
    assert checkpoint.provenance["averaged weights"] is True
    assert checkpoint.provenance["assumed"].keys() == {"head_dim", "prediction", "image_size"}
    plain = fastdiff.load(path, dtype=torch.float64, ema=False)
    assert plain.denoiser is not None
    assert checkpoint.denoiser is not None
    ours, others = checkpoint.denoiser.conv_out.bias, plain.denoiser.conv_out.bias
    assert torch.equal(ours * 2, others)
    del ema[next(key for key in ema if "time_embed0weight" in key)]
    torch.save({"state_dict": {**raw, **ema, **tables}}, path)
    with pytest.raises(ValueError, match=r"averaged weights are missing: .*time_embed0weight"):
        fastdiff.load(path)


def test_classes_as_context(tmp_path: Path) -> None:
    """LDM's cin256: a table of classes, one head."""
    unet = peer_model(
        "UNet2DConditionModel",
        {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (32, 64),
            "cross_attention_dim": 24,
            "attention_head_dim": 1,
        },
        torch.float64,
    )
    named = layouts.openai_unet(unet.state_dict(), 2)
    table = randn(11, 24, dtype=torch.float32)
    state = {f"model.diffusion_model.{k}": v for k, v in named.items()}
    path = tmp_path / "cin"
    torch.save({"state_dict": {**state, "cond_stage_model.embedding.weight": table}}, path)
    checkpoint = fastdiff.load(path, dtype=torch.float64)
    same_unet(checkpoint.denoiser, unet)
    assert checkpoint.class_embedding is not None
    assert torch.equal(checkpoint.class_embedding.weight, table.double())
    assert checkpoint.provenance["assumed"]["num_heads"] == 1


@pytest.mark.parametrize("name", ["kl", "vq", "vq-attention"])
def test_a_first_stage_alone(name: str, tmp_path: Path) -> None:
    options = {**VAE, **({"num_vq_embeddings": 64} if name != "kl" else {})}
    if name == "vq-attention":
        options["down_block_types"] = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
        options["up_block_types"] = ("AttnUpDecoderBlock2D", "UpDecoderBlock2D")
    theirs = peer_model("AutoencoderKL" if name == "kl" else "VQModel", options, torch.float64)
    state = layouts.ddpm(theirs.state_dict(), 2)
    state["loss.discriminator.main.0.weight"] = torch.zeros(3)
    torch.save({"state_dict": state}, tmp_path / "f4")
    checkpoint = fastdiff.load(tmp_path / "f4", dtype=torch.float64)
    same_autoencoder(checkpoint.autoencoder, theirs)
    assert checkpoint.denoiser is None
    assert checkpoint.scale_factor == (0.18215 if name == "kl" else 1.0)


@pytest.mark.parametrize("order", ["legacy", "new"])
@pytest.mark.parametrize("name", ["adm", "iddpm", "ldm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_openai(name: str, order: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Class-conditional with residual resampling, unconditional, and without learned variance."""
    options = {"adm": ADM, "iddpm": IDDPM, "ldm": LDM}[name]
    theirs = peer_model("UNet2DModel", options, torch.float64)
    blocks, dim = options.get("layers_per_block", 2), options["attention_head_dim"]
    named = openai_by_width(theirs.state_dict(), blocks, dim, order)
    torch.save(named, tmp_path / "model")
    checkpoint = fastdiff.load(tmp_path / "model", dtype=dtype, head_dim=dim, qkv_order=order)
    same_unet(checkpoint.denoiser, theirs)
    assert checkpoint.denoiser is not None
    config = checkpoint.denoiser.config
    assert config.qkv_order == order
    assert config.learned_sigma == (name != "ldm")
    assert config.resblock_updown == (name == "adm")
    assert config.num_classes == (10 if name == "adm" else None)
    assert checkpoint.provenance["assumed"]["prediction"] == "eps"


def upsampling_heads(order: str, file: Path) -> nn.Module:
    """improved-diffusion with 4 heads, and 2 on the way up: diffusers' network with that option."""
    theirs: Any = peer_model("UNet2DModel", IDDPM, torch.float64)
    for block in theirs.up_blocks:
        for attention in getattr(block, "attentions", ()):
            attention.heads = 2
    down, up = (layouts.openai_unet(theirs.state_dict(), 3, heads, order) for heads in (4, 2))
    named = {k: (up if k.startswith("output_blocks.") else down)[k] for k in down}
    torch.save(named, file)
    return theirs


@pytest.mark.parametrize("order", ["legacy", "new"])
def test_heads_on_the_way_up(order: str, tmp_path: Path) -> None:
    """improved-diffusion's num_heads_upsample, which a file does not record."""
    theirs = upsampling_heads(order, tmp_path / "model")
    said: dict[str, Any] = {"num_heads": 4, "qkv_order": order, "dtype": torch.float64}
    right = fastdiff.load(tmp_path / "model", num_heads_upsample=2, image_size=16, **said)
    same_unet(right.denoiser, theirs)
    assert "num_heads_upsample" not in right.assumed

    wrong = fastdiff.load(tmp_path / "model", **said)
    assert wrong.assumed["num_heads_upsample"] == 4
    (line,) = (line for line in wrong.assumed_lines(flags=True) if line.startswith("assumed"))
    assert "--num-heads-upsample 4 (or as num_heads, unless it was set in training)" in line
    with pytest.raises(AssertionError):
        same_unet(wrong.denoiser, theirs)

    save(right, tmp_path / "bundle", layout="bundle")
    same_unet(fastdiff.load(tmp_path / "bundle", dtype=torch.float64).denoiser, theirs)
    with pytest.raises(ValueError, match=r"no U-Net with num_heads_upsample 2, expected 4; save a"):
        save(right, tmp_path / "folder", layout="diffusers")
    with pytest.raises(ValueError, match="needs num_heads, got head_dim 16"):
        fastdiff.load(tmp_path / "model", head_dim=16, num_heads_upsample=2)
    with pytest.raises(ValueError, match="num_heads_upsample must divide the width 64 of a level"):
        fastdiff.load(tmp_path / "model", num_heads=4, num_heads_upsample=3)


def test_strict_refuses_to_guess(tmp_path: Path, saved: Any) -> None:
    theirs = upsampling_heads("new", tmp_path / "model")
    read: list[str] = []

    def refused(path: Path, **said: Any) -> str:
        with pytest.raises(ValueError, match="nor a published model determines") as caught:
            fastdiff.load(path, strict=True, progress=lambda name, _: read.append(name), **said)
        message = str(caught.value)
        assert "\n" not in message
        return message

    message = refused(tmp_path / "model")
    for choice in (
        "num_heads: 1, 2, 4, 8, 16 or head_dim 16 or head_dim 32 or head_dim 64; ",
        "num_heads_upsample: as num_heads, unless it was set in training",
        "qkv_order: legacy, new",
        "schedule: linear, scaled_linear, cosine, sigmoid",
        "prediction: eps, v, x0",
        "command line --qkv-order --num-heads --num-heads-upsample --schedule --prediction)",
    ):
        assert choice in message
    said: dict[str, Any] = {"num_heads": 4, "num_heads_upsample": 2, "qkv_order": "new"}
    assert "num_heads" not in refused(tmp_path / "model", **said)
    assert not read  # it was refused before any weights were read
    said |= {"schedule": "cosine", "prediction": "eps"}
    loaded = fastdiff.load(tmp_path / "model", strict=True, dtype=torch.float64, **said)
    same_unet(loaded.denoiser, theirs)

    # A single file whose channels are those of no published model, and what states everything.
    folder, models = saved("sd1")
    save_file(compvis_state("sd1", models), tmp_path / "sd1")
    assert "nor a published model determines num_heads: 1, 2, 4, 8, 16 or" in refused(
        tmp_path / "sd1"
    )
    assert fastdiff.load(folder, strict=True, text_encoders=False).denoiser is not None
    assert fastdiff.load("digits", strict=True).denoiser is not None


class OriginalSinusoid(torch.nn.Module):
    """Ho et al.'s `get_timestep_embedding`; diffusers' has another order of operations."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.half = dim // 2

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        step = math.log(10000) / (self.half - 1)
        frequencies = torch.exp(torch.arange(self.half, dtype=torch.float32) * -step)
        angles = t.to(torch.float32)[:, None] * frequencies[None, :]
        return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_port_of_ddpm(dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = peer_model("UNet2DModel", DDPM, torch.float64)
    theirs.time_proj = OriginalSinusoid(theirs.config.block_out_channels[0])
    torch.save(layouts.ddpm(theirs.state_dict(), 3), tmp_path / "model")
    checkpoint = fastdiff.load(tmp_path / "model", dtype=dtype)
    same_unet(checkpoint.denoiser, theirs)
    assert checkpoint.layout == "ddpm"
    assert checkpoint.schedule == ScheduleConfig()
    assert checkpoint.provenance["assumed"]["num_heads"] == 1


def test_what_a_single_file_does_not_say_can_be_said(saved: Any, tmp_path: Path) -> None:
    _, models = saved("sd1")
    state = compvis_state("sd1", models)
    save_file(state, tmp_path / "v")
    checkpoint = fastdiff.load(
        tmp_path / "v",
        num_heads=4,
        prediction="v",
        scale_factor=0.5,
        schedule=ScheduleConfig(),
        text_encoders=False,
    )
    assert checkpoint.prediction == "v"
    assert checkpoint.scale_factor == 0.5
    assert checkpoint.schedule == ScheduleConfig()
    assert checkpoint.text_encoders == ()
    assert checkpoint.provenance["assumed"].keys() == {"image_size"}


def test_a_component_alone(saved: Any) -> None:
    folder, models = saved("sd1")
    same_unet(fastdiff.load(folder / "unet", dtype=torch.float64).denoiser, models["unet"])
    vae = fastdiff.load(folder / "vae", dtype=torch.float64)
    same_autoencoder(vae.autoencoder, models["vae"])
    assert vae.scale_factor == 0.18215
    (text,) = fastdiff.load(folder / "text_encoder", dtype=torch.float64).text_encoders
    same_text(text.model, models["text_encoder"])


def test_a_pipeline_whose_parts_lie_beside_its_index(tmp_path: Path) -> None:
    """As in google/ddpm-cifar10-32: one folder for everything."""
    theirs: Any = peer_model("UNet2DModel", DDPM, torch.float64)
    theirs.save_pretrained(tmp_path, safe_serialization=False)
    index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}
    index["scheduler"] = ["diffusers", "DDPMScheduler"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    scheduler = {"_class_name": "DDPMScheduler", "variance_type": "fixed_large"}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(scheduler))
    checkpoint = fastdiff.load(tmp_path, dtype=torch.float64)
    same_unet(checkpoint.denoiser, theirs)
    assert checkpoint.image_size == 16
    assert checkpoint.sampler is not None
    assert (checkpoint.sampler.sampler, checkpoint.sampler.variance) == ("ddpm", "fixed_large")


def test_shards_and_variants(saved: Any, tmp_path: Path) -> None:
    _, models = saved("sd1")
    unet: Any = models["unet"]
    unet.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    files = list((tmp_path / "shards").glob("*-of-*.safetensors"))
    assert len(files) > 2
    same_unet(fastdiff.load(tmp_path / "shards", dtype=torch.float64).denoiser, unet)
    unet.save_pretrained(tmp_path / "fp16", variant="fp16")
    with pytest.raises(FileNotFoundError, match=r"got .*fp16\.safetensors"):
        fastdiff.load(tmp_path / "fp16")
    same_unet(fastdiff.load(tmp_path / "fp16", variant="fp16", dtype=torch.float64).denoiser, unet)
    unet.save_pretrained(tmp_path / "bin", safe_serialization=False)
    same_unet(fastdiff.load(tmp_path / "bin", dtype=torch.float64).denoiser, unet)
    unet.save_pretrained(tmp_path / "v", variant="fp16", max_shard_size="100KB")
    same_unet(fastdiff.load(tmp_path / "v", variant="fp16", dtype=torch.float64).denoiser, unet)
    files[0].unlink()
    with pytest.raises(FileNotFoundError, match=f"{files[0].name} is missing: "):
        fastdiff.load(tmp_path / "shards")


def test_dtype_none_keeps_the_files(saved: Any, tmp_path: Path) -> None:
    _, models = saved("sd1")
    unet: Any = models["unet"]
    state = {k: v.half() for k, v in layouts.openai_unet(unet.state_dict(), 2).items()}
    save_file(state, tmp_path / "half")
    half = fastdiff.load(tmp_path / "half", dtype=None, num_heads=4).denoiser
    assert half is not None
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    wide = fastdiff.load(tmp_path / "half", num_heads=4).denoiser
    assert wide is not None
    for name, value in wide.state_dict().items():
        assert torch.equal(value, half.state_dict()[name].float()), name


def test_a_bundle() -> None:
    checkpoint = fastdiff.load("digits")
    assert checkpoint.layout == "bundle"
    assert checkpoint.denoiser is not None
    assert checkpoint.autoencoder is not None
    assert checkpoint.image_size == 32
    with pytest.raises(ValueError, match="leave num_heads out"):
        fastdiff.load("digits", num_heads=4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("table", ["betas", "alphas_cumprod"])
def test_tables_of_noise_in_any_precision(
    saved: Any, tmp_path: Path, table: str, dtype: torch.dtype
) -> None:
    """Files pruned to half precision have their tables in it too."""
    state = compvis_state("sd1", saved("sd1")[1])
    for schedule in (SD_SCHEDULE, replace(SD_SCHEDULE, beta_start=0.0015, beta_end=0.0195)):
        betas = NoiseSchedule(schedule).betas
        state[table] = (betas if table == "betas" else (1 - betas).cumprod(0)).to(dtype)
        save_file(state, tmp_path / "x")
        loaded = fastdiff.load(tmp_path / "x", num_heads=4, text_encoders=False)
        assert loaded.schedule == schedule


def test_what_merged_files_have_beside_the_weights(saved: Any, tmp_path: Path) -> None:
    """Scales and projections of CLIP that are never run; marks of v-prediction and its noise."""
    _, models = saved("sdxl")
    state = compvis_state("sdxl", models)
    first, second = "conditioner.embedders.0.", "conditioner.embedders.1."
    state |= {
        f"{first}logit_scale": torch.tensor(1.0),
        f"{first}transformer.text_projection.weight": torch.zeros(8, 8),
        f"{first}transformer.text_model.embeddings.position_ids": torch.arange(16)[None],
        f"{second}logit_scale": torch.tensor(1.0),
        f"{second}model.logit_scale": torch.tensor(1.0),
        "denoiser.sigmas": torch.zeros(1000),
        "v_pred": torch.zeros(0),
        "ztsnr": torch.zeros(0),
    }
    save_file(state, tmp_path / "x")
    loaded = fastdiff.load(tmp_path / "x", dtype=torch.float64, head_dim=16)
    same(loaded, models)
    assert loaded.prediction == "v"
    assert loaded.schedule is not None
    assert loaded.schedule.zero_terminal_snr
