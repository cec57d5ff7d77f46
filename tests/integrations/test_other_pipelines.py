"""Whole pipelines of diffusers: Stable Diffusion XL, offload, textual inversion, saving."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastdiff
from fastdiff.integrations.scheduler import FusedScheduler
from fastdiff.kernels import record_backends
from tests.integrations.models import (
    NETWORKS,
    UNETS,
    VAE,
    assert_images_parity,
    build,
    images,
    pipeline,
)
from tests.integrations.test_goes_on_working import add_lora
from tests.integrations.tokenizer import text_encoder, tokenizer
from tests.support.peers import import_diffusers

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def xl_pipeline(unet: Any = None, vae: Any = None, **more: Any) -> Any:
    """SDXL's kind; with a `controlnet`, its pipeline."""
    kind = "StableDiffusionXLControlNetPipeline" if more else "StableDiffusionXLPipeline"
    diffusers = import_diffusers(kind, "EulerDiscreteScheduler")
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        timestep_spacing="leading",
    )  # fmt: skip
    pipe = getattr(diffusers, kind)(
        vae=vae or build("AutoencoderKL", {**VAE, "force_upcast": True}, 2),
        unet=unet or build("UNet2DConditionModel", UNETS["sdxl"]),
        text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None,
        scheduler=scheduler, add_watermarker=False, **more,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def xl_images(pipe: Any, seed: int = 0, **more: Any) -> Tensor:
    """(2, 3, 16, 16) in [0, 1], from the noise and embeddings of a seed."""
    draw, dtype = torch.Generator().manual_seed(7 + seed), pipe.unet.dtype
    shapes = {
        "prompt_embeds": (2, 5, 24), "negative_prompt_embeds": (2, 5, 24),
        "pooled_prompt_embeds": (2, 16), "negative_pooled_prompt_embeds": (2, 16),
        "latents": (2, 4, 8, 8),
    }  # fmt: skip
    drawn = {name: torch.randn(s, generator=draw).to(dtype) for name, s in shapes.items()}
    size = {"height": 16, "width": 16, "num_inference_steps": 3, "guidance_scale": 4.0}
    return pipe(**drawn, **size, output_type="pt", **more).images


@pytest.mark.parametrize("with_controlnet", [False, True])
def test_xl(with_controlnet: bool) -> None:
    more: dict[str, Any] = {}
    call: dict[str, Any] = {}
    if with_controlnet:
        kind, config = NETWORKS["controlnet"]
        names = ("down_block_types", "attention_head_dim", "addition_embed_type")
        names += ("addition_time_embed_dim", "projection_class_embeddings_input_dim")
        names += ("transformer_layers_per_block", "use_linear_projection")
        config = {**config, **{name: UNETS["sdxl"][name] for name in names}}
        more["controlnet"] = build(kind, config, 5)
        generator = torch.Generator().manual_seed(1)
        call["image"] = torch.rand(2, 3, 16, 16, generator=generator)
    pipe = xl_pipeline(**more)
    eager = xl_images(pipe, **call)
    if with_controlnet:
        without = xl_images(pipe, **call, controlnet_conditioning_scale=0.0)
        assert (without - eager).abs().max() > 1e-3
    learned = {"unet": pipe.unet, "vae": pipe.vae, **more}
    plain = xl_pipeline(**{k: copy.deepcopy(v) for k, v in learned.items()})
    wide = xl_pipeline(**{k: copy.deepcopy(v).double() for k, v in learned.items()})

    def draw(pipe: Any, seed: int) -> Tensor:
        return xl_images(pipe, seed, **{k: v.to(pipe.unet.dtype) for k, v in call.items()})

    report = fastdiff.accelerate(pipe, strict=True, pack_cpu_weights=True)
    roots = [pipe.unet, pipe.vae, *more.values()]
    found = [m for root in roots for m in root.modules()]
    attentions = sum(type(m).__name__ == "Attention" for m in found)
    residual = sum(type(m).__name__ == "ResnetBlock2D" for m in found)
    assert report.count("attention") == (attentions, 0)
    assert report.pairs == 2 * residual + 3  # conv_norm_out of U-Net, encoder and decoder
    with record_backends() as ran:
        assert_images_parity(pipe, wide, plain, draw)
    assert {"add_group_norm_silu", "add_layer_norm", "attention", "geglu"} <= set(ran)
    fused = fastdiff.accelerate(pipe, strict=True, scheduler="fused")
    torch.testing.assert_close(xl_images(pipe, **call), eager, rtol=0, atol=2e-4)
    fused.restore()
    report.restore()
    assert torch.equal(xl_images(pipe, **call), eager)


@pytest.mark.parametrize("when", ["before", "after"])
def test_model_cpu_offload(when: str) -> None:
    pytest.importorskip("accelerate")
    pipe = pipeline()
    eager = images(pipe)
    if when == "before":
        pipe.enable_model_cpu_offload(device="cpu")
    report = fastdiff.accelerate(pipe, strict=True)
    if when == "after":
        pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):  # the hooks are moved on after each image
        with record_backends() as ran:
            torch.testing.assert_close(images(pipe), eager, rtol=0, atol=1e-4)
        assert {"add_group_norm_silu", "attention"} <= set(ran)
    report.restore()
    assert torch.equal(images(pipe), eager)
    pipe.remove_all_hooks()
    assert torch.equal(images(pipe), eager)


