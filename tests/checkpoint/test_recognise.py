"""Layouts and architectures are recognised by names and shapes; mismatches are reported at once."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastdiff
from fastdiff.checkpoint.layouts import compvis, ddpm, openai
from fastdiff.checkpoint.layouts.diffusers.write import save_diffusers
from fastdiff.checkpoint.open import Loading
from fastdiff.checkpoint.options import LoadOptions
from fastdiff.checkpoint.weights import Place, Weights
from fastdiff.diffusion.schedules import ScheduleConfig
from fastdiff.models.autoencoder import Autoencoder
from fastdiff.models.presets import AUTOENCODERS, UNETS
from fastdiff.models.unet import UNet, UNetConfig
from tests.checkpoint import layouts
from tests.checkpoint.pipelines import pipeline, text_model
from tests.checkpoint.test_open import compvis_state, same_unet
from tests.models.test_against_diffusers import ADM, VAE, peer_model

WEIGHTS = "diffusion_pytorch_model.safetensors"


def shapes_of(model: Any, names: Any) -> dict[str, tuple[int, ...]]:
    """The shapes that the published file of this architecture has."""
    shapes: dict[str, tuple[int, ...]] = {}
    state = model.state_dict()
    linear = isinstance(model, UNet) and model.config.head_dim is not None
    for ours, theirs in names(model).items():
        rows, *rest = state[ours].shape
        for key in theirs:
            shape = (rows // len(theirs), *rest)
            if ".qkv." in key and len(shape) == 2:
                shape = (*shape, 1)
            elif ".proj_in.weight" in key and not linear:
                shape = (*shape, 1, 1)
            shapes[key] = shape
    return shapes


def on_meta(kind: Any, config: Any) -> Any:
    with torch.device("meta"):
        return kind(config)


@pytest.mark.parametrize("name", ["adm-imagenet256", "adm-imagenet512", "iddpm-imagenet64"])
def test_openais_published_models(name: str) -> None:
    """At full size, on the meta device: heads, order and noise come from the documents."""
    shapes = shapes_of(on_meta(UNet, UNETS[name]), openai.names)
    config, known = openai.pixel_unet_config(shapes, LoadOptions())
    scale = 0.25 if name.startswith("iddpm") else 1
    assert config == replace(UNETS[name], timestep_scale=scale)
    steps = 4000 if name.startswith("iddpm") else 1000
    kind = "cosine" if name.startswith("iddpm") else "linear"
    assert (known.schedule.kind, known.schedule.num_timesteps) == (kind, steps)
    assert known.image_size == int(name.removeprefix("iddpm-imagenet").removeprefix("adm-imagenet"))


UP = {"in_channels": 6, "model_channels": 192}
PUBLISHED = {  # of the READMEs: architecture; heads, order; betas, steps, factor of t, image size
    "64x64": (
        {"model_channels": 192, "channel_mult": (1, 2, 3, 4), "num_res_blocks": 3},
        {"attention_depth": (0, 1, 1, 1), "head_dim": 64, "qkv_order": "new"},
        ("cosine", 1000, 1, 64),
    ),
    "64_256_upsampler": (UP, {"num_heads": 4}, ("linear", 1000, 1, 256)),
    "128_512_upsampler": (
        {**UP, "attention_depth": (0, 0, 0, 0, 1, 1)},
        {"head_dim": 64},
        ("linear", 1000, 1, 512),
    ),
    "imagenet64_uncond": ({}, {}, ("cosine", 4000, 0.25, 64)),
    "cifar10_uncond": (
        {"channel_mult": (1, 2, 2, 2), "attention_depth": (0, 1, 1, 0)},
        {},
        ("cosine", 4000, 0.25, 32),
    ),
    "imagenet64_cond": (
        {"model_channels": 192, "num_classes": 1000},
        {},
        ("cosine", 4000, 1, 64),
    ),
    "upsample_cond": (
        {**UP, "channel_mult": (1, 1, 2, 2, 4, 4), "num_res_blocks": 2, "num_classes": 1000},
        {"attention_depth": (0, 0, 0, 0, 1, 1)},
        ("linear", 4000, 1, 256),
    ),
    "lsun_uncond": (
        {"channel_mult": (1, 1, 2, 2, 4, 4), "num_res_blocks": 2, "scale_shift_norm": False},
        {"attention_depth": (0, 0, 0, 0, 1, 0), "num_heads": 1},
        ("linear", 1000, 1, 256),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_openais_readmes_say(name: str) -> None:
    """The two repositories' models share shapes and differ in options that shapes do not show."""
    architecture, heads, said = PUBLISHED[name]
    plain = UNETS["iddpm-imagenet64" if name.endswith("cond") else "adm-imagenet256"]
    change = {**architecture, **heads}
    if "num_heads" in change or "head_dim" in change:
        change = {"num_heads": None, "head_dim": None, **change}
    expected = replace(plain, **change, timestep_scale=said[2])
    shapes = shapes_of(on_meta(UNet, expected), openai.names)
    config, known = openai.pixel_unet_config(shapes, LoadOptions())
    assert config == expected
    assert (known.schedule.kind, known.schedule.num_timesteps) == said[:2]
    assert known.image_size == said[3]


