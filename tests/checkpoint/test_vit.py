"""Files of vision transformers: recognised, loaded, saved; assumptions are reported."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastdiff
from fastdiff.checkpoint.layouts import dit, uvit
from fastdiff.checkpoint.layouts.bundle import save_bundle
from fastdiff.checkpoint.layouts.diffusers import dit as diffusers_dit
from fastdiff.checkpoint.layouts.diffusers.write import save_diffusers
from fastdiff.checkpoint.model import Model
from fastdiff.checkpoint.open import Loading
from fastdiff.checkpoint.options import LoadOptions
from fastdiff.diffusion.flow import for_pixels
from fastdiff.diffusion.samplers import build_table
from fastdiff.diffusion.sampling import sample
from fastdiff.diffusion.schedules import ScheduleConfig, noise_schedule
from fastdiff.generate.facts import Facts
from fastdiff.models.dit import DiT, DiTConfig, position_table
from fastdiff.models.presets import DITS, UVITS
from fastdiff.models.uvit import UViT, UViTConfig
from tests.checkpoint.pipelines import VAE_KL
from tests.models.test_against_diffusers import assert_equal, peer_model
from tests.models.test_dit import PEER, peer
from tests.support.peers import import_diffusers
from tests.support.tiny import randomize

DIT = DiTConfig(
    in_channels=4,
    out_channels=8,
    width=32,
    depth=2,
    num_heads=4,
    sample_size=8,
    num_classes=6,
    null_class=True,
    learned_sigma=True,
)
UVIT = UViTConfig(
    in_channels=4,
    out_channels=4,
    width=32,
    depth=2,
    num_heads=4,
    sample_size=8,
    num_classes=6,
    null_class=True,
    timestep_offset=1.0,
)
SAID: dict[str, Any] = {"num_heads": 4, "null_class": True}


def published_dit(network: DiT) -> dict[str, Tensor]:
    """The state dict of facebookresearch's DiT, its names written out."""
    ours, grid = network.state_dict(), network.config.sample_size // network.config.patch_size
    table = position_table(network.config.width, (grid, grid), grid, torch.device("cpu"))
    renamed = {
        "patch_embed": "x_embedder.proj",
        "time_embed": "t_embedder.mlp",
        "label_embed": "y_embedder.embedding_table",
        "modulation_out": "final_layer.adaLN_modulation.1",
        "linear_out": "final_layer.linear",
    }
    return {
        "pos_embed": table[None],
        **_renamed(ours, renamed, {"modulation": "adaLN_modulation.1"}),
    }


def published_uvit(network: UViT) -> dict[str, Tensor]:
    """The state dict of U-ViT's nnet, its names written out."""
    renamed = {
        "patch_embed": "patch_embed.proj",
        "label_embed": "label_emb",
        "middle_block": "mid_block",
        "norm_out": "norm",
        "linear_out": "decoder_pred",
        "conv_out": "final_layer",
    }
    return _renamed(network.state_dict(), renamed, {})


def _renamed(
    ours: Mapping[str, Tensor], outer: dict[str, str], inner: dict[str, str]
) -> dict[str, Tensor]:
    result = {}
    for name, value in ours.items():
        first, _, rest = name.partition(".")
        rest = rest.replace("attn.out.", "attn.proj.")
        for mine, theirs in inner.items():
            rest = rest.replace(f"{mine}.", f"{theirs}.")
        result[f"{outer.get(first, first)}.{rest}".rstrip(".")] = value
    return result


def network_of(kind: type[Any], config: Any) -> Any:
    made = kind(config)
    randomize(made, 7)
    return made.eval().requires_grad_(False)


def save_pt(state: Mapping[str, Tensor], path: Path) -> Path:
    torch.save(dict(state), path)
    return path


