"""Small random models made and saved by diffusers, in the published layouts with few channels."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdiff.checkpoint.layouts.diffusers.read import (
    autoencoder_config,
    convert_state_dict,
    unet_config,
)
from fastdiff.checkpoint.model import Model
from fastdiff.diffusion.schedules import ScheduleConfig
from fastdiff.models.autoencoder import Autoencoder
from fastdiff.models.text import TextEncoder
from fastdiff.models.unet import UNet
from tests.support.peers import import_diffusers, import_transformers

WORDS = ("a", "cat", "dog", "photo", "of", "red", "blue", "sky")
UNET: dict[str, Any] = {
    "sample_size": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
XL_UNET = UNET | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "cross_attention_dim": 56,  # 32 of the first encoder, 24 of the second
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 16 + 6 * 8,
}
REFINER_UNET = XL_UNET | {
    "cross_attention_dim": 24,
    "projection_class_embeddings_input_dim": 16 + 5 * 8,
}
VAE: dict[str, Any] = {
    "block_out_channels": (16, 16, 16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 64,
}
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def byte_letters() -> list[str]:
    """The 256 characters that stand for bytes in GPT-2's and CLIP's vocabularies."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) for byte in shown] + [chr(256 + i) for i in range(len(hidden))]


def save_tokenizer(folder: Path, *, pad_token: str = "<|endoftext|>") -> Path:
    """A CLIP vocabulary of every byte and a few words. Returns the folder."""
    letters = byte_letters()
    pieces = [*letters, *(letter + "</w>" for letter in letters)]
    merges = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            if f"{parts[0]} {parts[1]}" not in merges:
                merges.append(f"{parts[0]} {parts[1]}")
            parts[:2] = [parts[0] + parts[1]]
            if parts[0] not in pieces:
                pieces.append(parts[0])
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "pad_token": pad_token,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def tokenizer(folder: Path, *, pad_token: str = "<|endoftext|>") -> Any:
    saved = save_tokenizer(folder, pad_token=pad_token)
    return import_transformers("CLIPTokenizer").CLIPTokenizer.from_pretrained(saved)


def randomized(model: nn.Module, seed: int) -> nn.Module:
    """Randomize norms and biases as well, since initial values of 0 or 1 would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval().requires_grad_(False)


def text_encoder(
    words: Any, *, width: int = 32, projection: int | None = None, **change: Any
) -> Any:
    """A random CLIP text transformer of three layers for a tokenizer."""
    transformers = import_transformers("CLIPTextModel", "CLIPTextModelWithProjection")
    config = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=3,
        projection_dim=projection or width,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        initializer_factor=4.0,
        **change,
    )
    kind = "CLIPTextModel" if projection is None else "CLIPTextModelWithProjection"
    with torch.random.fork_rng():
        torch.manual_seed(width)
        return randomized(getattr(transformers, kind)(config), width)


def seeded(name: str, options: dict[str, Any], seed: int) -> Any:
    """A random diffusers model."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return randomized(getattr(import_diffusers(name), name)(**options), seed)


KINDS: dict[str, dict[str, Any]] = {
    "sd1": UNET,
    "sd2": UNET | {"use_linear_projection": True},
    "inpaint": UNET | {"in_channels": 9},
    "xl": XL_UNET,
    "refiner": REFINER_UNET,
}


def components(kind: str, folder: Path) -> dict[str, Any]:
    """The components of a Stable Diffusion pipeline, as keyword arguments for its class; fp32.

    kind: one of KINDS. folder: where the vocabularies are written.
    """
    parts: dict[str, Any] = {
        "unet": seeded("UNet2DConditionModel", KINDS[kind], 1),
        "vae": seeded("AutoencoderKL", VAE | _scaling(kind), 2),
        "scheduler": _scheduler(kind),
    }
    plain = tokenizer(folder / "tokenizer", pad_token="!" if kind == "sd2" else "<|endoftext|>")
    if kind in ("xl", "refiner"):
        second = tokenizer(folder / "tokenizer_2", pad_token="!")
        parts["tokenizer"] = plain if kind == "xl" else None
        parts["text_encoder"] = text_encoder(plain) if kind == "xl" else None
        parts["tokenizer_2"] = second
        parts["text_encoder_2"] = text_encoder(second, width=24, projection=16)
        return parts
    return parts | {
        "tokenizer": plain,
        "text_encoder": text_encoder(plain),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def _scaling(kind: str) -> dict[str, Any]:
    if kind in ("xl", "refiner"):
        return {"scaling_factor": 0.13025, "force_upcast": False}
    return {"scaling_factor": 0.18215}


def _scheduler(kind: str) -> Any:
    prediction = "v_prediction" if kind == "sd2" else "epsilon"
    return import_diffusers("DDIMScheduler").DDIMScheduler(**SCHEDULER, prediction_type=prediction)


def pipeline(name: str, parts: dict[str, Any], **change: Any) -> Any:
    """A diffusers pipeline without a progress bar."""
    made = getattr(import_diffusers(name), name)(**parts, **change)
    made.set_progress_bar_config(disable=True)
    return made


def save_folder(kind: str, folder: Path) -> Path:
    """Save a small random checkpoint with diffusers. Returns the folder."""
    names = {
        "xl": "StableDiffusionXLPipeline",
        "refiner": "StableDiffusionXLImg2ImgPipeline",
        "inpaint": "StableDiffusionInpaintPipeline",
    }
    change = {"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False}
    made = pipeline(
        names.get(kind, "StableDiffusionPipeline"),
        components(kind, folder / "vocabularies"),
        **(change if kind == "refiner" else {}),
    )
    made.save_pretrained(folder / kind)
    return folder / kind


def checkpoint(kind: str, parts: dict[str, Any]) -> Model:
    """The same weights in a fastdiff model."""
    theirs, vae = parts["unet"], parts["vae"]
    unet = UNet(unet_config(json.loads(theirs.to_json_string())))
    unet.load_state_dict(convert_state_dict(theirs.state_dict(), unet))
    autoencoder = Autoencoder(autoencoder_config(json.loads(vae.to_json_string())))
    autoencoder.load_state_dict(convert_state_dict(vae.state_dict(), autoencoder))
    xl = kind in ("xl", "refiner")
    names = [("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")]
    encoders = tuple(
        TextEncoder(
            model=copy.deepcopy(parts[model]),
            tokenizer=parts[words],
            skip=int(xl),
            final_norm=not xl,
            pooled=xl and model == "text_encoder_2",
        )
        for model, words in names
        if parts.get(model) is not None
    )
    return Model(
        layout="diffusers",
        denoiser=unet,
        autoencoder=autoencoder,
        text_encoders=encoders,
        schedule=ScheduleConfig(kind="scaled_linear", beta_start=0.00085, beta_end=0.012),
        prediction="v" if kind == "sd2" else "eps",
        scale_factor=vae.config.scaling_factor,
        image_size=64,
        path=Path(kind),
    )