def test_the_network_sees_scaled_timesteps(tmp_path: Path) -> None:
    """improved-diffusion's rescale_timesteps: 4000 steps, which the network sees as 0 to 999.75."""
    path = guided(tmp_path)
    scaled = fastdiff.load(path, timestep_scale=0.25).denoiser
    plain = fastdiff.load(path).denoiser
    assert plain is not None
    assert scaled is not None
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3999, 6])
    assert torch.equal(scaled(x, t), plain(x, t / 4))
    assert not torch.equal(scaled(x, t), plain(x, t))
    with pytest.raises(ValueError, match=r"no U-Net with timestep_scale 0\.25, expected 1"):
        save_diffusers(fastdiff.load(path, timestep_scale=0.25), tmp_path / "m")


def test_ddpms_published_model() -> None:
    shapes = shapes_of(on_meta(UNet, UNETS["ddpm-cifar10"]), ddpm.names)
    config = ddpm.unet_config(shapes, LoadOptions())
    assert config.time_embedding == "ddpm-original"  # the preset has diffusers' order
    assert replace(config, dropout=0.1, time_embedding="ddpm") == UNETS["ddpm-cifar10"]


@pytest.mark.parametrize(
    "name", ["sd1", "sd1-inpaint", "sd2", "sdxl", "ldm4-ffhq256", "ldm4-cin256-v2"]
)
def test_compvis_published_models(name: str) -> None:
    shapes = shapes_of(on_meta(UNet, UNETS[name]), openai.names)
    if name == "sdxl":
        shapes = {k: s[:2] if ".proj_in." in k else s for k, s in shapes.items()}
    places = {key: Place(Path(), 0, torch.float32, shape) for key, shape in shapes.items()}
    reading = compvis.Reading(Weights(Path(), places), Loading())
    config = compvis.unet_config(reading, reading.weights, name == "ldm4-cin256-v2")
    expected = UNETS[name]
    if expected.context_dim is not None:  # there is no packed attention whose order counts
        config = replace(config, qkv_order="new")
    assert config == expected
    assert reading.loading.assumed.values.keys() <= {"num_heads", "head_dim"}
    assert not reading.loading.assumed.choices  # all of them are published
    # Stable Diffusion 2 was published in both ways.
    assert compvis.prediction_of(reading, config) == "eps"
    assert list(reading.loading.assumed.choices) == ["prediction"] * (name == "sd2")


def test_sdxls_refiner() -> None:
    config = UNetConfig(  # 384 x (1, 2, 4, 4), transformers of 4 at the two levels between
        in_channels=4,
        out_channels=4,
        model_channels=384,
        channel_mult=(1, 2, 4, 4),
        num_res_blocks=2,
        attention_depth=(0, 4, 4, 0),
        middle_depth=4,
        head_dim=64,
        context_dim=1280,
        added_condition_dim=2560,
    )
    shapes = shapes_of(on_meta(UNet, config), openai.names)
    places = {key: Place(Path(), 0, torch.float32, shape) for key, shape in shapes.items()}
    reading = compvis.Reading(Weights(Path(), places), Loading())
    assert replace(compvis.unet_config(reading, reading.weights, False), qkv_order="new") == config


@pytest.mark.parametrize("name", ["kl-f4", "kl-f8", "vq-f4", "vq-f4-noattn", "vq-f8"])
def test_published_first_stages(name: str) -> None:
    shapes = shapes_of(on_meta(Autoencoder, AUTOENCODERS[name]), ddpm.names)
    assert ddpm.autoencoder_config(shapes, LoadOptions()) == AUTOENCODERS[name]


def test_an_upsampler_takes_the_small_image_beside_x(tmp_path: Path) -> None:
    theirs = peer_model("UNet2DModel", {**ADM, "in_channels": 6}, torch.float64)
    torch.save(layouts.openai_unet(theirs.state_dict(), 2, 4, "legacy"), tmp_path / "x")
    with pytest.raises(ValueError, match="width 64 of a level, got"):
        fastdiff.load(tmp_path / "x", head_dim=24)
    torch.save(layouts.openai_unet(theirs.state_dict(), 2, 1, "new"), tmp_path / "x")
    checkpoint = fastdiff.load(tmp_path / "x", dtype=torch.float64, head_dim=16, qkv_order="new")
    same_unet(checkpoint.denoiser, theirs)
    assert checkpoint.denoiser is not None
    assert checkpoint.denoiser.config.learned_sigma
    assert "low-resolution" in checkpoint.provenance["condition"]


def guided(tmp_path: Path, **change: Tensor | None) -> Path:
    """A small unconditional U-Net in OpenAI's layout, with some tensors changed."""
    options = {**ADM, "num_class_embeds": None, "layers_per_block": 1}
    theirs = peer_model("UNet2DModel", options, torch.float32)
    state = layouts.openai_unet(theirs.state_dict(), 1, 4, "legacy")
    changed = {**state, **{key.replace("__", "."): value for key, value in change.items()}}
    path = tmp_path / "file"
    torch.save({key: value for key, value in changed.items() if value is not None}, path)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stray__weight": torch.zeros(1)}, r"file: these are not .* stray\.weight is unknown"),
        ({"out__2__bias": None}, r"out\.2\.bias is missing"),
        (
            {"input_blocks__1__0__in_layers__2__bias": torch.zeros(5)},
            r"in_layers\.2\.bias has shape \(5,\), expected \(32,\)",
        ),
        ({"out__2__weight": None}, r"out\.2\.weight must be a tensor of 4 dimensions, got none"),
        ({"out__2__weight": torch.zeros(6)}, r"out\.2\.weight must be a tensor of 4 dimensions"),
        ({"input_blocks__0__0__weight": torch.zeros(24, 3, 3, 3)}, "must be a multiple of 24"),
        ({"output_blocks__9__0__x": torch.zeros(1)}, "expected a U-Net, got 6 input blocks, 7 out"),
    ],
    ids=range(7),
)
def test_keys_that_do_not_fit_are_listed_and_nothing_is_read(
    change: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = guided(tmp_path, **change)
    monkeypatch.setattr(Weights, "copy_into", None)  # whoever reads a number fails
    with pytest.raises(ValueError, match=message) as error:
        fastdiff.load(path)
    assert "\n" not in str(error.value)


def test_files_of_other_kinds_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for state, message in (
        ({"a.b": torch.zeros(1)}, r"tensors of no known layout: a\.b"),
        (
            {
                key: torch.zeros(1)
                for key in ("conv_in.weight", "down_blocks.0.resnets.0.norm1.weight")
            },
            "weights of a diffusers model, whose config is in the same folder; give that folder",
        ),
    ):
        save_file(state, path)
        with pytest.raises(ValueError, match=message):
            fastdiff.load(path)
    with pytest.raises(FileNotFoundError, match="is missing; give a file, a folder, or the name"):
        fastdiff.load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"expected model_index\.json .*got x"):
        fastdiff.load(tmp_path)
    with pytest.raises(ValueError, match="variant is only for diffusers folders"):
        fastdiff.load(path, variant="fp16")
    with pytest.raises(ValueError, match="give one of num_heads and head_dim"):
        fastdiff.load(path, num_heads=1, head_dim=1)
    for option, message in (
        ({"prediction": "foo"}, "prediction must be one of eps, v, x0, flow, got 'foo'"),
        ({"schedule": "nonsense"}, "schedule must be one of linear, .*, got 'nonsense'"),
        ({"scale_factor": float("nan")}, "scale_factor must be positive and finite, got nan"),
        ({"timestep_scale": 0}, "timestep_scale must be positive and finite, got 0"),
        ({"image_size": "a"}, "image_size must be a positive whole number, got 'a'"),
        ({"head_dim": 0}, "head_dim must be a positive whole number, got 0"),
        ({"dtype": torch.int8}, "dtype must be a floating-point torch.dtype or None"),
        ({"dtype": "fp16"}, "dtype must be a floating-point torch.dtype or None, got 'fp16'"),
        ({"device": "nonsense"}, "device must be one of torch's, .*, got 'nonsense'"),
    ):
        with pytest.raises(ValueError, match=message):
            fastdiff.load(path, **option)
    with pytest.raises(TypeError, match="nonsense"):
        fastdiff.load(path, nonsense=1)


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd1") / "m"
    pipeline("sd1", folder, torch.float32)
    return folder