@pytest.mark.parametrize("name", DITS)
def test_published_sizes_of_dit_are_told_from_shapes(name: str) -> None:
    """At full size, on the meta device; heads are those of the paper."""
    with torch.device("meta"):
        network = DiT(DITS[name])
        shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    theirs = {key: shapes[ours] for ours, (key,) in dit.names(network).items()}
    side = DITS[name].sample_size // DITS[name].patch_size
    theirs["pos_embed"] = (1, side * side, DITS[name].width)
    loading = Loading(options=LoadOptions(num_heads=4 if name == "tiny" else None))
    assert dit.config(theirs, loading) == DITS[name]
    if name != "tiny":
        assert loading.assumed.choices == {}
    if name == "dit-xl-2":  # the file's own count
        assert sum(torch.Size(shape).numel() for shape in theirs.values()) == 675_129_632


@pytest.mark.parametrize("name", UVITS)
def test_published_sizes_of_uvit_are_told_from_shapes(name: str) -> None:
    with torch.device("meta"):
        network = UViT(UVITS[name])
        shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    theirs = {key: shapes[ours] for ours, (key,) in uvit.names(network).items()}
    loading = Loading(options=LoadOptions(num_heads=4 if name == "tiny" else None))
    expected = replace(UVITS[name], timestep_offset=1.0)
    assert uvit.config(theirs, loading) == expected
    if name != "tiny":
        assert loading.assumed.choices == {}
    if name == "uvit-h-2-imagenet256":
        assert sum(torch.Size(shape).numel() for shape in theirs.values()) == 500_832_016


@pytest.mark.parametrize(
    ("kind", "config", "published"),
    [(DiT, DIT, published_dit), (UViT, UVIT, published_uvit)],
    ids=["dit", "uvit"],
)
def test_a_file_is_read(kind: Any, config: Any, published: Any, tmp_path: Path) -> None:
    network = network_of(kind, config)
    path = save_pt(published(network), tmp_path / "weights.pt")
    model = fastdiff.load(path, **SAID)
    assert model.denoiser is not None
    assert model.denoiser.config == config
    assert model.layout == kind.__module__.rpartition(".")[2]
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 6])
    assert torch.equal(model.denoiser(x, t, y=y), network(x, t, y=y))
    assert model.prediction == "eps"
    assert model.scale_factor == 0.18215
    noise = ScheduleConfig()
    if kind is UViT:
        noise = ScheduleConfig(kind="scaled_linear", beta_start=0.00085, beta_end=0.012)
    assert model.schedule == noise
    assert set(model.assumed) == {"schedule", "prediction", "scale_factor"}


def test_what_a_file_leaves_open_is_said(tmp_path: Path) -> None:
    """For a width that was never published, the heads and the null class are assumed."""
    path = save_pt(published_dit(network_of(DiT, DIT)), tmp_path / "weights.pt")
    model = fastdiff.load(path)
    assert model.assumed["num_heads"] == 1  # of 64 channels or fewer
    assert model.assumed["null_class"] is True
    lines = "\n".join(model.assumed_lines(flags=True))
    assert "--num-heads 1 (or 1, 2, 4, 8, 16)" in lines
    assert "--null-class (or --no-null-class)" in lines
    assert "null_class=True (or True, False)" in "".join(model.assumed_lines())
    with pytest.raises(ValueError, match="null_class: True, False; num_heads: 1, 2, 4, 8, 16"):
        fastdiff.load(path, strict=True)
    plain = fastdiff.load(path, head_dim=8, null_class=False, strict=True)
    assert plain.denoiser is not None
    assert plain.denoiser.config == replace(DIT, num_classes=7, null_class=False)
    with pytest.raises(ValueError, match="head_dim must divide the width of a token, 32, got 5"):
        fastdiff.load(path, head_dim=5)
    with pytest.raises(ValueError, match="null_class must be True or False, got 1"):
        fastdiff.load(path, null_class=1)


def test_positions_that_were_trained_are_refused(tmp_path: Path) -> None:
    state = published_dit(network_of(DiT, DIT))
    state["pos_embed"] = state["pos_embed"].flip(1)
    path = save_pt(state, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="pos_embed must be the fixed table of sinusoids"):
        fastdiff.load(path, **SAID)
    state["pos_embed"] = torch.zeros(1, 15, 32)
    with pytest.raises(ValueError, match="expected a DiT, got 15 positions"):
        fastdiff.load(save_pt(state, path), **SAID)


def test_weights_in_half_precision_are_read(tmp_path: Path) -> None:
    network = network_of(DiT, DIT)
    state = {key: value.half() for key, value in published_dit(network).items()}
    model = fastdiff.load(save_pt(state, tmp_path / "weights.pt"), dtype=None, **SAID)
    assert model.denoiser is not None
    assert {p.dtype for p in model.denoiser.parameters()} == {torch.float16}


def test_a_file_that_lacks_a_block_is_refused(tmp_path: Path) -> None:
    state = published_uvit(network_of(UViT, UVIT))
    del state["out_blocks.0.skip_linear.bias"]
    with pytest.raises(ValueError, match=r"out_blocks\.0\.skip_linear\.bias is missing"):
        fastdiff.load(save_pt(state, tmp_path / "weights.pt"), **SAID)
    state["pos_embed"] = state["pos_embed"][:, 1:]
    with pytest.raises(ValueError, match="expected a U-ViT, got 17 positions"):
        fastdiff.load(save_pt(state, tmp_path / "weights.pt"), **SAID)


def test_latents_need_an_autoencoder_before_they_are_sampled(tmp_path: Path) -> None:
    path = save_pt(published_dit(network_of(DiT, DIT)), tmp_path / "weights.pt")
    model = fastdiff.load(path, **SAID)
    with pytest.raises(ValueError, match="pass the one that it was trained with as vae="):
        Facts.of(model)
    peer_model("AutoencoderKL", VAE_KL, torch.float32).save_pretrained(tmp_path / "vae")
    whole = fastdiff.load(path, vae=tmp_path / "vae", **SAID)
    assert whole.image_size == 8 * 2  # a first stage that halves once
    (image,) = whole.generate(classes=[5], seeds=[1], steps=2, guidance_scale=2.0)
    assert image.image.shape == (3, 16, 16)
    learned = whole.generate(classes=[5], seeds=[1], steps=3, sampler="ddpm")
    assert learned.tensor.isfinite().all()


def test_a_uvit_makes_the_size_it_knows(tmp_path: Path) -> None:
    pixels = replace(UVIT, in_channels=3, out_channels=3)
    path = save_pt(published_uvit(network_of(UViT, pixels)), tmp_path / "weights.pth")
    model = fastdiff.load(path, **SAID)
    assert model.image_size == 8
    with pytest.raises(ValueError, match="must be 8 x 8 for this model"):
        model.generate(classes=[1], seeds=[0], steps=2, height=16, width=16)
    (image,) = model.generate(classes=[1], seeds=[0], steps=2)
    assert image.image.shape == (3, 8, 8)
    folder = tmp_path / "bundle"
    save_bundle(model, folder)
    again = fastdiff.load(folder)
    assert again.denoiser is not None
    assert again.denoiser.config == pixels
    (same,) = again.generate(classes=[1], seeds=[0], steps=2, clamp=1.0)
    assert torch.equal(same.image, image.image)
    with pytest.raises(ValueError, match="a diffusers folder needs a U-Net or DiT, got UViT"):
        save_diffusers(model, tmp_path / "no")


LABELS = {str(i): f"thing {i}, item {i}" for i in range(10)}


