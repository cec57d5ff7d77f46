"""Named architectures, each with its exact number of parameters in a comment that a test checks."""

from __future__ import annotations

from fastdiff.models.autoencoder import AutoencoderConfig
from fastdiff.models.mlp import MLPConfig
from fastdiff.models.unet import UNetConfig


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

MLPS: dict[str, MLPConfig] = {
    "points2d": MLPConfig(),  # 182,274; points in the plane
}

AUTOENCODERS: dict[str, AutoencoderConfig] = {
    # Rombach et al. 2022, table 8
    "kl-f4": AutoencoderConfig(latent_channels=3),  # 55,312,063
    "kl-f8": AutoencoderConfig(channel_mult=(1, 2, 4, 4)),  # 83,653,863; Stable Diffusion 1, 2, XL
    "vq-f4": AutoencoderConfig(  # 55,322,782
        regularization="vq", latent_channels=3, codebook_size=8192
    ),
    "vq-f8": AutoencoderConfig(  # 67,717,295
        regularization="vq",
        channel_mult=(1, 2, 2, 4),
        attention=(False, False, False, True),
        codebook_size=16384,
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
