"""unCLIP's pipelines with few channels and random weights, saved by diffusers itself."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from tests.checkpoint.pipelines import text_model, tokenizer
from tests.models.test_against_diffusers import KARLO, peer_model, randn
from tests.support.peers import import_diffusers, import_transformers

WIDTH, TOKENS, CONTEXT = 16, 16, 24
SMALL, LARGE, SEEN = 8, 16, 12
"""Sides of the decoder's image, of the upsampled one, and of what CLIP's image encoder sees."""
PRIOR: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "embedding_dim": WIDTH,
    "num_embeddings": TOKENS,
}
DECODER = KARLO | {
    "sample_size": SMALL,
    "block_out_channels": (32, 64),
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": CONTEXT,
}
UPSAMPLER: dict[str, Any] = {
    "sample_size": LARGE,
    "in_channels": 6,
    "out_channels": 3,
    "block_out_channels": (32, 64),
    "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
    "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
    "layers_per_block": 1,
    "add_attention": False,
    "resnet_time_scale_shift": "scale_shift",
}
PROJECTION: dict[str, Any] = {
    "clip_extra_context_tokens": 3,
    "clip_embeddings_dim": WIDTH,
    "time_embed_dim": 4 * 32,
    "cross_attention_dim": CONTEXT,
}


def schedulers() -> dict[str, Any]:
    """The three schedulers of karlo."""
    made = import_diffusers("UnCLIPScheduler").UnCLIPScheduler
    return {
        "prior_scheduler": made(prediction_type="sample", clip_sample_range=5.0),
        "decoder_scheduler": made(variance_type="learned_range"),
        "super_res_scheduler": made(),
    }


def projection(dtype: torch.dtype) -> Any:
    """The projection, all of whose parameters are random."""
    import_diffusers("UnCLIPPipeline")
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

    with torch.random.fork_rng():
        torch.manual_seed(5)
        made = UnCLIPTextProjModel(**PROJECTION)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return made.to(dtype).eval()


def karlo(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Save diffusers' UnCLIPPipeline to a folder, and return it."""
    prior = peer_model("PriorTransformer", PRIOR, dtype)
    with torch.no_grad():
        for parameter in (prior.positional_embedding, prior.prd_embedding, prior.clip_mean):
            parameter.copy_(randn(*parameter.shape, dtype=dtype, seed=3))
        prior.clip_std.add_(1.5)  # it begins as zeros, with which no embedding depends on noise
    made = schedulers()
    parts: dict[str, Any] = {"prior": prior, **shared(folder, dtype), **made}
    pipe = import_diffusers("UnCLIPPipeline").UnCLIPPipeline(**parts)
    return saved(pipe, folder)


def shared(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """The networks of both of unCLIP's pipelines."""
    return {
        "decoder": peer_model("UNet2DConditionModel", DECODER, dtype),
        "text_encoder": text_model(
            "CLIPTextModelWithProjection", WIDTH, 2, dtype, projection_dim=WIDTH, hidden_act="gelu"
        ),
        "tokenizer": tokenizer(folder.parent / "words"),
        "text_proj": projection(dtype),
        "super_res_first": peer_model("UNet2DModel", UPSAMPLER, dtype),
        "super_res_last": changed(peer_model("UNet2DModel", UPSAMPLER, dtype)),
    }


def vision(dtype: torch.dtype, width: int = WIDTH) -> Any:
    """CLIP's image encoder, all of whose parameters are random."""
    transformers = import_transformers("CLIPVisionModelWithProjection")
    config = transformers.CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=32,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SEEN,
        patch_size=4,
    )
    with torch.random.fork_rng():
        torch.manual_seed(6)
        model = transformers.CLIPVisionModelWithProjection(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def processor() -> Any:
    """transformers' preparation of pictures for it, with Pillow."""
    import_transformers("CLIPVisionModelWithProjection")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": SEEN + 1}, crop_size=SEEN)


def variation(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Save diffusers' UnCLIPImageVariationPipeline to a folder, and return it."""
    made = schedulers()
    del made["prior_scheduler"]
    pipe = import_diffusers("UnCLIPImageVariationPipeline").UnCLIPImageVariationPipeline(
        **shared(folder, dtype),
        image_encoder=vision(dtype),
        feature_extractor=processor(),
        **made,
    )
    return saved(pipe, folder)


def changed(module: Any) -> Any:
    """Other weights than those that `peer_model` makes for the same options."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.8)
    return module


def saved(pipe: Any, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.save_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe
