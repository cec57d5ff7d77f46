"""Write a model as a folder that diffusers loads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.checkpoint.layouts.bundle import save_tensors
from fastdiff.checkpoint.layouts.diffusers import dit
from fastdiff.checkpoint.layouts.diffusers.read import (
    CONFIG,
    INDEX,
    SCHEDULER_CONFIG,
    STEMS,
    names,
)
from fastdiff.checkpoint.model import Model, check_one_stage
from fastdiff.checkpoint.scheduler import scheduler_config
from fastdiff.checkpoint.weights import Progress
from fastdiff.files import atomic_folder, write_json
from fastdiff.models.autoencoder import Autoencoder, AutoencoderConfig
from fastdiff.models.dit import DiT
from fastdiff.models.layers import AttentionBlock
from fastdiff.models.text import TextEncoder
from fastdiff.models.text_transformer import TextTransformer
from fastdiff.models.unet import UNet, UNetConfig

VERSION = {"_diffusers_version": "0.34.0"}  # version of these options; pipelines read it
WEIGHTS = f"{STEMS[0]}.safetensors"
TIME_EMBED_DIM = 256  # width of the embedding of each of SDXL's sizes and crops
DEPTH_PIPELINE = "StableDiffusionDepth2ImgPipeline"
SAFETENSORS_METADATA = {"format": "pt"}  # diffusers requires it


def save_diffusers(
    model: Model,
    folder: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a model atomically, as diffusers would; an existing folder is replaced.

    dtype: dtype to store floating-point weights in; None keeps each tensor's own.

    Raises:
        ValueError: no model or pipeline of diffusers has one of the parts; the message names it.
        OSError: the folder cannot be written.
    """
    check_one_stage(model)
    parts: dict[str, tuple[UNet | DiT | Autoencoder, dict[str, Any]]] = {}
    denoiser = _denoiser(model)
    if isinstance(denoiser, DiT):
        parts["transformer"] = (denoiser, dit.options(denoiser.config))
    unet = denoiser if isinstance(denoiser, UNet) else None
    if unet is not None:
        linear = model.provenance.get("linear projections", unet.config.num_heads is None)
        options = unet_options(unet.config, linear_projections=bool(linear))
        if "addition_time_embed_dim" in options:
            width = model.provenance.get("addition_time_embed_dim", TIME_EMBED_DIM)
            options["addition_time_embed_dim"] = width
        parts["unet"] = (unet, options)
    if (first := model.autoencoder) is not None:
        conditioned = unet is None or unet.config.context_dim is not None  # or a DiT
        options = autoencoder_options(first.config)
        options["scaling_factor"] = model.scale_factor
        parts["vae" if conditioned else "vqvae"] = (first, options)
    if unet is not None and model.image_size is not None:
        if first is not None:
            parts["unet"][1]["sample_size"] = model.image_size // first.downsample_factor
        elif unet.config.context_dim is None:
            parts["unet"][1]["sample_size"] = model.image_size
    if model.class_embedding is not None:
        raise ValueError(
            "diffusers has no pipeline with a class embedding as context (LDM's cin256); save a "
            "bundle instead"
        )
    index = _index(model, {n: options["_class_name"] for n, (_, options) in parts.items()})
    with atomic_folder(folder) as temporary:
        alone = len(parts) == 1 and model.schedule is None and not model.text_encoders
        for name, (part, options) in parts.items():
            place = temporary if alone else temporary / name
            place.mkdir(exist_ok=True)
            write_json(place / CONFIG, {**options, **VERSION})
            linear = bool(options.get("use_linear_projection"))
            _write_weights(_state_dict(part, linear), place, dtype, progress)
        if not alone:
            write_json(temporary / INDEX, {**index, **VERSION})
        if model.schedule is not None:
            (temporary / "scheduler").mkdir()
            settings = scheduler_config(model.schedule, model.prediction, model.sampler)
            write_json(temporary / "scheduler" / SCHEDULER_CONFIG, {**settings, **VERSION})
        for name, encoder in zip(_text_names(model), _clips(model), strict=True):
            _write_text(encoder, name, temporary, dtype)


def _denoiser(model: Model) -> UNet | DiT | None:
    """The denoiser, which must be of a kind that diffusers has.

    Raises:
        ValueError: diffusers has no such denoiser.
    """
    if model.clip is not None:
        raise ValueError("a diffusers folder cannot contain a noised CLIP; save a bundle instead")
    if model.classifier is not None:
        raise ValueError(
            "a diffusers folder cannot contain a noisy classifier; save a bundle instead"
        )
    if model.controlnets:
        raise ValueError(
            "fastdiff writes no ControlNets into diffusers folders; save the model without "
            "controlnet, and give it when the folder is loaded"
        )
    channels = None if model.denoiser is None else model.denoiser.config.in_channels
    if model.extra not in (None, "none") and (model.extra, channels) != ("inpainting", 9):
        raise ValueError(
            f"{model.name} reads {model.extra} channels behind x, for which diffusers has no "
            f"pipeline with {channels} input channels; save it as a bundle"
        )
    if "class_embed_type" in model.provenance:
        raise ValueError(
            "fastdiff cannot write a U-Net that reads an image embedding; copy its folder"
        )
    if isinstance(model.denoiser, DiT) and model.schedule is not None and not model.autoencoder:
        raise ValueError(
            "diffusers' DiTPipeline needs an autoencoder, got a DiT on pixels; write a bundle"
        )
    if model.denoiser is None or isinstance(model.denoiser, UNet | DiT):
        return model.denoiser
    raise ValueError(
        f"a diffusers folder needs a U-Net or DiT, got {type(model.denoiser).__name__}; save a "
        "bundle instead"
    )


def unet_options(config: UNetConfig, *, linear_projections: bool) -> dict[str, Any]:
    """The config.json of the diffusers U-Net that computes the same.

    Raises:
        ValueError: neither UNet2DConditionModel nor UNet2DModel supports this architecture.
    """
    if config.timestep_scale != 1:
        raise _no_such("timestep_scale", config.timestep_scale, "1")
    if config.num_heads_upsample not in (None, config.num_heads):
        raise _no_such("num_heads_upsample", config.num_heads_upsample, str(config.num_heads))
    if config.time_channels not in (None, config.model_channels):
        raise _no_such("time_channels", config.time_channels, str(config.model_channels))
    if not config.conv_resample:
        raise _no_such("conv_resample", False, "True")
    ddpm = config.time_embedding != "openai"  # of "ddpm-original" diffusers rounds otherwise
    shared = {
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": list(config.widths),
        "layers_per_block": config.num_res_blocks,
        "downsample_padding": int(config.downsample_padding == "symmetric"),
        "flip_sin_to_cos": not ddpm,
        "freq_shift": int(ddpm),
        "norm_num_groups": config.norm_groups,
        "norm_eps": config.norm_eps,
        "dropout": config.dropout,
        "act_fn": "silu",
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift_norm else "default",
    }
    if config.num_classes is not None:
        shared["num_class_embeds"] = config.num_classes + config.null_class
    if config.context_dim is not None:
        specific = _condition_options(config, linear_projections)
    else:
        specific = _unconditional_options(config)
    return {**specific, **shared}


