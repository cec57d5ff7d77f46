"""Encode and decode images to measure what an autoencoder preserves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.extras import import_extra
from fastdiff.generate.memory import check_reconstruction
from fastdiff.models.autoencoder import Autoencoder
from fastdiff.runtime.blocks import block_size, in_blocks
from fastdiff.runtime.prepare import prepare


@dataclass(frozen=True)
class Reconstruction:
    """Reconstructed images and their quality.

    Attributes:
        images: (N, C, H, W), fp32 in [-1, 1], on the CPU.
        psnr: (N,), fp64, decibels; infinite for an image that is unchanged.
        latent_shape: (C, h, w) of one image's latents.
    """

    images: Tensor
    psnr: Tensor
    latent_shape: tuple[int, int, int]


@torch.inference_mode()
def reconstruct(autoencoder: Autoencoder, images: Tensor, *, batch: int = 64) -> Reconstruction:
    """Encode images to the mode of their latents, without noise, and decode.

    images: (N, C, H, W), fp32 in [-1, 1], any device. batch: number of images at once, which only
    bounds memory.

    Raises:
        ValueError: the autoencoder does not accept the images, or a result is not finite.
        NotEnoughMemory: the images would not fit in memory.
    """
    if not len(images):
        raise ValueError("expected at least one image to reconstruct, got none")
    check_reconstruction(autoencoder, images)
    weight = next(autoencoder.parameters())
    prepare(autoencoder, device=weight.device, dtype=weight.dtype)
    parts = []
    shape: tuple[int, int, int] | None = None
    for piece in images.split(batch):
        x = piece.to(weight.device, weight.dtype)
        factor = autoencoder.downsample_factor
        block = block_size(x.shape[2] // factor, x.shape[3] // factor, x.device)
        z = in_blocks(autoencoder.encode_latent, block, x)
        shape = (z.shape[1], z.shape[2], z.shape[3])
        parts.append(in_blocks(autoencoder.decode, block, z).float().clamp(-1, 1).cpu())
    assert shape is not None
    result = torch.cat(parts)
    if not result.isfinite().all():
        raise ValueError(
            f"the autoencoder returned NaN or infinity in {weight.dtype}, expected finite pixels; "
            "use float32"
        )
    return Reconstruction(result, psnr(result, images.cpu()), shape)


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio 10 log10(peak² / mean squared error) in dB; the peak is 2.

    images, reference: (N, C, H, W) in [-1, 1]. Returns (N,), fp64.
    """
    error = (images.double() - reference.double()).square().flatten(1).mean(1)
    return 10 * (4 / error).log10()


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004), by torchmetrics; 1 for equal images.

    images, reference: (N, C, H, W) in [-1, 1], H and W at least 11. Returns (N,), fp64.
    """
    similarity = import_extra("torchmetrics.functional.image", extra="train")
    return similarity.structural_similarity_index_measure(
        images.double(), reference.double(), data_range=2.0, reduction="none"
    )
