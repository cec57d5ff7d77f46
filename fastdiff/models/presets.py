"""Named architectures, each with its exact number of parameters in a comment that a test checks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastdiff.models.autoencoder import AutoencoderConfig
from fastdiff.models.classifier import ClassifierConfig
from fastdiff.models.dit import DiTConfig
from fastdiff.models.mlp import MLPConfig
from fastdiff.models.prior import PriorConfig
from fastdiff.models.unet import UNetConfig
from fastdiff.models.uvit import UViTConfig


def _stable_diffusion_1(in_channels: int) -> UNetConfig:
    return UNetConfig(
        in_channels=in_channels,
        out_channels=4,
        model_channels=320,
        channel_mult=(1, 2, 4, 4),
        num_res_blocks=2,
        attention_depth=(1, 1, 1, 0),
        num_heads=8,
        context_dim=768,
    )


def _glide(channel_mult: tuple[int, ...], in_channels: int = 3, **other: Any) -> UNetConfig:
    """Nichol et al. 2021 (arXiv 2112.10741), the published models with 300 million parameters."""
    return UNetConfig(
        in_channels=in_channels,
        out_channels=6,
        model_channels=192,
        channel_mult=channel_mult,
        head_dim=64,
        context_dim=512,
        context_attention="appended",
        added_condition_dim=512,
        added_layers=1,
        scale_shift_norm=True,
        resblock_updown=True,
        qkv_order="legacy",
        learned_sigma=True,
        dropout=0.1,
        **other,
    )


UNETS: dict[str, UNetConfig] = {
    # Rombach et al. 2022, trained by CompVis and Stability
    "sd1": _stable_diffusion_1(in_channels=4),  # 859,520,964
    "sd1-inpaint": _stable_diffusion_1(in_channels=9),  # 859,535,364; x, mask, masked image
    "sd2": UNetConfig(  # 865,910,724
        in_channels=4,
        out_channels=4,
        model_channels=320,
        channel_mult=(1, 2, 4, 4),
        num_res_blocks=2,
        attention_depth=(1, 1, 1, 0),
        head_dim=64,
        context_dim=1024,
    ),
    "sdxl": UNetConfig(  # 2,567,463,684; Podell et al. 2023
        in_channels=4,
        out_channels=4,
        model_channels=320,
        channel_mult=(1, 2, 4),
        num_res_blocks=2,
        attention_depth=(0, 2, 10),
        middle_depth=10,
        head_dim=64,
        context_dim=2048,
        added_condition_dim=2816,
    ),
    "ldm4-ffhq256": UNetConfig(  # 274,056,163
        in_channels=3,
        out_channels=3,
        model_channels=224,
        channel_mult=(1, 2, 3, 4),
        num_res_blocks=2,
        attention_depth=(0, 1, 1, 1),
        head_dim=32,
        qkv_order="legacy",
    ),
    "ldm4-bsr-sr": UNetConfig(  # 113,622,563; latents of 3, then the small image
        in_channels=6,
        out_channels=3,
        model_channels=160,
        channel_mult=(1, 2, 2, 4),
        num_res_blocks=2,
        attention_depth=(0, 0, 0, 1),
        head_dim=32,
        qkv_order="legacy",
    ),
    "ldm4-inpainting-big": UNetConfig(  # 387,245,827; latents, those of the masked image, mask
        in_channels=7,
        out_channels=3,
        model_channels=256,
        channel_mult=(1, 2, 3, 4),
        num_res_blocks=2,
        attention_depth=(0, 1, 1, 1),
        num_heads=8,
        resblock_updown=True,
        qkv_order="legacy",
    ),
    # 872,300,484; its text transformer has 581,994,042
    "ldm8-txt2img-1p4b": replace(_stable_diffusion_1(in_channels=4), context_dim=1280),
    "sd2-depth": UNetConfig(  # 865,913,604; latents, then the depth
        in_channels=5,
        out_channels=4,
        model_channels=320,
        channel_mult=(1, 2, 4, 4),
        num_res_blocks=2,
        attention_depth=(1, 1, 1, 0),
        head_dim=64,
        context_dim=1024,
    ),
    "sd-x4-upscaler": UNetConfig(  # 473,398,020; latents, then the small image; 1000 noise levels
        in_channels=7,
        out_channels=4,
        model_channels=256,
        channel_mult=(1, 2, 2, 4),
        num_res_blocks=2,
        attention_depth=(0, 1, 1, 1),
        num_heads=8,
        context_dim=1024,
        num_classes=1000,
        self_attention=(False, False, False, True),
    ),
    "ldm4-cin256-v2": UNetConfig(  # 400,920,579; the class is one context token of 512
        in_channels=3,
        out_channels=3,
        model_channels=192,
        channel_mult=(1, 2, 3, 5),
        num_res_blocks=2,
        attention_depth=(0, 1, 1, 1),
        num_heads=1,
        context_dim=512,
    ),
    "adm-imagenet256": UNetConfig(  # 553,838,086; Dhariwal & Nichol 2021, class-conditional
        in_channels=3,
        out_channels=6,
        model_channels=256,
        channel_mult=(1, 1, 2, 2, 4, 4),
        num_res_blocks=2,
        attention_depth=(0, 0, 0, 1, 1, 1),
        head_dim=64,
        num_classes=1000,
        scale_shift_norm=True,
        resblock_updown=True,
        qkv_order="legacy",
        learned_sigma=True,
    ),
    "adm-imagenet512": UNetConfig(  # 558,997,638; published as 256 x (0.5, 1, 1, 2, 2, 4, 4)
        in_channels=3,
        out_channels=6,
        model_channels=128,
        channel_mult=(1, 2, 2, 4, 4, 8, 8),
        num_res_blocks=2,
        attention_depth=(0, 0, 0, 0, 1, 1, 1),
        head_dim=64,
        num_classes=1000,
        scale_shift_norm=True,
        resblock_updown=True,
        qkv_order="legacy",
        learned_sigma=True,
        time_channels=256,
    ),
    "ddpm-cifar10": UNetConfig(  # 35,746,307; Ho et al. 2020
        in_channels=3,
        out_channels=3,
        model_channels=128,
        channel_mult=(1, 2, 2, 2),
        num_res_blocks=2,
        attention_depth=(0, 1, 0, 0),
        num_heads=1,
        downsample_padding="asymmetric",
        time_embedding="ddpm",
        norm_eps=1e-6,
        dropout=0.1,
    ),
    "iddpm-imagenet64": UNetConfig(  # 121,063,942; Nichol & Dhariwal 2021, unconditional
        in_channels=3,
        out_channels=6,
        model_channels=128,
        channel_mult=(1, 2, 3, 4),
        num_res_blocks=3,
        attention_depth=(0, 0, 1, 1),
        num_heads=4,
        scale_shift_norm=True,
        qkv_order="legacy",
        learned_sigma=True,
    ),
    # ours: latents of 4x16x16, and of 4x8x8, with the tokens of a text transformer
    "emoji": UNetConfig(  # 6,320,164
        in_channels=4,
        out_channels=4,
        model_channels=48,
        channel_mult=(1, 2, 3),
        num_res_blocks=1,
        attention_depth=(0, 1, 1),
        num_heads=4,
        context_dim=192,
        added_condition_dim=192,
        added_layers=1,
        norm_groups=8,
    ),
    "scenes": UNetConfig(  # 2,472,868
        in_channels=4,
        out_channels=4,
        model_channels=48,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_depth=(1, 1),
        num_heads=4,
        context_dim=128,
        added_condition_dim=128,
        added_layers=1,
        norm_groups=8,
    ),
    # with their text transformer of 76,301,824: 385,030,726, 385,037,638 and 398,361,286
    "glide": _glide((1, 2, 3, 4), num_res_blocks=3, attention_depth=(0, 1, 1, 1)),
    "glide-inpaint": _glide((1, 2, 3, 4), 7, num_res_blocks=3, attention_depth=(0, 1, 1, 1)),
    "glide-upsampler": _glide(
        (1, 1, 2, 2, 4, 4), 6, num_res_blocks=2, attention_depth=(0, 0, 0, 1, 1, 1)
    ),
    "karlo-decoder": UNetConfig(  # 885,439,686; Ramesh et al. 2022 as published by Kakao Brain
        in_channels=3,
        out_channels=6,
        model_channels=320,
        channel_mult=(1, 2, 3, 4),
        num_res_blocks=3,
        attention_depth=(0, 1, 1, 1),
        head_dim=64,
        context_dim=1536,
        context_attention="appended",
        added_condition_dim=1280,
        added_layers=0,
        scale_shift_norm=True,
        resblock_updown=True,
        learned_sigma=True,
    ),
    # ours: handwritten digits, latents of 4x8x8, ten classes and "no class"
    "digits": UNetConfig(  # 1,698,628
        in_channels=4,
        out_channels=4,
        model_channels=48,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_depth=(0, 1),
        num_heads=4,
        num_classes=10,
        null_class=True,
        scale_shift_norm=True,
        norm_groups=16,
    ),
}
# 1,696,033; for the scans of digits as they are, 8 x 8
UNETS["tiny-pixels"] = replace(UNETS["digits"], in_channels=1, out_channels=1, dropout=0.1)
UNETS["tiny-mnist"] = UNetConfig(  # 717,633; MNIST, 28 x 28
    in_channels=1,
    out_channels=1,
    model_channels=16,
    channel_mult=(1, 2, 4),
    num_res_blocks=1,
    attention_depth=(0, 0, 1),
    num_heads=4,
    num_classes=10,
    null_class=True,
    scale_shift_norm=True,
    norm_groups=8,
)


def _dit(width: int, depth: int, heads: int, patch: int) -> DiTConfig:
    """Peebles & Xie 2023, table 1: latents of 256 x 256 images of ImageNet."""
    return DiTConfig(
        in_channels=4,
        out_channels=8,
        width=width,
        depth=depth,
        num_heads=heads,
        patch_size=patch,
        num_classes=1000,
        null_class=True,
        learned_sigma=True,
    )


DITS: dict[str, DiTConfig] = {
    # Published counts include the table of positions, which is fixed and no parameter here:
    # 256 * width more with patches of 2, 64 * width with 4, 16 * width with 8.
    "dit-s-2": _dit(384, 12, 6, 2),  # 32,865,056
    "dit-b-2": _dit(768, 12, 12, 2),  # 130,315,808
    "dit-l-2": _dit(1024, 24, 16, 2),  # 457,840,672
    "dit-xl-2": _dit(1152, 28, 16, 2),  # 674,834,720; published as 675,129,632
    "dit-s-4": _dit(384, 12, 6, 4),  # 32,920,448
    "dit-b-4": _dit(768, 12, 12, 4),  # 130,426,496
    "dit-l-4": _dit(1024, 24, 16, 4),  # 457,988,224
    "dit-xl-4": _dit(1152, 28, 16, 4),  # 675,000,704
    "dit-s-8": _dit(384, 12, 6, 8),  # 33,142,016
    "dit-b-8": _dit(768, 12, 12, 8),  # 130,869,248
    "dit-l-8": _dit(1024, 24, 16, 8),  # 458,578,432
    "dit-xl-8": _dit(1152, 28, 16, 8),  # 675,664,640
    # ours: handwritten digits, latents of 4x8x8, ten classes and "no class"
    "tiny": DiTConfig(  # 1,871,136
        in_channels=4,
        out_channels=8,
        width=128,
        depth=6,
        num_heads=4,
        sample_size=8,
        num_classes=10,
        null_class=True,
        learned_sigma=True,
    ),
}


def _uvit(width: int, depth: int, heads: int, patch: int, **other: Any) -> UViTConfig:
    """Bao et al. 2023, table 1; by default for latents of ImageNet."""
    latent = {"in_channels": 4, "out_channels": 4, "num_classes": 1000, "null_class": True}
    return UViTConfig(
        width=width,
        depth=depth,
        num_heads=heads,
        patch_size=patch,
        timestep_offset=1.0,
        **{**latent, **other},
    )


_PIXELS = {"in_channels": 3, "out_channels": 3, "null_class": False}
_COCO = {"num_classes": None, "null_class": False, "context_dim": 768, "context_tokens": 77}
UVITS: dict[str, UViTConfig] = {
    "uvit-s-2-cifar10": _uvit(512, 12, 8, 2, **_PIXELS, num_classes=None),  # 44,255,328
    "uvit-s-4-celeba64": _uvit(
        512, 12, 8, 4, **_PIXELS, num_classes=None, sample_size=64
    ),  # 44,292,228
    "uvit-m-4-imagenet64": _uvit(768, 16, 12, 4, **_PIXELS, sample_size=64),  # 130,940,292
    "uvit-l-4-imagenet64": _uvit(1024, 20, 16, 4, **_PIXELS, sample_size=64),  # 286,827,652
    "uvit-l-2-imagenet256": _uvit(1024, 20, 16, 2),  # 286,763,172
    "uvit-h-2-imagenet256": _uvit(1152, 28, 16, 2, conv_out=False),  # 500,832,016
    "uvit-l-4-imagenet512": _uvit(1024, 20, 16, 4, sample_size=64),  # 286,861,524
    "uvit-h-4-imagenet512": _uvit(1152, 28, 16, 4, sample_size=64, conv_out=False),  # 500,942,656
    "uvit-s-2-coco": _uvit(512, 12, 8, 2, **_COCO),  # 44,692,644
    "uvit-s-2-coco-deep": _uvit(512, 16, 8, 2, **_COCO),  # 58,345,636
    # ours: handwritten digits, latents of 4x8x8, ten classes and "no class"
    "tiny": UViTConfig(  # 1,492,260
        in_channels=4,
        out_channels=4,
        width=128,
        depth=6,
        num_heads=4,
        sample_size=8,
        num_classes=10,
        null_class=True,
    ),
}


def _classifier(
    side: int, model_channels: int, channel_mult: tuple[int, ...], blocks: int, **other: Any
) -> ClassifierConfig:
    """Dhariwal & Nichol 2021, appendix I: attention at 32x32, 16x16 and 8x8."""
    levels = range(len(channel_mult))
    return ClassifierConfig(
        in_channels=3,
        num_classes=1000,
        model_channels=model_channels,
        channel_mult=channel_mult,
        num_res_blocks=blocks,
        attention_depth=tuple(int(side >> level <= 32) for level in levels),
        sample_size=side,
        **other,
    )


CLASSIFIERS: dict[str, ClassifierConfig] = {
    "adm-imagenet64": _classifier(64, 128, (1, 2, 3, 4), 4),  # 65,438,568
    "adm-imagenet128": _classifier(128, 128, (1, 1, 2, 3, 4), 2),  # 42,568,040
    "adm-imagenet256": _classifier(256, 128, (1, 1, 2, 2, 4, 4), 2),  # 54,096,360
    # 54,448,360; published as 128 x (0.5, 1, 1, 2, 2, 4, 4)
    "adm-imagenet512": _classifier(512, 64, (1, 2, 2, 4, 4, 8, 8), 2, time_channels=128),
    # ours: handwritten digits, latents of 4x8x8
    "tiny": ClassifierConfig(  # 379,050
        in_channels=4,
        num_classes=10,
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_depth=(0, 1),
        sample_size=8,
        head_dim=16,
        norm_groups=16,
    ),
}

MLPS: dict[str, MLPConfig] = {
    "points2d": MLPConfig(),  # 182,274; points in the plane
}

AUTOENCODERS: dict[str, AutoencoderConfig] = {
    # Rombach et al. 2022, table 8
    "kl-f4": AutoencoderConfig(latent_channels=3),  # 55,312,063
    "kl-f4-x4-upscaler": AutoencoderConfig(),  # 55,325,927
    "kl-f8": AutoencoderConfig(channel_mult=(1, 2, 4, 4)),  # 83,653,863; Stable Diffusion 1, 2, XL
    "vq-f4": AutoencoderConfig(  # 55,322,782
        regularization="vq", latent_channels=3, codebook_size=8192
    ),
    "vq-f4-noattn": AutoencoderConfig(  # 53,219,486; of inpainting_big
        regularization="vq", latent_channels=3, codebook_size=8192, middle_attention=False
    ),
    "vq-f8": AutoencoderConfig(  # 67,717,295
        regularization="vq",
        channel_mult=(1, 2, 2, 4),
        attention=(False, False, False, True),
        codebook_size=16384,
    ),
    # ours: 3x64x64 -> 4x16x16, 3x32x32 -> 4x8x8
    "emoji": AutoencoderConfig(  # 681,911
        image_channels=3,
        model_channels=16,
        channel_mult=(1, 2, 4),
        num_res_blocks=1,
        norm_groups=8,
    ),
    # ours: 1x32x32 -> 4x8x8
    "digits": AutoencoderConfig(  # 681,333
        image_channels=1,
        model_channels=16,
        channel_mult=(1, 2, 4),
        num_res_blocks=1,
        norm_groups=8,
    ),
}

PRIORS: dict[str, PriorConfig] = {
    # Ramesh et al. 2022 as published by Kakao Brain, on the embeddings of CLIP ViT-L/14
    "karlo": PriorConfig(  # 1,022,030,080
        in_channels=768, context_tokens=77, width=2048, depth=20, num_heads=32
    ),
}
