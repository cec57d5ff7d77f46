"""Convert images to latents and back: whole, in tiles, or as a cheap preview.

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
"""Number of 8x8 latents that are decoded once to fit the map for previews."""


class Latents:
    """The first stage, prepared for inference in place; without an autoencoder, pixels unchanged.

    With a denoiser in fp16, the autoencoder computes in fp32, because those of Stable Diffusion 1
    and XL overflow in fp16.
    """

    def __init__(
        self,
        autoencoder: Autoencoder | None,
        scale_factor: float,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Prepare the autoencoder. device, dtype: those of the denoiser."""
        self.autoencoder, self.scale_factor, self.device = autoencoder, scale_factor, device
        self.dtype = torch.float32 if dtype == torch.float16 else dtype
        self.sample_dtype = torch.promote_types(dtype, torch.float32)
        if autoencoder is not None:
            prepare(autoencoder, device=device, dtype=self.dtype)

    @torch.no_grad()
    def encode(self, images: Tensor, *, tile: int = 0) -> Tensor:
        """Encode images to latents: the scaled mode of their distribution.

        images: (N, image_channels, H, W) in [-1, 1]. tile: as in `decode`.

        Returns (N, C, h, w) in `sample_dtype`, on the model's device.

        Raises:
            ValueError: the autoencoder does not accept the images.
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
        """Decode sampled latents to images.

        z: (N, C, h, w), scaled. tile: side of the tiles in which larger latents are decoded; 0:
        never use tiles.

        Returns (N, image_channels, H, W) in `sample_dtype`, in [-1, 1], on z's device.

        Raises:
            ValueError: the result of the decoder is not finite.
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
                f"expected finite pixels, got NaN or infinity from the decoder in {self.dtype}; "
                "use float32"
            )
        return images.to(self.sample_dtype).clamp(-1, 1)

    @torch.no_grad()
    def preview(self, z: Tensor) -> Tensor:
        """A cheap preview of latents: a linear map from their channels to colours, per pixel.

        z: (N, C, h, w), such as `Step.denoised`. Returns (N, image_channels, h, w) in [-1, 1].

        The map is fitted once to decoded smooth random latents.
        """
        if self.autoencoder is None:
            return z.clamp(-1, 1)
        channels = z.movedim(1, -1)
        colours = F.pad(channels, (0, 1), value=1.0) @ self._preview_map.to(z)
        return colours.movedim(-1, 1).clamp(-1, 1)

    @cached_property
    def _preview_map(self) -> Tensor:
        """(C + 1, image_channels): least-squares fit of mean colours to latents and a constant."""
        assert self.autoencoder is not None
        channels = self.autoencoder.config.latent_channels
        seeds = torch.arange(PREVIEW_LATENTS, device=self.device)
        coarse = philox_normal(seeds, (channels, 4, 4), step=0, stream=INITIAL_NOISE)
        z = 1.5 * F.interpolate(coarse.to(self.sample_dtype), scale_factor=2, mode="bilinear")
        images = F.avg_pool2d(self.decode(z), self.autoencoder.downsample_factor)
        known = F.pad(z.movedim(1, -1).flatten(0, 2), (0, 1), value=1.0)
        colours = images.movedim(1, -1).flatten(0, 2)
        return torch.linalg.lstsq(known.double().cpu(), colours.double().cpu()).solution