@pytest.fixture
def folder(sd1: Path, tmp_path: Path) -> Path:
    """A valid pipeline for tests to damage."""
    return Path(shutil.copytree(sd1, tmp_path / "m"))


def change_json(path: Path, **change: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


def test_an_autoencoder_of_sdxl_under_a_unet_of_sd1(folder: Path) -> None:
    change_json(folder / "vae" / "config.json", scaling_factor=0.13025)
    with pytest.raises(ValueError, match=r"scaling_factor is 0\.13025, as in Stable Diffusion XL"):
        fastdiff.load(folder)
    assert fastdiff.load(folder, scale_factor=0.13025).scale_factor == 0.13025


def test_parts_that_do_not_belong_together(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "load_state_dict", None)  # no model is filled
        for name, value in (("latents_mean", [0.0]), ("shift_factor", 0.1), ("scaling_factor", -1)):
            before = (folder / "vae" / "config.json").read_text()
            change_json(folder / "vae" / "config.json", **{name: value})
            with pytest.raises(ValueError, match=name):
                fastdiff.load(folder)
            (folder / "vae" / "config.json").write_text(before)
    wide = peer_model("AutoencoderKL", {**VAE, "latent_channels": 8}, torch.float32)
    wide.save_pretrained(folder / "vae")
    with pytest.raises(ValueError, match="latents have 8 channels, the denoiser's 4"):
        fastdiff.load(folder)


def test_a_text_encoder_of_another_width(folder: Path) -> None:
    text_model("CLIPTextModel", 8, 2, torch.float32).save_pretrained(folder / "text_encoder")
    with pytest.raises(ValueError, match="tokens have 8 channels, the denoiser expects 24"):
        fastdiff.load(folder)
    assert fastdiff.load(folder, text_encoders=False).text_encoders == ()
    change_json(folder / "text_encoder" / "config.json", architectures=["BertModel"])
    with pytest.raises(ValueError, match="architectures must be CLIPTextModel"):
        fastdiff.load(folder)
    change_json(
        folder / "text_encoder" / "config.json",
        architectures=["CLIPTextModel"],
        num_hidden_layers=10**9,
    )
    with pytest.raises(ValueError, match="has 1000000000 layers, but the file only"):
        fastdiff.load(folder)


@pytest.mark.parametrize("name", ["eos_token_id", "pad_token_id"])
@pytest.mark.parametrize("number", [-1, 2**31, -(10**40), 1.5, True, "2", [2]])
def test_token_ids_of_a_text_encoder(folder: Path, name: str, number: object) -> None:
    """With an end that no token can be, CLIP would take its summary from the first token."""
    change_json(folder / "text_encoder" / "config.json", **{name: number})
    with pytest.raises(ValueError, match=f"{name} must be a token id of 0 or more, got"):
        fastdiff.load(folder)
    assert fastdiff.load(folder, text_encoders=False).text_encoders == ()


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (f"unet/{WEIGHTS}", f"no {WEIGHTS} .*got no weights"),
        ("unet/config.json", "config.json is missing"),
        ("scheduler/scheduler_config.json", "scheduler_config.json is missing"),
        ("text_encoder/model.safetensors", "got no weights"),
    ],
)
def test_a_missing_part(folder: Path, part: str, message: str) -> None:
    (folder / part).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        fastdiff.load(folder)


