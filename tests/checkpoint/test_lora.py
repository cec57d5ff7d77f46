"""LoRA files: equal to diffusers' with the same file, in the names of kohya and of peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import fastdiff
from fastdiff.checkpoint.layouts.lora import merge, read_spec
from fastdiff.checkpoint.options import LoadOptions
from tests.checkpoint.pipelines import opened as peer
from tests.checkpoint.pipelines import pipeline
from tests.models.test_against_diffusers import assert_equal, randn
from tests.support.peers import import_diffusers

UNET = [  # attention, a feed-forward, a 1 x 1 convolution (SD 1), a residual block's convolution
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_v",
    "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_k",
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "down_blocks.0.attentions.0.proj_in",
]
CONVOLUTION = "down_blocks.1.resnets.0.conv1"
TEXT = ["self_attn.q_proj", "self_attn.out_proj", "mlp.fc1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("sd") / "pipeline"
    pipeline("sd1", found, torch.float32)
    return found


def matrices(module: Any, stem: str, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    weight = module.get_submodule(stem).weight
    down = randn(rank, *weight.shape[1:], dtype=torch.float32, seed=seed)
    ones = [1] * (weight.ndim - 2)
    up = randn(weight.shape[0], rank, *ones, dtype=torch.float32, seed=seed + 1)
    return 0.3 * down, 0.3 * up


def text_stems(encoder: Any) -> list[str]:
    layers = [name for name, _ in encoder.named_modules() if name.endswith("layers.1")]
    return [f"{layers[0]}.{leaf}" for leaf in TEXT]


def kohya(pipe: Any, path: Path, *, alpha: float | None = 2.0, conv: bool = True) -> Path:
    state: dict[str, Tensor] = {}
    parts = [("lora_unet", pipe.unet, stem) for stem in UNET + [CONVOLUTION] * conv]
    parts += [("lora_te", pipe.text_encoder, stem) for stem in text_stems(pipe.text_encoder)]
    for number, (prefix, module, stem) in enumerate(parts):
        down, up = matrices(module, stem, 3, 10 * number)
        name = stem if prefix == "lora_unet" or stem.startswith("text_") else f"text_model.{stem}"
        base = f"{prefix}_{name.replace('.', '_')}"
        state |= {f"{base}.lora_down.weight": down, f"{base}.lora_up.weight": up}
        if alpha is not None:
            state[f"{base}.alpha"] = torch.tensor(alpha)
    save_file(state, path)
    return path


def peft(pipe: Any, path: Path, *, ends: tuple[str, str] = ("lora_A", "lora_B")) -> Path:
    state: dict[str, Tensor] = {}
    for number, stem in enumerate([*UNET, CONVOLUTION]):
        down, up = matrices(pipe.unet, stem, 3, 10 * number)
        for end, matrix in zip(ends, (down, up), strict=True):
            state[f"unet.{stem}.{end}.weight"] = matrix
    for number, stem in enumerate(text_stems(pipe.text_encoder)):
        down, up = matrices(pipe.text_encoder, stem, 3, 500 + 10 * number)
        name = stem if stem.startswith("text_") else f"text_model.{stem}"
        for end, matrix in zip(ends, (down, up), strict=True):
            state[f"text_encoder.{name}.{end}.weight"] = matrix
    save_file(state, path)
    return path


@torch.no_grad()
def compare(folder: Path, path: Path, strength: float, *, text: bool = True) -> None:
    theirs, plain = peer(folder), peer(folder)
    theirs.load_lora_weights(path)
    theirs.fuse_lora(lora_scale=strength)
    ours = fastdiff.load(folder, lora=f"{path}:{strength}")
    assert ours.denoiser is not None
    x, t = randn(1, 4, 16, 8, dtype=torch.float32), torch.tensor([500])
    context = randn(1, 7, 24, dtype=torch.float32, seed=1)
    actual = ours.denoiser(x, t, context=context)
    expected = theirs.unet(x, t, context).sample
    assert_equal(actual, expected)  # 1e-5 of the largest number
    before = plain.unet(x, t, context).sample
    assert (expected - before).abs().max() > 0.05 * before.abs().max()
    if not text:
        return
    ids = torch.tensor([[52, 3, 7, 53, *[53] * 12]])
    encoder: Any = ours.text_encoders[0].model
    one, two, three = (
        model(ids).last_hidden_state for model in (encoder, theirs.text_encoder, plain.text_encoder)
    )
    assert_equal(one, two)
    assert (two - three).abs().max() > 0.05 * three.abs().max()


@pytest.mark.parametrize(("alpha", "strength"), [(2.0, 1.0), (None, 0.5)], ids=["alpha", "plain"])
def test_kohya_is_equal_to_diffusers(
    alpha: float | None, strength: float, folder: Path, tmp_path: Path
) -> None:
    compare(folder, kohya(peer(folder), tmp_path / "x.safetensors", alpha=alpha), strength)


def test_peft_is_equal_to_diffusers(folder: Path, tmp_path: Path) -> None:
    compare(folder, peft(peer(folder), tmp_path / "x.safetensors"), 0.7)


@torch.no_grad()
def test_what_diffusers_saves_is_read_with_its_alphas(folder: Path, tmp_path: Path) -> None:
    """A peft adapter with alpha 6 and rank 3, and another alpha for one layer, saved by diffusers
    with its metadata."""
    import_diffusers("StableDiffusionPipeline")
    import peft as library
    from peft.utils import get_peft_model_state_dict

    pipe = peer(folder)
    config = library.LoraConfig(
        r=3, lora_alpha=6, target_modules=["to_q", "to_v"], alpha_pattern={"attn2.to_v": 1}
    )
    pipe.unet.add_adapter(config)
    for number, (name, parameter) in enumerate(pipe.unet.named_parameters()):
        if "lora_" in name:
            parameter.copy_(0.3 * randn(*parameter.shape, dtype=torch.float32, seed=number))
    type(pipe).save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(pipe.unet),
        unet_lora_adapter_metadata=pipe.unet.peft_config["default"].to_dict(),
    )
    compare(folder, tmp_path / "pytorch_lora_weights.safetensors", 1.0, text=False)


@torch.no_grad()
def test_a_negative_strength_removes_it_again(folder: Path, tmp_path: Path) -> None:
    path = kohya(peer(folder), tmp_path / "x.safetensors")
    before = fastdiff.load(folder, dtype=torch.float64)
    after = fastdiff.load(folder, dtype=torch.float64, lora=[f"{path}:0.8", f"{path}:-0.8"])
    assert before.denoiser is not None
    assert after.denoiser is not None
    for name, value in before.denoiser.state_dict().items():
        torch.testing.assert_close(after.denoiser.state_dict()[name], value, rtol=0, atol=1e-12)
    merged = merge(before, path, 1.0)
    assert merged.weights_hash != after.weights_hash
    assert merged.provenance["lora"] == [f"{path} x 1"]


def test_half_precision_is_rounded_once(folder: Path, tmp_path: Path) -> None:
    path = peft(peer(folder), tmp_path / "x.safetensors")
    wide = fastdiff.load(folder, lora=path)
    narrow = fastdiff.load(folder, lora=path, dtype=torch.bfloat16)
    plain = fastdiff.load(folder, dtype=torch.bfloat16)
    assert wide.denoiser is not None
    name = "middle_block.1.blocks.0.ff.proj.weight"
    rounded = plain.denoiser.state_dict()[name].float()  # type: ignore[union-attr]
    original = fastdiff.load(folder).denoiser.state_dict()[name]  # type: ignore[union-attr]
    change = wide.denoiser.state_dict()[name] - original
    expected = (rounded + change).bfloat16()
    actual = narrow.denoiser.state_dict()[name]  # type: ignore[union-attr]
    assert (actual != expected).float().mean() < 0.01  # where fp32 rounds `change` otherwise


def test_xl_in_the_names_of_compvis(tmp_path: Path) -> None:
    """sd-scripts names XL's layers after the original files: both names, one result."""
    found = tmp_path / "pipeline"
    pipeline("sdxl", found, torch.float32)
    plain: Any = fastdiff.load(found).denoiser
    names = {
        "input_blocks_4_1_transformer_blocks_0_attn1_to_q": (
            "input_blocks.4.1.blocks.0.attn1.qkv.weight"
        ),
        "middle_block_1_transformer_blocks_1_attn2_to_v": (
            "middle_block.1.blocks.1.attn2.kv.weight"
        ),
    }
    state: dict[str, Tensor] = {}
    for number, (theirs, ours) in enumerate(names.items()):
        _, columns = plain.get_parameter(ours).shape
        rows = plain.get_parameter(ours).shape[0] // (3 if "qkv" in ours else 2)
        base = f"lora_unet_{theirs}"
        state[f"{base}.lora_down.weight"] = randn(2, columns, dtype=torch.float32, seed=number)
        state[f"{base}.lora_up.weight"] = randn(rows, 2, dtype=torch.float32, seed=9 + number)
    save_file(state, tmp_path / "x.safetensors")
    merged: Any = fastdiff.load(found, lora=tmp_path / "x.safetensors").denoiser
    for theirs, ours in names.items():
        change = merged.get_parameter(ours) - plain.get_parameter(ours)
        base = f"lora_unet_{theirs}"
        expected = state[f"{base}.lora_up.weight"] @ state[f"{base}.lora_down.weight"]
        rows = slice(0, len(expected)) if "to_q" in theirs else slice(len(expected), None)
        torch.testing.assert_close(change[rows], expected, rtol=1e-4, atol=1e-5)
        change[rows] = 0
        assert not change.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_unet_x.hada_w1_a": torch.zeros(1)}, r"is LoHa .*supports plain LoRA"),
        ({"lora_unet_x.dora_scale": torch.zeros(1)}, "is DoRA"),
        ({"weight": torch.zeros(1)}, "weight is no matrix of a LoRA with kohya's or peft's names"),
        ({"lora_unet_x.lora_up.weight": torch.zeros(2, 2)}, "layers without both matrices: x"),
        (
            {
                "lora_unet_no.lora_up.weight": torch.zeros(2, 2),
                "lora_unet_no.lora_down.weight": torch.zeros(2, 2),
            },
            "changes the layer no, which this model does not have",
        ),
        (
            {
                f"lora_unet_{UNET[0].replace('.', '_')}.lora_up.weight": torch.zeros(32, 2),
                f"lora_unet_{UNET[0].replace('.', '_')}.lora_down.weight": torch.zeros(2, 5),
            },
            "make a matrix of 32 x 5, the layer's is 32 x 32",
        ),
        (
            {
                "lora_te2_x.lora_up.weight": torch.zeros(2, 2),
                "lora_te2_x.lora_down.weight": torch.zeros(2, 2),
            },
            "matrices for 2 text encoders, the model has 1",
        ),
    ],
    ids=["loha", "dora", "stranger", "half", "layer", "shape", "encoders"],
)
def test_other_files_are_refused_before_anything_is_changed(
    change: dict[str, Tensor], message: str, folder: Path, tmp_path: Path
) -> None:
    save_file(change, tmp_path / "x.safetensors")
    model = fastdiff.load(folder)
    before = model.weights_hash
    with pytest.raises(ValueError, match=message):
        merge(model, tmp_path / "x.safetensors")
    vars(model).pop("weights_hash")
    assert model.weights_hash == before
    with pytest.raises(FileNotFoundError, match="give a LoRA file"):
        fastdiff.load(folder, lora=tmp_path / "missing.safetensors")


def test_a_specification_is_a_path_and_a_strength() -> None:
    assert read_spec("a/b.safetensors") == (Path("a/b.safetensors"), 1.0)
    assert read_spec("a:b.pt:-.5") == (Path("a:b.pt"), -0.5)
    options = LoadOptions(lora=("x.pt:0.5",))
    assert LoadOptions.of_recipe(json.loads(json.dumps(options.recorded))) == options
    with pytest.raises(ValueError, match="lora must be a list of files"):
        LoadOptions.of_recipe({"lora": "x"})
