"""One Model for every layout: its name, its hash, its ten lines, and another autoencoder in it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fastdiff.cli
from fastdiff.checkpoint.layouts import compvis, openai
from fastdiff.checkpoint.layouts.bundle import save_bundle
from fastdiff.checkpoint.model import Model
from fastdiff.checkpoint.open import Loading, layouts, load
from fastdiff.checkpoint.options import LoadOptions
from fastdiff.checkpoint.save import save
from fastdiff.checkpoint.weights import Place, Weights
from fastdiff.diffusion.schedules import ScheduleConfig
from fastdiff.models.network import NETWORKS, network_family
from fastdiff.models.presets import UNETS
from fastdiff.models.unet import UNet, UNetConfig
from tests.checkpoint import layouts as named
from tests.checkpoint.pipelines import pipeline
from tests.checkpoint.test_open import compvis_state, same_autoencoder
from tests.models.test_against_diffusers import VAE, peer_model
from tests.support.diffusers_models import checkpoint, components
from tests.support.tiny import tiny_autoencoder, tiny_model, tiny_unet


def fixed(module: Any) -> Any:
    """Weights that no generator of random numbers decides on."""
    for parameter in module.parameters():
        values = torch.arange(parameter.numel(), dtype=torch.float32).remainder(7) / 8
        parameter.data = values.reshape(parameter.shape)
    return module


@pytest.mark.parametrize(
    ("kind", "dtype", "expected"),
    [
        ("sd1", torch.float32, "27d5c55abcd39f31fd13411c50d15974cca13ee1fa076f811c5ecb03f763f193"),
        ("sd1", torch.float16, "ca225bc8c86141fc1b5f67d80aba55701148767dbe32a7da0136f0826e760732"),
        ("xl", torch.float32, "02a9cbcb26a398df9b910430d8de64dcdc13b06275246f8d43cff83673fba088"),
        ("xl", torch.float16, "9fca695b2aff6545446f61b198cb5837164ee4f1e82d3c13c8d83a6169aad037"),
    ],
)
def test_the_hash_of_a_text_model_is_that_of_earlier_recipes(
    kind: str, dtype: torch.dtype, expected: str, tmp_path: Path
) -> None:
    """Computed by the text pipeline of version 0.1.0, commit 9d6bd7a."""
    model = checkpoint(kind, components(kind, tmp_path))
    for module in model.modules.values():
        fixed(module).to(dtype)
    assert model.weights_hash == expected
    del model.weights_hash
    if dtype == torch.float16:  # as the pipelines compute: before and after they widen it
        assert model.autoencoder is not None
        model.autoencoder.float()
        assert model.weights_hash == expected


def test_the_hash_of_a_bundle_is_that_of_earlier_versions(tmp_path: Path) -> None:
    """Computed by `save_bundle` of commit 9d6bd7a, for a whole model and an autoencoder alone."""
    first = fixed(tiny_autoencoder())
    whole = tiny_model(denoiser=fixed(tiny_unet()), autoencoder=first)
    alone = tiny_model(denoiser=None, schedule=None, autoencoder=first)
    for name, model, expected in (
        ("a", whole, "cbad7f48603040ab3f6bfbcf5e3da8af9e2201d56ff79e477cb322cbaf7f023b"),
        ("b", alone, "f02f3ca121e7f6245d3b1ed700a2524d03829c3eab187e98ca51cbcb76bdb462"),
    ):
        assert save_bundle(model, tmp_path / name) == expected
        assert load(tmp_path / name).weights_hash == expected
    assert load("digits").weights_hash[:12] == "feb3a92257c0"


def test_the_hash_tells_models_apart() -> None:
    parts = {"denoiser": tiny_unet(), "autoencoder": tiny_autoencoder()}
    changes: list[dict[str, Any]] = [
        {},
        {"prediction": "v"},
        {"scale_factor": 0.5},
        {"schedule": ScheduleConfig(kind="cosine")},
        {"class_embedding": nn.Embedding(3, 4)},
        {"denoiser": fixed(tiny_unet())},
    ]
    hashes = [tiny_model(**{**parts, **change}).weights_hash for change in changes]
    assert len(set(hashes)) == len(changes)
    assert tiny_model(**parts, image_size=8).weights_hash == hashes[0]


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("xl") / "m"
    pipeline("sdxl", folder, torch.float32)
    return folder


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("sd1") / "m"
    return folder, pipeline("sd1", folder, torch.float32)


def test_print_takes_ten_lines(xl: Path, tmp_path: Path) -> None:
    model = load(xl)
    model.provenance["assumed"] = {"num_heads": 4, "schedule": ScheduleConfig()}
    model.provenance["no_sampler"] = "fastdiff has no sampler like LCMScheduler"
    assert len(model.text_encoders) == 2
    text = str(model)
    assert text == repr(model)
    lines = text.splitlines()
    assert len(lines) <= 10
    assert "num_heads=4, schedule=linear (0.0001 to 0.02, 1000)" in lines[-2]
    assert "sampler: not supported" in lines[-1]
    assert max(map(len, lines)) < 200
    digits = str(load("digits"))
    assert "classes: 10" in digits
    assert "UNet, 1,698,628 parameters" in digits
    assert "assumed" not in digits


def pruned(models: dict[str, Any], path: Path, **options: Any) -> Path:
    """A Stable Diffusion file without its autoencoder."""
    state = compvis_state("sd1", models)
    save_file({k: v for k, v in state.items() if not k.startswith("first_stage")}, path, **options)
    return path


def test_a_file_without_autoencoder_takes_another(sd1: Any, tmp_path: Path) -> None:
    folder, models = sd1
    path = pruned(models, tmp_path / "pruned")
    alone = load(path, num_heads=4, text_encoders=False)
    assert alone.autoencoder is None
    state = named.ddpm(models["vae"].state_dict(), 2)
    torch.save({"state_dict": state}, tmp_path / "vae.ckpt")
    for vae in (folder / "vae", tmp_path / "vae.ckpt", folder, str(folder)):
        model = load(path, num_heads=4, text_encoders=False, vae=vae)
        same_autoencoder(model.autoencoder, models["vae"])
        assert model.scale_factor == 0.18215
        assert model.image_channels == 3
        assert model.provenance["vae"] == str(vae)
        # the diffusers folders state the scale, the file does not
        assert ("scale_factor" in model.assumed) == (vae == tmp_path / "vae.ckpt")
    with pytest.raises(ValueError, match="contains no autoencoder; give one that does"):
        load(path, num_heads=4, text_encoders=False, vae=folder / "unet")
    wide = peer_model("AutoencoderKL", {**VAE, "latent_channels": 8}, torch.float32)
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match="latents have 8 channels, the denoiser's 4"):
        load(path, num_heads=4, text_encoders=False, vae=tmp_path / "wide")


def test_another_autoencoder_in_place_of_the_own(sd1: Any, tmp_path: Path) -> None:
    folder, _ = sd1
    other = fixed(peer_model("AutoencoderKL", VAE, torch.float32))
    other.save_pretrained(tmp_path / "other")
    model = load(folder, text_encoders=False, vae=tmp_path / "other")
    same_autoencoder(model.autoencoder, other)
    own = load(folder, text_encoders=False)
    assert model.image_size == own.image_size
    assert model.weights_hash != own.weights_hash
    config = tmp_path / "other" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "scaling_factor": 0.5}))
    with pytest.raises(ValueError, match=r"scaled by 0\.5, those of .* by 0\.18215"):
        load(folder, text_encoders=False, vae=tmp_path / "other")
    assert (
        load(folder, text_encoders=False, vae=tmp_path / "other", scale_factor=0.5).scale_factor
        == 0.5
    )
    # a folder without autoencoder knows the size of its latents
    shutil.copytree(folder, tmp_path / "m")
    index = json.loads((tmp_path / "m" / "model_index.json").read_text())
    del index["vae"]
    (tmp_path / "m" / "model_index.json").write_text(json.dumps(index))
    bare = load(tmp_path / "m", text_encoders=False)
    assert (bare.autoencoder, bare.image_size) == (None, None)
    assert load(tmp_path / "m", text_encoders=False, vae=folder).image_size == own.image_size


def test_a_bundle_with_another_autoencoder_is_another_model(tmp_path: Path) -> None:
    save_bundle(tiny_model(), tmp_path / "m")
    save_bundle(tiny_model(autoencoder=fixed(tiny_autoencoder())), tmp_path / "other")
    own = load(tmp_path / "m")
    other = load(tmp_path / "m", vae=tmp_path / "other")
    assert other.autoencoder is not None
    expected = fixed(tiny_autoencoder()).state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in other.autoencoder.state_dict().items())
    assert other.weights_hash != own.weights_hash
    assert other.scale_factor == own.scale_factor


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"modelspec.prediction_type": "v"}, "v"),
        ({"modelspec.prediction_type": "epsilon"}, "eps"),
        ({"ss_v_parameterization": "True"}, "v"),
        ({"ss_v_parameterization": "False"}, None),
        ({}, None),
    ],
)
def test_metadata_says_what_the_network_returns(
    metadata: dict[str, str], expected: str | None, sd1: Any, tmp_path: Path
) -> None:
    _, models = sd1
    path = pruned(models, tmp_path / "x", metadata=metadata or None)
    model = load(path, num_heads=4, text_encoders=False)
    assert model.prediction == (expected or "eps")
    assert ("prediction" in model.assumed) == (expected is None)
    assert load(path, num_heads=4, text_encoders=False, prediction="x0").prediction == "x0"


@pytest.mark.parametrize(
    ("width", "mult", "context", "table", "expected"),
    [
        (256, (1, 2, 4), 512, True, (8, 16, 32)),  # cin-ldm-vq-f8
        (192, (1, 2, 3, 5), 512, True, (1, 1, 1, 1)),  # cin256-v2
        (192, (1, 2, 3, 5), 640, False, (6, 12, 18, 30)),  # text2img256
        (128, (1, 2, 3, 4), 512, False, (4, 8, 12, 16)),  # layout2img-openimages256
        (256, (1, 2, 3, 4), None, False, (8, 8, 8, 8)),  # inpainting_big
        (224, (1, 2, 3, 4), None, False, (7, 14, 21, 28)),  # ffhq256, celebahq256, lsun_beds256
        (192, (1, 2, 2, 4, 4), None, False, (8, 8, 8, 8, 8)),  # lsun_churches256
        (320, (1, 2, 4, 4), 768, False, (8, 8, 8, 8)),  # Stable Diffusion 1
    ],
)
def test_heads_of_compvis_models(
    width: int,
    mult: tuple[int, ...],
    context: int | None,
    table: bool,
    expected: tuple[int, ...],
) -> None:
    """From the configs that CompVis published with the weights."""
    levels = len(mult)
    config = UNetConfig(
        in_channels=4,
        out_channels=4,
        model_channels=width,
        channel_mult=mult,
        num_res_blocks=2,
        attention_depth=(*([1] * (levels - 1)), 1),
        num_heads=1,
        context_dim=context,
    )
    with torch.device("meta"):
        unet = UNet(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for ours, theirs in openai.names(unet).items():
        rows, *rest = unet.state_dict()[ours].shape
        tail = (1, 1) if ".proj_in.weight" in ours and context is not None else ()
        for key in theirs:
            shapes[key] = (rows // len(theirs), *rest, *tail)
    places = {key: Place(Path("x"), 0, torch.float32, shape) for key, shape in shapes.items()}
    reading = compvis.Reading(Weights(Path("x"), places), Loading())
    found = compvis.unet_config(reading, reading.weights, table)
    assert tuple(found.heads(width * factor) for factor in mult) == expected
    assert reading.loading.assumed.values
    assert not reading.loading.assumed.choices  # published, so nothing is a guess


def test_a_table_of_classes_comes_back_from_a_bundle(tmp_path: Path) -> None:
    """LDM's ImageNet models, which diffusers has no pipeline for."""
    config = UNetConfig(
        **{**UNETS["ldm4-cin256-v2"].__dict__, "model_channels": 32, "context_dim": 24}
    )
    table = nn.Embedding(11, 24)
    model = Model(
        layout="compvis",
        denoiser=fixed(UNet(config)),
        class_embedding=table,
        schedule=ScheduleConfig(),
        image_size=64,
        image_channels=3,
    )
    with pytest.raises(ValueError, match=r"no pipeline with a class embedding .* save a bundle"):
        save(model, tmp_path / "no", layout="diffusers")
    save(model, tmp_path / "m", layout="bundle")
    again = load(tmp_path / "m")
    assert again.class_embedding is not None
    assert torch.equal(again.class_embedding.weight, table.weight)
    assert again.weights_hash != model.weights_hash
    assert "classes: 11" in str(again)
    (tmp_path / "m" / "class_embedding.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"class_embedding\.safetensors is missing"):
        load(tmp_path / "m")


def test_a_variant_of_some_parts_only(sd1: Any, tmp_path: Path) -> None:
    folder, models = sd1
    shutil.copytree(folder, tmp_path / "m")
    with pytest.raises(FileNotFoundError, match=r"no .*fp16\.safetensors"):
        load(tmp_path / "m", variant="fp16", text_encoders=False)
    weights = tmp_path / "m" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    model = load(tmp_path / "m", variant="fp16", text_encoders=False)
    assert model.provenance["without variant"] == ["vae"]
    assert model.assumed_lines() == ["without variant: vae"]
    same_autoencoder(model.autoencoder, models["vae"])


def test_a_folder_whose_scheduler_is_unknown_loads(sd1: Any, tmp_path: Path) -> None:
    folder, _ = sd1
    shutil.copytree(folder, tmp_path / "m")
    path = tmp_path / "m" / "scheduler" / "scheduler_config.json"
    stated = {
        "_class_name": "EDMEulerScheduler",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
    }
    path.write_text(json.dumps(stated))
    model = load(tmp_path / "m", text_encoders=False)
    assert model.schedule == compvis.STABLE_DIFFUSION
    assert (model.prediction, model.sampler) == ("v", None)
    [line] = model.assumed_lines()
    assert line.startswith("sampler: not supported: fastdiff has no sampler like EDMEuler")
    path.write_text(json.dumps({**stated, "_class_name": "DDIMScheduler", "magic": True}))
    model = load(tmp_path / "m", text_encoders=False)
    assert model.sampler is None
    assert "DDIMScheduler with magic=True" in model.provenance["no_sampler"]


def test_options_replace_a_part_of_the_noise(sd1: Any, tmp_path: Path) -> None:
    _, models = sd1
    path = pruned(models, tmp_path / "x")
    model = load(path, num_heads=4, text_encoders=False, zero_terminal_snr=True)
    assert model.schedule is not None
    assert model.schedule.zero_terminal_snr
    assert "schedule" not in model.assumed
    options = LoadOptions(num_heads=2, schedule="cosine", text_encoders=False)
    model = load(path, options=options, num_heads=4)
    assert model.schedule is not None
    assert model.schedule.kind == "cosine"
    assert model.denoiser is not None
    assert model.denoiser.config.num_heads == 4  # type: ignore[attr-defined]
    for name, value in (("beta_start", -1.0), ("num_timesteps", 0), ("qkv_order", "x")):
        with pytest.raises(ValueError, match=f"{name} must be"):
            LoadOptions(**{name: value})


def test_options_go_through_a_recipe() -> None:
    options = LoadOptions(vae=Path("v"), tokenizer=(Path("a"), Path("b")), num_heads=4, ema=False)
    recorded = json.loads(json.dumps(options.recorded))
    assert LoadOptions.of_recipe(recorded) == options
    for change, message in (
        ({"nonsense": 1}, "unknown loading option 'nonsense'"),
        ({"tokenizer": "a"}, "tokenizer must be a list of folders"),
        ({"vae": 3}, "vae must be a file or folder, got 3"),
        ({"num_heads": "4"}, "num_heads must be a positive whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            LoadOptions.of_recipe(change)


def test_every_layout_says_what_it_recognises(tmp_path: Path) -> None:
    found = list(layouts())
    assert [layout.name for layout in found] == [
        "bundle",
        "compvis",
        "ddpm",
        "diffusers",
        "dit",
        "glide",
        "guided-diffusion",
        "guided-diffusion-classifier",
        "uvit",
    ]
    assert {layout.name for layout in found if layout.save is not None} == {"bundle", "diffusers"}
    with pytest.raises(ValueError, match="layout must be one of bundle, diffusers, got 'compvis'"):
        save(tiny_model(), tmp_path / "m", layout="compvis")


def test_kinds_of_denoisers_are_looked_up_in_their_own_room_only(tmp_path: Path) -> None:
    """A kind comes from a file: it must not make us import something else."""
    assert network_family("unet").network is UNet
    save_bundle(tiny_model(), tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    data = json.loads(path.read_text())
    for kind in ("antigravity", "os", "layers", "..cli", "unet.x", "", 3, None):
        data["model"]["kind"] = kind
        path.write_text(json.dumps(data))
        with pytest.raises(ValueError, match=r"unknown kind of denoiser .* expected one of .*unet"):
            load(tmp_path / "m")
    assert "antigravity" not in NETWORKS


def test_info_on_files_and_folders(
    sd1: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder, models = sd1
    path = pruned(models, tmp_path / "x.safetensors")
    assert fastdiff.cli.main(["info", str(path)]) == 0
    output = capsys.readouterr().out
    assert "layout  compvis" in output
    assert "denoiser.channel_mult" in output
    assert fastdiff.cli.main(["info", str(folder)]) == 0
    output = capsys.readouterr().out
    assert "layout  diffusers" in output
    assert "text_encoder" in output
    assert fastdiff.cli.main(["info", str(folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["config"]["schedule"]["kind"] == "scaled_linear"
    assert report["weights hash"] == load(folder).weights_hash


def test_weights_loaded_in_inference_mode_are_ordinary(tmp_path: Path) -> None:
    """Such tensors have no version counter, and autograd cannot save them."""
    save_bundle(tiny_model(), tmp_path)
    with torch.inference_mode():
        model = load(tmp_path)
    assert model.denoiser is not None
    assert model.autoencoder is not None
    for network in (model.denoiser, model.autoencoder):
        assert not any(p.is_inference() for p in network.state_dict().values())