def dit_pipeline(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A DiTPipeline with random weights, saved by diffusers."""
    diffusers: Any = import_diffusers("DiTPipeline", "AutoencoderKL", "DDIMScheduler")
    transformer = peer(dtype)
    pipeline = diffusers.DiTPipeline(
        transformer=transformer,
        vae=peer_model("AutoencoderKL", VAE_KL, dtype),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "id2label": LABELS}))
    return pipeline


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("dit") / "pipeline"
    return folder, dit_pipeline(folder)


def test_a_pipeline_is_read(saved: tuple[Path, Any]) -> None:
    folder, pipeline = saved
    model = fastdiff.load(folder, dtype=torch.float64)
    assert isinstance(model.denoiser, DiT)
    assert model.class_names[3] == "thing 3"
    assert model.image_size == 16
    x, t = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.tensor([3, 900])
    y = torch.tensor([0, 10])
    theirs = pipeline.transformer.double()
    try:
        expected = theirs(x, timestep=t, class_labels=y).sample
    finally:
        theirs.float()
    assert_equal(model.denoiser(x, t, y=y), expected)


def test_a_pipeline_of_flow_matching(saved: tuple[Path, Any], tmp_path: Path) -> None:
    """The scheduler's class says what the network predicts; sampled as diffusers samples it."""
    folder = Path(shutil.copytree(saved[0], tmp_path / "m"))
    name = "FlowMatchEulerDiscreteScheduler"
    scheduler = getattr(import_diffusers(name), name)(shift=3.0)
    scheduler.save_pretrained(folder / "scheduler")
    model = fastdiff.load(folder, dtype=torch.float64)
    assert (model.prediction, model.schedule) == ("flow", ScheduleConfig(kind="flow", shift=3.0))
    assert model.sampler is not None
    assert model.sampler.sampler == "flow-euler"
    schedule = noise_schedule(model.schedule)
    options = model.sampler.arguments(schedule, 7)
    table = build_table("flow-euler", schedule, 7, prediction="flow", **options)
    x, y = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.tensor([0, 10])
    channels = 4

    def network(x: Tensor, t: float) -> Tensor:
        assert model.denoiser is not None
        return model.denoiser(x, torch.full((2,), t, dtype=torch.float64), y=y)[:, :channels]

    with torch.no_grad():
        ours = sample(lambda x, row: network(x, float(table.timesteps[row])), table, x, [0, 1])
        scheduler.set_timesteps(7)
        peer = x
        for t in scheduler.timesteps:
            peer = scheduler.step(network(peer, float(t)), t, peer, return_dict=False)[0]
    assert (ours - peer).abs().max() <= 1e-5 * peer.abs().max()
    # images of half as many pixels
    half = for_pixels(model.schedule, 1, trained=2).shift
    assert half == pytest.approx(3 / 2**0.5)
    assert fastdiff.load(folder, shift=half).schedule == ScheduleConfig(kind="flow", shift=half)
    with pytest.raises(ValueError, match="set by its scheduler_config"):
        fastdiff.load(folder, shift=half, num_timesteps=500)
    with pytest.raises(ValueError, match="shift is for schedule 'flow', got 2"):
        fastdiff.load(saved[0], shift=2.0)
    with pytest.raises(ValueError, match="belong together, got prediction 'flow' and"):
        fastdiff.load(folder / "transformer", prediction="flow", schedule="linear")
    stated = {"prediction": "flow", "schedule": "flow", "shift": 2.0}
    assert fastdiff.load(folder / "transformer", **stated).schedule == ScheduleConfig(
        kind="flow", shift=2.0
    )


def test_a_pipeline_comes_back(saved: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = saved
    model = fastdiff.load(folder)
    save_diffusers(model, tmp_path / "again")
    index = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert index["_class_name"] == "DiTPipeline"
    assert index["id2label"] == LABELS
    again = fastdiff.load(tmp_path / "again")
    one, other = model.denoiser, again.denoiser
    assert one is not None
    assert other is not None
    assert other.config == one.config
    for key, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
    diffusers: Any = import_diffusers("DiTPipeline")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = diffusers.DiTPipeline.from_pretrained(tmp_path / "again", local_files_only=True)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 10])
    assert_equal(one(x, t, y=y), loaded.transformer(x, timestep=t, class_labels=y).sample)


