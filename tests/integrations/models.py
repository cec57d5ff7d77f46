"""Small random diffusers models and pipelines, and full-size ones without memory."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.parity import assert_parity
from tests.support.peers import import_diffusers
from tests.support.tiny import randomize

SMALL = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
    "sample_size": 8,
}
UNETS: dict[str, dict[str, Any]] = {
    "sd15": {**SMALL, "attention_head_dim": 4},
    "sd21": {
        **SMALL,
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "sdxl": {
        **SMALL,
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 16,
    },
    "film": {**SMALL, "attention_head_dim": 4, "resnet_time_scale_shift": "scale_shift"},
}
UNETS["film"] |= {
    "down_block_types": ("CrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "up_block_types": ("ResnetUpsampleBlock2D", "CrossAttnUpBlock2D"),
}
APPENDED = {  # the decoder of unCLIP: a text's keys and values next to the pixels'
    **SMALL,
    "down_block_types": ("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
    "attention_head_dim": 8,
    "resnet_time_scale_shift": "scale_shift",
}
VAE = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 4,
    "sample_size": 16,
}
UNCONDITIONAL = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}
FULL_SD15 = {"cross_attention_dim": 768}
FULL_SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
FULL_KL = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}


def build(kind: str, config: dict[str, Any], seed: int = 1) -> Any:
    """A diffusers model of this class with random weights, in eval mode."""
    module = getattr(import_diffusers(kind), kind)(**config)
    randomize(module, seed)
    return module.eval()


class Network(nn.Module):
    """A diffusers model as a function of tensors alone, to one tensor."""

    def __init__(self, kind: str, config: dict[str, Any]) -> None:
        super().__init__()
        self.inner, self.kind, self.config = build(kind, config), kind, config

    def inputs(self, seed: int = 0) -> list[Tensor]:
        draw = torch.Generator().manual_seed(5 + seed)
        if self.kind in ("AutoencoderKL", "VQModel"):
            return [torch.randn(2, 3, 16, 16, generator=draw)]
        channels = self.config.get("in_channels", 3 if self.kind == "UNet2DModel" else 4)
        x = torch.randn(2, channels, 8, 8, generator=draw)
        if self.kind == "UNet2DModel":
            return [x]
        context = torch.randn(2, 5, self.config["cross_attention_dim"], generator=draw)
        image = torch.randn(2, 3, 16, 16, generator=draw)
        return [x, context, image] if self.kind == "ControlNetModel" else [x, context]

    def forward(self, x: Tensor, context: Tensor | None = None, image: Any = None) -> Tensor:
        t, inner = torch.full((len(x),), 421.0, dtype=x.dtype), self.inner
        if self.kind == "AutoencoderKL":
            return inner.decode(inner.encode(x).latent_dist.mean).sample
        if self.kind == "VQModel":  # the nearest code is not a continuous function
            h = inner.encode(x).latents
            return inner.decode(h, force_not_quantize=True).sample
        if self.kind == "UNet2DModel":
            return inner(x, t).sample
        if image is not None:
            out = inner(x, t, context, image, return_dict=False)
            return torch.cat([r.flatten(1) for r in (*out[0], out[1])], dim=1)
        added = None
        if self.config.get("addition_embed_type"):
            ids = torch.arange(6, dtype=x.dtype).expand(len(x), 6)
            text = torch.linspace(-1, 1, 16, dtype=x.dtype).expand(len(x), 16)
            added = {"time_ids": ids, "text_embeds": text}
        return inner(x, t, context, added_cond_kwargs=added).sample


CONTROLNET = {k: v for k, v in UNETS["sd15"].items() if k not in ("up_block_types", "sample_size")}
CONTROLNET["conditioning_embedding_out_channels"] = (8, 16)
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: ("UNet2DConditionModel", config) for name, config in UNETS.items()},
    "appended": ("UNet2DConditionModel", APPENDED),
    "unet2d": ("UNet2DModel", UNCONDITIONAL),
    "controlnet": ("ControlNetModel", CONTROLNET),
    "kl": ("AutoencoderKL", VAE),
    "vq": ("VQModel", {**VAE, "num_vq_embeddings": 16}),
}


def pipeline(scheduler: Any = None, **components: Any) -> Any:
    """A text-to-image pipeline of Stable Diffusion 1.5's kind; prompts are given as embeddings."""
    diffusers = import_diffusers("StableDiffusionPipeline", "DDIMScheduler", "PNDMScheduler")
    pipe = diffusers.StableDiffusionPipeline(
        vae=components.get("vae") or build("AutoencoderKL", VAE, 2),
        unet=components.get("unet") or build("UNet2DConditionModel", UNETS["sd15"]),
        text_encoder=components.get("text_encoder"),
        tokenizer=None,
        scheduler=scheduler
        or diffusers.DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe: Any, steps: int = 4, seed: int = 0, **options: Any) -> Tensor:
    """(2, 3, 16, 16) in [0, 1], from the noise and embeddings of a seed."""
    draw = torch.Generator().manual_seed(7 + seed)
    dtype = pipe.unet.dtype
    width = pipe.unet.config.cross_attention_dim
    prompts = torch.randn(2, 5, width, generator=draw).to(dtype)
    given = {
        "prompt_embeds": prompts,
        "negative_prompt_embeds": 0.3 * prompts.flip(1),
        "latents": torch.randn(2, 4, 8, 8, generator=draw).to(dtype),
        "height": 16,
        "width": 16,
        "num_inference_steps": steps,
        "guidance_scale": 4.0,
        "output_type": "pt",
    } | options
    known = inspect.signature(pipe.__call__).parameters
    return pipe(**{name: value for name, value in given.items() if name in known}).images


def assert_images_parity(
    pipe: Any, wide: Any, plain: Any, make: Callable[..., Tensor] = images
) -> None:
    """`assert_parity` of what pipelines draw: the one under test, in fp64, diffusers' own."""
    assert_parity(*(lambda seed, p=p: make(p, seed=seed) for p in (pipe, wide, plain)))
