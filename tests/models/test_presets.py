"""Parameter counts of the published models, counted on the meta device: exact or wrong."""

from __future__ import annotations

import pytest
import torch

from fastdiff.models.autoencoder import Autoencoder
from fastdiff.models.presets import AUTOENCODERS, PRIORS, UNETS
from fastdiff.models.prior import Prior
from fastdiff.models.unet import UNet

GLIDE_TEXT = (50_257 + 2 * 128) * 512 + 16 * (12 * 512 * 512 + 13 * 512) + 2 * 512
UNET_PARAMETERS = {
    "sd1": 859_520_964,
    "sd1-inpaint": 859_535_364,
    "sd2": 865_910_724,
    "sdxl": 2_567_463_684,
    "ldm4-ffhq256": 274_056_163,
    "ldm4-bsr-sr": 113_622_563,
    "ldm4-inpainting-big": 387_245_827,
    "ldm8-txt2img-1p4b": 872_300_484,
    "sd2-depth": 865_910_724 + 9 * 320,
    "sd-x4-upscaler": 473_398_020,
    "ldm4-cin256-v2": 400_920_579,
    "adm-imagenet256": 553_838_086,
    "adm-imagenet512": 558_997_638,
    "ddpm-cifar10": 35_746_307,
    "iddpm-imagenet64": 121_063_942,
    # with a text transformer of 128 tokens (embeddings, 16 blocks, a norm) as OpenAI's files
    "glide": 385_030_726 - GLIDE_TEXT,
    "glide-inpaint": 385_037_638 - GLIDE_TEXT,
    "glide-upsampler": 398_361_286 - GLIDE_TEXT,
    "karlo-decoder": 885_439_686,
    "digits": 1_698_628,
    "emoji": 6_320_164,
    "scenes": 2_472_868,
    "tiny-mnist": 717_633,
    # one channel instead of four: less of the first and the last convolution
    "tiny-pixels": 1_698_628 - 3 * 9 * 48 - 3 * (9 * 48 + 1),
}
# kl-f4 is vq-f4 with a Gaussian instead of 8192 codes of 3: less the codebook (24,576), plus
# the second half of the moments in conv_out (3 * (512*9 + 1)) and in the 1x1 quant_conv (42 - 12)
AUTOENCODER_PARAMETERS = {
    "kl-f4": 55_322_782 - 8192 * 3 + 3 * (512 * 9 + 1) + 30,
    "kl-f4-x4-upscaler": 55_325_927,
    "kl-f8": 83_653_863,
    "vq-f4": 55_322_782,
    # without two attentions of 512 channels: a norm and four 1x1 convolutions each
    "vq-f4-noattn": 55_322_782 - 2 * (2 * 512 + 4 * (512 * 512 + 512)),
    "vq-f8": 67_717_295,
    "digits": 681_333,
    # three channels instead of one: two more of the first and of the last convolution
    "emoji": 681_333 + 2 * 9 * 16 + 2 * (9 * 16 + 1),
}


@pytest.mark.parametrize("name", UNETS)
def test_unet_parameters(name: str) -> None:
    with torch.device("meta"):
        model = UNet(UNETS[name])
    assert sum(p.numel() for p in model.parameters()) == UNET_PARAMETERS[name]


def test_prior_parameters() -> None:
    with torch.device("meta"):
        model = Prior(PRIORS["karlo"])
    assert sum(p.numel() for p in model.parameters()) == 1_022_030_080


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_autoencoder_parameters(name: str) -> None:
    with torch.device("meta"):
        model = Autoencoder(AUTOENCODERS[name])
    assert sum(p.numel() for p in model.parameters()) == AUTOENCODER_PARAMETERS[name]


def test_digits_models_fit_together_and_into_the_package() -> None:
    unet, autoencoder = UNETS["digits"], AUTOENCODERS["digits"]
    assert unet.in_channels == unet.out_channels == autoencoder.latent_channels
    assert 32 // autoencoder.downsample_factor % unet.downsample_factor == 0
    assert 2 * (UNET_PARAMETERS["digits"] + AUTOENCODER_PARAMETERS["digits"]) < 7e6  # bytes, fp16