def _condition_options(config: UNetConfig, linear_projections: bool) -> dict[str, Any]:
    depths = list(config.attention_depth)
    if config.context_attention == "appended":
        return _appended_options(config)
    if depths[-1] not in (0, config.middle_depth) or config.middle_depth == 0:
        raise _no_such("middle_depth", config.middle_depth, "that of the last level")
    if config.resblock_updown:
        raise _no_such("resblock_updown", True, "False with a context")
    if config.added_condition_dim is not None and config.added_layers != 2:
        raise _no_such("added_layers", config.added_layers, "2 with cross-attention")
    depths[-1] = config.middle_depth
    on = [depth > 0 for depth in config.attention_depth]
    heads = [config.heads(width) for width in config.widths]
    return {
        "_class_name": "UNet2DConditionModel",
        "down_block_types": ["CrossAttnDownBlock2D" if x else "DownBlock2D" for x in on],
        "up_block_types": ["CrossAttnUpBlock2D" if x else "UpBlock2D" for x in on[::-1]],
        "transformer_layers_per_block": [max(depth, 1) for depth in depths],
        "cross_attention_dim": config.context_dim,
        "attention_head_dim": heads[0] if config.num_heads is not None else heads,
        "use_linear_projection": linear_projections,
        **(
            {"only_cross_attention": [not each for each in config.self_attention]}
            if config.self_attention
            else {}
        ),
        **(
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": TIME_EMBED_DIM,
                "projection_class_embeddings_input_dim": config.added_condition_dim,
            }
            if config.added_condition_dim is not None
            else {}
        ),
    }


def _appended_options(config: UNetConfig) -> dict[str, Any]:
    """The blocks of unCLIP's decoder; see `read._appended_options`."""
    if config.added_condition_dim is not None and config.added_layers:
        raise _no_such("added_layers", config.added_layers, "0 with appended attention")
    if not config.resblock_updown or config.middle_depth != 1:
        raise _no_such("resblock_updown", config.resblock_updown, "True with appended attention")
    if config.head_dim is None:
        raise _no_such("num_heads", config.num_heads, "None, but head_dim, with appended attention")
    down = ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D")
    up = ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D")
    return {
        "_class_name": "UNet2DConditionModel",
        "down_block_types": [down[depth] for depth in config.attention_depth],
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": [up[depth] for depth in config.attention_depth[::-1]],
        "cross_attention_dim": config.context_dim,
        "attention_head_dim": config.head_dim,
        **({} if config.added_condition_dim is None else {"class_embed_type": "identity"}),
    }


