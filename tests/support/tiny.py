"""Tiny diffusion models with random weights, for tests that need a model of the right kind."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastdiff.checkpoint.model import Model
from fastdiff.diffusion.schedules import ScheduleConfig
from fastdiff.models.autoencoder import Autoencoder, AutoencoderConfig
from fastdiff.models.unet import UNet, UNetConfig

AUTOENCODER = AutoencoderConfig(
    image_channels=1,
    model_channels=8,
    channel_mult=(1, 2),
    num_res_blocks=1,
    latent_channels=3,
    norm_groups=4,
)
UNET = UNetConfig(
    in_channels=3,
    out_channels=3,
    model_channels=16,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_depth=(0, 1),
    head_dim=16,
    num_classes=4,
    null_class=True,
    norm_groups=4,
)
SCALE_FACTOR = 0.8


def randomize(module: nn.Module, seed: int) -> nn.Module:
    """Randomize every parameter, since layers that start at zero would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = noise / fan_in**0.5 if parameter.ndim > 1 else parameter.data + 0.1 * noise
    return module


def tiny_unet(config: UNetConfig = UNET) -> UNet:
    unet = UNet(config)
    randomize(unet, 1)
    return unet


def tiny_autoencoder(config: AutoencoderConfig = AUTOENCODER) -> Autoencoder:
    autoencoder = Autoencoder(config)
    randomize(autoencoder, 2)
    return autoencoder


def tiny_model(**changes: Any) -> Model:
    """A latent diffusion model of four classes; `changes` override fields of `Model`."""
    fields: dict[str, Any] = {
        "layout": "bundle",
        "denoiser": tiny_unet(),
        "autoencoder": tiny_autoencoder(),
        "schedule": ScheduleConfig(),
        "scale_factor": SCALE_FACTOR,
        "image_size": 16,
        "image_channels": 1,
        "class_names": ("zero", "one", "two", "three"),
    }
    return Model(**{**fields, **changes})


def tiny_pixel_model(**changes: Any) -> Model:
    """A pixel-space model of the same classes, with three channels."""
    pixels = {"autoencoder": None, "image_channels": 3, "scale_factor": 1.0}
    return tiny_model(**{**pixels, **changes})
