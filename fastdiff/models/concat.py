"""Pictures that a denoiser reads in further channels behind x (Rombach et al. 2022, section 3.3).

inpainting   [x, mask, latents of the image without its masked part]; on pixels, as in GLIDE,
             [x, image without its masked part, 1 - mask]
sketch       [x, sketch], where f x f pixels of the sketch become f² channels of one latent
upsampler    [x, small image, enlarged]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.names import Extra


def extra_channels(kind: Extra, *, channels: int, image_channels: int, factor: int) -> int:
    """Number of channels behind those of x.

    channels: of x. image_channels: of images. factor: ratio of the sides of the image to those of
    x.
    """
    numbers: dict[Extra, int] = {
        "none": 0,
        "inpainting": channels + 1,
        "sketch": factor**2,
        "upsampler": image_channels,
        "depth": 1,
    }
    return numbers[kind]


def erased(images: Tensor, mask: Tensor) -> Tensor:
    """The images with grey (0) where the mask is 1. images: (N, C, H, W) in [-1, 1]; mask:
    (N, 1, H, W), 0 or 1."""
    return images * (mask < 0.5).to(images)


def inpainting_channels(kept: Tensor, mask: Tensor, *, pixels: bool) -> Tensor:
    """What an inpainting denoiser reads behind x: (N, C + 1, h, w).

    kept: (N, C, h, w), the `erased` image or its scaled latents. mask: (N, 1, H, W), 1 where the
    image is to be replaced; it is reduced by the nearest neighbour. pixels: x is the image itself.
    """
    small = F.interpolate(mask.to(kept), kept.shape[2:])
    return torch.cat([kept, 1 - small] if pixels else [small, kept], dim=1)


def sketch_channels(sketches: Tensor, factor: int) -> Tensor:
    """What a denoiser of sketches reads behind x: (N, factor², H / factor, W / factor).

    sketches: (N, 1, H, W) in [-1, 1], black lines on white. No pixel is lost.
    """
    return F.pixel_unshuffle(sketches, factor)