def _unconditional_options(config: UNetConfig) -> dict[str, Any]:
    attended = [w for w, d in zip(config.widths, config.attention_depth, strict=True) if d]
    widths = {*attended, *([config.widths[-1]] if config.middle_depth else [])}
    dims = {width // config.heads(width) for width in widths}
    one_head = config.num_heads == 1
    if len(dims) > 1 and not one_head:
        raise _no_such("num_heads", config.num_heads, "1, or heads of one width (head_dim)")
    if config.added_condition_dim is not None:
        raise _no_such("added_condition_dim", config.added_condition_dim, "None without a context")
    resnet = "resnet" if config.resblock_updown else "conv"
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
    if not config.resblock_updown:
        plain = ("DownBlock2D", "UpBlock2D")
    on = [depth > 0 for depth in config.attention_depth]
    return {
        "_class_name": "UNet2DModel",
        "down_block_types": ["AttnDownBlock2D" if x else plain[0] for x in on],
        "up_block_types": ["AttnUpBlock2D" if x else plain[1] for x in on[::-1]],
        "downsample_type": resnet,
        "upsample_type": resnet,
        "attention_head_dim": None if one_head else next(iter(dims), 8),
        "attn_norm_num_groups": config.norm_groups,
        "add_attention": bool(config.middle_depth),
    }


def autoencoder_options(config: AutoencoderConfig) -> dict[str, Any]:
    """The config.json of the AutoencoderKL or VQModel that computes the same."""
    on = [config.has_attention(level) for level in range(len(config.channel_mult))]
    vq = config.regularization == "vq"
    return {
        "_class_name": "VQModel" if vq else "AutoencoderKL",
        "in_channels": config.image_channels,
        "out_channels": config.image_channels,
        "block_out_channels": list(config.widths),
        "layers_per_block": config.num_res_blocks,
        "latent_channels": config.latent_channels,
        "down_block_types": ["AttnDownEncoderBlock2D" if x else "DownEncoderBlock2D" for x in on],
        "up_block_types": ["AttnUpDecoderBlock2D" if x else "UpDecoderBlock2D" for x in on[::-1]],
        "norm_num_groups": config.norm_groups,
        "act_fn": "silu",
        **({"num_vq_embeddings": config.codebook_size} if vq else {}),
        **({} if config.middle_attention else {"mid_block_add_attention": False}),
    }


def diffusers_state_dict(
    model: UNet | Autoencoder, *, linear_projections: bool = False
) -> dict[str, Tensor]:
    """Our weights under diffusers' names; they are views unless rows have to be reordered."""
    state = model.state_dict()
    result: dict[str, Tensor] = {}
    orders = {
        f"{name}.{layer}": (parts, module.num_heads, module.qkv_order)
        for name, module in model.named_modules()
        if isinstance(module, AttentionBlock)
        for layer, parts in (("qkv", 3), ("context_kv", 2))
    }
    for name, keys in names(model).items():
        value = state[name]
        parts, heads, order = orders.get(name.rpartition(".")[0], (1, 1, "new"))
        if order == "legacy":  # rows (H, 3, d) to (3, H, d)
            value = value.unflatten(0, (heads, parts, -1)).transpose(0, 1).flatten(0, 2)
        projection = name.endswith((".proj_in.weight", ".proj_out.weight"))
        if projection and isinstance(model, UNet) and not linear_projections:
            value = value[:, :, None, None]
        result.update(zip(keys, value.chunk(len(keys)), strict=True))
    return result


def _no_such(name: str, got: Any, expected: str) -> ValueError:
    return ValueError(
        f"diffusers has no U-Net with {name} {got!r}, expected {expected}; save a bundle instead"
    )


def _state_dict(part: UNet | DiT | Autoencoder, linear: bool) -> dict[str, Tensor]:
    if isinstance(part, DiT):
        return dit.state_dict(part)
    return diffusers_state_dict(part, linear_projections=linear)


def _write_weights(
    state: dict[str, Tensor],
    folder: Path,
    dtype: torch.dtype | None,
    progress: Progress | None,
) -> None:
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        # clone: safetensors rejects tensors that share memory
        tensors[key] = value.detach().to("cpu", dtype or value.dtype).contiguous().clone()
        if progress is not None:
            progress(key, tensors[key].nbytes)
    save_tensors(tensors, folder / WEIGHTS, SAFETENSORS_METADATA)


def _clips(model: Model) -> list[TextEncoder]:
    """The text encoders, all of them CLIP's.

    Raises:
        ValueError: one is another.
    """
    clips = [
        encoder
        for encoder in model.text_encoders
        if isinstance(encoder, TextEncoder) and not isinstance(encoder.model, TextTransformer)
    ]
    if len(clips) < len(model.text_encoders):
        raise ValueError(
            "diffusers has no pipeline with the text transformer of this model; save it as a "
            "bundle, or load it with text_encoders=False to save the rest"
        )
    return clips


def _text_names(model: Model) -> list[str]:
    encoders = _clips(model)
    if len(encoders) == 1:  # XL's refiner has only the second encoder
        return ["text_encoder_2" if encoders[0].pooled else "text_encoder"]
    return ["text_encoder", "text_encoder_2"][: len(encoders)]


def _index(model: Model, parts: dict[str, str]) -> dict[str, Any]:
    """The model_index.json of diffusers' pipeline with these parts (name -> class)."""
    text = _text_names(model)
    pipeline = model.provenance.get("pipeline") or _pipeline(model, parts, text)
    result: dict[str, Any] = {"_class_name": pipeline}
    for name, kind in parts.items():
        result[name] = ["diffusers", kind]
    if model.schedule is not None:
        settings = scheduler_config(model.schedule, model.prediction, model.sampler)
        result["scheduler"] = ["diffusers", settings["_class_name"]]
    for name, encoder in zip(text, _clips(model), strict=True):
        result[name] = ["transformers", type(encoder.model).__name__]
        tokenizer = None if encoder.tokenizer is None else "CLIPTokenizer"
        result[name.replace("text_encoder", "tokenizer")] = (
            ["transformers", tokenizer] if tokenizer else [None, None]
        )
    if pipeline == "DiTPipeline" and model.class_names:
        known = model.provenance.get(dit.ID2LABEL)
        result[dit.ID2LABEL] = dit.all_names(model.class_names, known)
    if pipeline.startswith("StableDiffusionXL"):
        result["force_zeros_for_empty_prompt"] = model.provenance.get(
            "force_zeros_for_empty_prompt", pipeline == "StableDiffusionXLPipeline"
        )
        for name in ("text_encoder", "tokenizer"):
            result.setdefault(name, [None, None])
        if pipeline == "StableDiffusionXLImg2ImgPipeline":  # the refiner takes a score, not sizes
            result["requires_aesthetics_score"] = model.provenance.get(
                "requires_aesthetics_score", text == ["text_encoder_2"]
            )
    elif pipeline == DEPTH_PIPELINE:  # without an estimator it needs a depth map
        result["depth_estimator"] = result["feature_extractor"] = [None, None]
    elif pipeline.startswith("StableDiffusion"):
        result["safety_checker"] = result["feature_extractor"] = [None, None]
        result["requires_safety_checker"] = False
    return result


def _pipeline(model: Model, parts: dict[str, str], text: list[str]) -> str:
    unet = model.denoiser
    if isinstance(unet, DiT):
        return "DiTPipeline"
    if not isinstance(unet, UNet) or unet.config.context_dim is None:
        return _ldm_pipeline(model) if "vqvae" in parts else "DDPMPipeline"
    inpaint = unet.config.in_channels == 9
    if unet.config.in_channels == unet.config.out_channels + 1:
        return DEPTH_PIPELINE
    if unet.config.added_condition_dim is None:
        return "StableDiffusionInpaintPipeline" if inpaint else "StableDiffusionPipeline"
    if text == ["text_encoder_2"]:
        return "StableDiffusionXLImg2ImgPipeline"
    return "StableDiffusionXLInpaintPipeline" if inpaint else "StableDiffusionXLPipeline"


def _ldm_pipeline(model: Model) -> str:
    """The pipeline of a U-Net on latents without text.

    Raises:
        ValueError: the U-Net reads more than x, and not what diffusers' super-resolution does.
    """
    config: Any = None if model.denoiser is None else model.denoiser.config
    if config is None or config.in_channels == config.out_channels:
        return "LDMPipeline"
    if config.in_channels - config.out_channels != model.image_channels:
        raise ValueError(
            f"diffusers has no pipeline with a U-Net without text that reads {config.in_channels} "
            f"channels and predicts {config.out_channels}; save a bundle instead"
        )
    if model.scale_factor != 1:
        raise ValueError(
            f"diffusers' LDMSuperResolutionPipeline has no scale factor, got {model.scale_factor}; "
            "save a bundle instead"
        )
    return "LDMSuperResolutionPipeline"


def _write_text(encoder: TextEncoder, name: str, folder: Path, dtype: torch.dtype | None) -> None:
    model: Any = encoder.model
    own = next(nn.Module.parameters(model)).dtype
    if dtype is None or dtype == own:
        model.save_pretrained(folder / name, safe_serialization=True)
    else:
        state = {
            key: value.to(dtype) if value.is_floating_point() else value
            for key, value in model.state_dict().items()
        }
        model.save_pretrained(folder / name, state_dict=state, safe_serialization=True)
    if encoder.tokenizer is not None:
        encoder.tokenizer.save_pretrained(folder / name.replace("text_encoder", "tokenizer"))