def worded_pipeline(folder: Path) -> Any:
    encoder = text_encoder(24, seed=4)
    pipe = pipeline(text_encoder=encoder)
    pipe.register_modules(tokenizer=tokenizer(folder))
    return pipe


def worded(pipe: Any, prompt: str) -> Tensor:
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    return pipe(
        prompt, latents=latents, height=16, width=16, num_inference_steps=2, output_type="pt"
    ).images


@pytest.mark.parametrize("when", ["before", "after"])
def test_textual_inversion(when: str, tmp_path: Path) -> None:
    learned = tmp_path / "learned.safetensors"
    save_file({"<lamp>": torch.randn(2, 24, generator=torch.Generator().manual_seed(1))}, learned)
    pipe = worded_pipeline(tmp_path)
    plain = copy.deepcopy(pipe)
    plain.load_textual_inversion(str(learned))
    wanted = worded(plain, "a <lamp> b")
    assert (wanted - worded(plain, "a b")).abs().max() > 1e-4
    if when == "before":
        pipe.load_textual_inversion(str(learned))
    report = fastdiff.accelerate(pipe, strict=True)
    if when == "after":
        pipe.load_textual_inversion(str(learned))
    torch.testing.assert_close(worded(pipe, "a <lamp> b"), wanted, rtol=0, atol=1e-4)
    report.restore()
    assert torch.equal(worded(pipe, "a <lamp> b"), wanted)


def test_a_saved_pipeline_is_diffusers_own(tmp_path: Path) -> None:
    diffusers = import_diffusers("StableDiffusionImg2ImgPipeline", "StableDiffusionPipeline")
    pipe = worded_pipeline(tmp_path)
    eager = worded(pipe, "a b")
    fastdiff.accelerate(pipe, strict=True, pack_cpu_weights=True, scheduler="fused")
    other = diffusers.StableDiffusionImg2ImgPipeline(
        **pipe.components, requires_safety_checker=False
    )
    pipe.scheduler = pipe.scheduler  # diffusers looks at its class again
    for name, one in (("first", pipe), ("other", other)):
        one.save_pretrained(tmp_path / name)
        again = type(one).from_pretrained(tmp_path / name)
        modules = [m for part in (again.unet, again.vae) for m in part.modules()]
        assert not any("fastdiff" in type(m).__module__ for m in modules)
        assert not isinstance(again.scheduler, FusedScheduler)
        if one is pipe:
            again.set_progress_bar_config(disable=True)
            assert torch.equal(worded(again, "a b"), eager)


def test_a_lora_of_convolutions_can_be_saved(tmp_path: Path) -> None:
    """safetensors refuses weights that are not contiguous, and diffusers hands it them as are."""
    peft = pytest.importorskip("peft")
    pipe = pipeline()
    add_lora(pipe.unet)
    fastdiff.accelerate(pipe, strict=True)
    layers = peft.get_peft_model_state_dict(pipe.unet)
    assert any(weight.ndim == 4 and weight.shape[2] == 3 for weight in layers.values())
    type(pipe).save_lora_weights(tmp_path, unet_lora_layers=layers)
    saved = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert len(saved) == len(layers)
    for key, weight in layers.items():
        assert torch.equal(saved[f"unet.{key}"], weight)
