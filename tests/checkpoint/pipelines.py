"""Pipelines of few channels with random weights, saved by diffusers itself."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.models.test_against_diffusers import SD, SDXL, VAE, peer_model
from tests.support.peers import import_diffusers

VAE_KL = {**VAE, "latent_channels": 4, "scaling_factor": 0.18215}
STABLE_DIFFUSION = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
}
WORDS = "abcdefghijklmnopqrstuvwxyz"


def text_model(class_name: str, width: int, layers: int, dtype: torch.dtype, **options: Any) -> Any:
    """A text encoder of transformers whose every parameter is random."""
    import_diffusers()
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=54,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=1,
        max_position_embeddings=16,
        bos_token_id=52,
        eos_token_id=53,
        **options,
    )
    with torch.random.fork_rng():
        torch.manual_seed(width)
        model = getattr(transformers, class_name)(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer that knows the letters."""
    import_diffusers()
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = [*WORDS, *(f"{letter}</w>" for letter in WORDS)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16
    )


def pipeline(kind: str, folder: Path, dtype: torch.dtype = torch.float64) -> dict[str, nn.Module]:
    """Save a pipeline ("sd1", "sd1-inpaint", "sd2", "sdxl", "ldm") and return its models."""
    names = ("AutoencoderKL", "VQModel", "UNet2DConditionModel", "UNet2DModel", "LDMPipeline")
    diffusers: Any = import_diffusers(
        *names, "StableDiffusionPipeline", "StableDiffusionXLPipeline"
    )
    scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing="leading", **STABLE_DIFFUSION)
    words = tokenizer(folder.parent / "words")
    xl, parts = kind == "sdxl", dict[str, Any]()
    if kind == "ldm":
        options = {**VAE, "num_vq_embeddings": 64, "scaling_factor": 1.0}
        parts["vqvae"] = peer_model("VQModel", options, dtype)
        parts["unet"] = peer_model("UNet2DModel", LDM, dtype)
        built = diffusers.LDMPipeline(**parts, scheduler=diffusers.DDIMScheduler())
    else:
        vae = {**VAE_KL, "scaling_factor": 0.13025} if xl else VAE_KL
        unet = SDXL if xl else SD
        if kind == "sd2":
            unet = {**SD, "use_linear_projection": True}
        elif kind == "sd1-inpaint":
            unet = {**SD, "in_channels": 9}
        parts["vae"] = peer_model("AutoencoderKL", vae, dtype)
        parts["unet"] = peer_model("UNet2DConditionModel", unet, dtype)
        act = "quick_gelu" if kind.startswith("sd1") else "gelu"
        parts["text_encoder"] = text_model(
            "CLIPTextModel", 8 if xl else 24, 3, dtype, hidden_act="quick_gelu" if xl else act
        )
        if xl:
            parts["text_encoder_2"] = text_model(
                "CLIPTextModelWithProjection", 16, 3, dtype, projection_dim=4, hidden_act="gelu"
            )
            built = diffusers.StableDiffusionXLPipeline(
                **parts,
                tokenizer=words,
                tokenizer_2=words,
                scheduler=scheduler,
                add_watermarker=False,
            )
        else:
            class_ = diffusers.StableDiffusionPipeline
            if kind == "sd1-inpaint":
                import_diffusers("StableDiffusionInpaintPipeline")
                class_ = diffusers.StableDiffusionInpaintPipeline
            built = class_(
                **parts,
                tokenizer=words,
                scheduler=scheduler,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built.save_pretrained(folder)
    return parts


LDM = {  # LDM-4's U-Net: attention of width 32 without context
    "sample_size": 8,
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 32,
    "norm_num_groups": 32,
    "layers_per_block": 2,
}


def opened(folder: Path) -> Any:
    """A folder of Stable Diffusion as diffusers' pipeline."""
    diffusers: Any = import_diffusers("StableDiffusionPipeline")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe
