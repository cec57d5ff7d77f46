"""Images to the latents that are diffused, and back: whole, in tiles, or as a cheap preview.

images -> encode -> z * scale_factor;  z / scale_factor -> decode -> images
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.kernels import INITIAL_NOISE, philox_normal
from fastdiff.models.autoencoder import Autoencoder
from fastdiff.runtime.blocks import block_size, in_blocks
from fastdiff.runtime.prepare import prepare

PREVIEW_LATENTS = 4
"""Latents of 8x8 that are decoded once to learn what a preview looks like."""


class Latents:
    """The first stage, prepared for inference in place; without an autoencoder, pixels as they are.

    Beside a denoiser in fp16 the autoencoder computes in fp32: Stable Diffusion 1's and XL's
    overflow in fp16.
    """

    def __init__(
        self,
        autoencoder: Autoencoder | None,
        scale_factor: float,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """device, dtype: the denoiser's."""
        self.autoencoder, self.scale_factor, self.device = autoencoder, scale_factor, device
        self.dtype = torch.float32 if dtype == torch.float16 else dtype
        self.sample_dtype = torch.promote_types(dtype, torch.float32)
        if autoencoder is not None:
            prepare(autoencoder, device=device, dtype=self.dtype)

    @torch.no_grad()
    def encode(self, images: Tensor, *, tile: int = 0) -> Tensor:
        """Images to latents: the mode of their distribution, scaled.

        images: (N, image_channels, H, W) in [-1, 1]. tile: as in `decode`.

        Returns (N, C, h, w) in `sample_dtype`, on the model's device.

        Raises:
            ValueError: images that the autoencoder does not take.
        """
        images = images.to(self.device)
        if self.autoencoder is None:
            return images.to(self.sample_dtype)
        encoder, factor = self.autoencoder, self.autoencoder.downsample_factor
        height, width = (side // factor for side in images.shape[2:])

        def run(piece: Tensor) -> Tensor:
            if tile and max(height, width) > tile:
                return encoder.encode_tiled(piece, tile, tile // 4)
            return encoder.encode_latent(piece)

        block = block_size(max(height, 1), max(width, 1), self.device)
        z = in_blocks(run, block, images.to(self.dtype))
        return z.to(self.sample_dtype) * self.scale_factor

    @torch.no_grad()
    def decode(self, z: Tensor, *, tile: int = 0) -> Tensor:
        """Turn what was sampled into images.

        z: (N, C, h, w), scaled. tile: latents with a longer side are decoded in tiles of it; 0:
        never.

        Returns (N, image_channels, H, W) in `sample_dtype`, in [-1, 1], on z's device.

        Raises:
            ValueError: the decoder's result is not finite.
        """
        if self.autoencoder is None:
            return z.to(self.sample_dtype).clamp(-1, 1)
        decoder = self.autoencoder

        def run(piece: Tensor) -> Tensor:
            if tile and max(piece.shape[2:]) > tile:
                return decoder.decode_tiled(piece, tile, tile // 4)
            return decoder.decode(piece)

        block = block_size(z.shape[2], z.shape[3], z.device)
        images = in_blocks(run, block, (z / self.scale_factor).to(self.dtype))
        if not images.isfinite().all():
            raise ValueError(
                f"the decoder returned NaN or infinity in {self.dtype}, expected finite pixels; "
                "decode in float32"
            )
        return images.to(self.sample_dtype).clamp(-1, 1)

    @torch.no_grad()
    def preview(self, z: Tensor) -> Tensor:
        """A cheap look at latents: a linear map of their channels to colours, pixel by pixel.

        z: (N, C, h, w), such as `Step.denoised`. Returns (N, image_channels, h, w) in [-1, 1].

        The map is fitted once to what the decoder makes of smooth random latents.
        """
        if self.autoencoder is None:
            return z.clamp(-1, 1)
        channels = z.movedim(1, -1)
        colours = F.pad(channels, (0, 1), value=1.0) @ self._preview_map.to(z)
        return colours.movedim(-1, 1).clamp(-1, 1)

    @cached_property
    def _preview_map(self) -> Tensor:
        """(C + 1, image_channels): least squares of mean colours on latents and 1."""
        assert self.autoencoder is not None
        channels = self.autoencoder.config.latent_channels
        seeds = torch.arange(PREVIEW_LATENTS, device=self.device)
        coarse = philox_normal(seeds, (channels, 4, 4), step=0, stream=INITIAL_NOISE)
        z = 1.5 * F.interpolate(coarse.to(self.sample_dtype), scale_factor=2, mode="bilinear")
        images = F.avg_pool2d(self.decode(z), self.autoencoder.downsample_factor)
        known = F.pad(z.movedim(1, -1).flatten(0, 2), (0, 1), value=1.0)
        colours = images.movedim(1, -1).flatten(0, 2)
        return torch.linalg.lstsq(known.double().cpu(), colours.double().cpu()).solution