def test_blocks_with_embedders_of_their_own_are_refused(
    saved: tuple[Path, Any], tmp_path: Path
) -> None:
    folder = saved[0] / "transformer"
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    key = "transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.bias"
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())

    def load_with(change: dict[str, Tensor]) -> Model:
        save_file({**state, **change}, tmp_path / "diffusion_pytorch_model.safetensors")
        return fastdiff.load(tmp_path)

    assert load_with({}).denoiser is not None
    with pytest.raises(ValueError, match=r"must equal transformer_blocks\.0\.norm1\.emb\.timestep"):
        load_with({key: state[key] + 1e-3})
    with pytest.raises(ValueError, match=r"has shape \(3,\), expected that of transformer_blocks"):
        load_with({key: torch.zeros(3)})
    more = key.replace("blocks.2.", "blocks.9.")
    with pytest.raises(ValueError, match=r"too few or too many, transformer_blocks\.9\."):
        load_with({more: state[key].clone()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_type": "ada_norm_single"}, "norm_type must be 'ada_norm_zero'"),
        ({"activation_fn": "geglu"}, "activation_fn must be 'gelu-approximate'"),
        ({"attention_bias": False}, "attention_bias must be True"),
        ({"out_channels": 6}, "out_channels must be 4, or 8 with a learned variance"),
        ({"caption_channels": 12}, "caption_channels must be absent or off"),
        ({"_class_name": "PixArtTransformer2DModel"}, "_class_name must be"),
        ({"_class_name": "Transformer2DModel", "patch_size": None}, "patch_size is missing"),
    ],
)
def test_options_that_our_dit_does_not_have_are_named(change: dict[str, Any], message: str) -> None:
    data = {"_class_name": "DiTTransformer2DModel", **diffusers_dit.FIXED, **PEER}
    diffusers_dit.config(data)
    diffusers_dit.config({**data, "_class_name": "Transformer2DModel", "norm_num_groups": 32})
    with pytest.raises(ValueError, match=message):
        diffusers_dit.config({**data, **change})


def test_what_diffusers_lacks_is_not_written(tmp_path: Path) -> None:
    """The published frequencies of the timestep are not those of diffusers' class."""
    network = network_of(DiT, DIT)
    model = Model(layout="dit", denoiser=network)
    with pytest.raises(ValueError, match="no DiT with frequency_shift 0, expected 1"):
        save_diffusers(model, tmp_path / "no")
    shifted = DiT(replace(DIT, frequency_shift=1, mlp_ratio=2.0))
    with pytest.raises(ValueError, match=r"no DiT with mlp_ratio 2\.0"):
        save_diffusers(Model(layout="dit", denoiser=shifted), tmp_path / "no")
    pixels = Model(
        layout="dit", denoiser=DiT(replace(DIT, frequency_shift=1)), schedule=ScheduleConfig()
    )
    with pytest.raises(ValueError, match="DiTPipeline needs an autoencoder"):
        save_diffusers(pixels, tmp_path / "no")
    alone = Model(layout="dit", denoiser=network_of(DiT, replace(DIT, frequency_shift=1)))
    save_diffusers(alone, tmp_path / "alone")
    again = fastdiff.load(tmp_path / "alone")
    assert again.denoiser is not None
    assert again.denoiser.config == replace(DIT, frequency_shift=1)


def test_class_names_must_name_every_class(saved: tuple[Path, Any], tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    folder.mkdir()
    for part in ("transformer", "vae", "scheduler"):
        (folder / part).symlink_to(saved[0] / part)
    index = json.loads((saved[0] / "model_index.json").read_text())
    for labels in ({"0": "one"}, {**LABELS, "3": 5}, ["a"]):
        (folder / "model_index.json").write_text(json.dumps({**index, "id2label": labels}))
        with pytest.raises(ValueError, match="id2label must name the classes 0 to 9"):
            fastdiff.load(folder)