def test_damaged_parts_of_a_pipeline(folder: Path) -> None:
    state = load_file(folder / "unet" / WEIGHTS)
    for change, message in (
        ({"stray": torch.zeros(1)}, "stray is unknown"),
        ({"conv_in.bias": torch.zeros(3)}, r"conv_in\.bias has shape \(3,\), expected \(32,\)"),
    ):
        save_file({**state, **change}, folder / "unet" / WEIGHTS)
        with pytest.raises(ValueError, match=message):
            fastdiff.load(folder)
    save_file(state, folder / "unet" / WEIGHTS)
    change_json(folder / "unet" / "config.json", act_fn="gelu")
    with pytest.raises(ValueError, match=r"unet/config\.json: .*act_fn must be"):
        fastdiff.load(folder)
    change_json(folder / "unet" / "config.json", act_fn="silu", block_out_channels=5)
    with pytest.raises(ValueError, match="contains a value of the wrong type"):
        fastdiff.load(folder)
    change_json(folder / "unet" / "config.json", block_out_channels=[32], layers_per_block=10**9)
    with pytest.raises(ValueError, match=r"unet"):
        fastdiff.load(folder)
    change_json(folder / "model_index.json", controlnet=["diffusers", "ControlNetModel"])
    with pytest.raises(ValueError, match="contains controlnet, which fastdiff does not support"):
        fastdiff.load(folder)


def test_every_part_is_checked_before_a_number_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    state = load_file(path)
    monkeypatch.setattr(Weights, "copy_into", None)
    save_file({**state, "stray": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="stray is unknown"):
        fastdiff.load(folder)
    vae = load_file(folder / "vae" / WEIGHTS)
    save_file({**vae, "decoder.conv_in.bias": torch.zeros(1)}, folder / "vae" / WEIGHTS)
    with pytest.raises(ValueError, match=r"decoder\.conv_in\.bias has shape"):
        fastdiff.load(folder)


def test_what_a_folder_says_itself_is_not_overruled(folder: Path) -> None:
    with pytest.raises(ValueError, match="num_heads cannot be given, because its config"):
        fastdiff.load(folder, num_heads=2)
    with pytest.raises(ValueError, match="prediction are set by its scheduler_config"):
        fastdiff.load(folder, prediction="v")
    unet = fastdiff.load(folder / "unet", prediction="v", schedule=ScheduleConfig())
    assert (unet.prediction, unet.schedule) == ("v", ScheduleConfig())


def test_unknown_keys_of_a_single_file_are_listed(sd1: Path, tmp_path: Path) -> None:
    models = pipeline("sd1", tmp_path / "m", torch.float32)
    state = compvis_state("sd1", models)
    state["control_model.zero_convs.0.0.weight"] = torch.zeros(1)
    save_file(state, tmp_path / "x")
    with pytest.raises(ValueError, match=r"1 tensors belong to no model .*control_model\.zero"):
        fastdiff.load(tmp_path / "x", num_heads=4)


def test_without_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'fastdiff\[diffusers\]'"):
        fastdiff.load(folder)
    assert fastdiff.load(folder, text_encoders=False).denoiser is not None


def test_betas_of_no_schedule(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="betas do not fit any schedule"):
        compvis.schedule_of(torch.linspace(0.1, 0.2, 10).square() + 0.05, "x")
    cosine = ScheduleConfig(kind="cosine", num_timesteps=50)
    from fastdiff.diffusion.schedules import NoiseSchedule

    assert compvis.schedule_of(NoiseSchedule(cosine).betas, "x") == cosine


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_text_encoders_config_names_no_code(folder: Path, key: str) -> None:
    """transformers would fetch these kernels and run them."""
    change_json(folder / "text_encoder" / "config.json", **{key: "someone/kernels"})
    (encoder,) = fastdiff.load(folder).text_encoders
    assert encoder.model.config._attn_implementation in ("sdpa", "eager")
