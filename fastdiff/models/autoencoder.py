"""The first stage of latent diffusion: an image autoencoder with KL or VQ regularisation.

Esser et al. 2021 (arXiv 2012.09841), Rombach et al. 2022 (2112.10752), section 3.1 and appendix G.
Every norm has epsilon 1e-6; the middle contains one attention with a single head, or none.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.configs import LATER
from fastdiff.models.layers import (
    Addends,
    AttentionBlock,
    Downsample,
    GroupNorm,
    ResBlock,
    Upsample,
    checkpointed,
    norm_first,
    run_before_norm,
)
from fastdiff.models.tiling import tiled

NORM_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """The architecture of an autoencoder. A level is a resolution; level 0 is the image's."""

    regularization: Literal["kl", "vq"] = "kl"  # Gaussian posterior or codebook
    image_channels: int = 3  # channels of the image, values in [-1, 1]
    model_channels: int = 128  # width of the first convolution
    channel_mult: tuple[int, ...] = (
        1,
        2,
        4,
    )  # one factor per level; each level except the last halves the resolution
    num_res_blocks: int = 2  # residual blocks per level of the encoder; the decoder has one more
    latent_channels: int = 4  # channels of z
    attention: tuple[bool, ...] = ()  # per level: attention after each residual block; () for none
    codebook_size: int = 0  # entries of the codebook, vq only
    norm_groups: int = 32  # groups of every GroupNorm
    middle_attention: bool = field(default=True, metadata=LATER)
    # attention between the middle's two residual blocks; False: VQ-f4 without attention

    def __post_init__(self) -> None:
        def require(holds: bool, message: str) -> None:
            if not holds:
                raise ValueError(f"AutoencoderConfig: {message}")

        require(len(self.channel_mult) > 0, "channel_mult must have at least one level, got ()")
        require(
            self.regularization in ("kl", "vq"),
            f"regularization must be 'kl' or 'vq', got {self.regularization!r}",
        )
        for name in ("image_channels", "model_channels", "num_res_blocks", "latent_channels"):
            value = getattr(self, name)
            require(value > 0, f"{name} must be positive, got {value}")
        require(
            len(self.attention) in (0, len(self.channel_mult)),
            f"attention must be () or have {len(self.channel_mult)} entries, one per level of "
            f"channel_mult, got {self.attention}",
        )
        require(
            (self.codebook_size > 0) == (self.regularization == "vq"),
            f"codebook_size must be positive for 'vq' and 0 for 'kl', got {self.codebook_size} "
            f"for {self.regularization!r}",
        )
        require(
            min(self.channel_mult) > 0, f"channel_mult must be positive, got {self.channel_mult}"
        )
        for width in (self.model_channels, *self.widths):
            require(
                self.norm_groups > 0 and width % self.norm_groups == 0,
                f"norm_groups must divide every level's width, got {self.norm_groups} and {width}",
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.model_channels * factor for factor in self.channel_mult)

    @property
    def downsample_factor(self) -> int:
        """Image pixels per latent pixel, along one side."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def num_blocks(self) -> int:
        """Number of residual blocks of the encoder."""
        return self.num_res_blocks * len(self.channel_mult)

    def has_attention(self, level: int) -> bool:
        return bool(self.attention) and self.attention[level]


@dataclass(frozen=True)
class Posterior:
    """A diagonal Gaussian over latents. mean, logvar: (N, latent_channels, h, w)."""

    mean: Tensor
    logvar: Tensor

    def mode(self) -> Tensor:
        """The most likely latent: the mean."""
        return self.mean

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise. noise: standard normal, shape of mean."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self) -> Tensor:
        """KL divergence to the standard normal in nats, (N,), fp32 or wider.

        1/2 sum(mean^2 + var - 1 - log var) (Kingma & Welling 2014, appendix B).
        """
        dtype = torch.promote_types(self.mean.dtype, torch.float32)
        mean, logvar = self.mean.to(dtype), self.logvar.to(dtype)
        return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)


@dataclass(frozen=True)
class Quantized:
    """Latents and their nearest codes.

    z: (N, D, h, w). z_q: (N, D, h, w), the codes, with z's gradient (straight-through estimator).
    indices: (N, h, w) int64.
    codebook_loss: scalar mean((sg(z) - z_q)^2), which moves codes towards latents.
    commitment_loss: scalar mean((z - sg(z_q))^2), which moves latents towards codes (van den Oord
    et al. 2017, eq. 3).
    """

    z: Tensor
    z_q: Tensor
    indices: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor
    codebook_size: int

    def loss(self, beta: float = 0.25, order: Literal["paper", "legacy"] = "paper") -> Tensor:
        """codebook + beta * commitment.

        `legacy` is what the published CompVis models were trained with: beta multiplies the
        codebook term, and the commitment term has weight 1.
        """
        if order == "legacy":
            return beta * self.codebook_loss + self.commitment_loss
        return self.codebook_loss + beta * self.commitment_loss

    def usage(self) -> Tensor:
        """Fraction of the codebook that occurs among the indices, scalar in (0, 1]."""
        return (self._counts() > 0).float().mean()

    def perplexity(self) -> Tensor:
        """exp(entropy) of the codes' frequencies, scalar from 1 (one code) to codebook_size."""
        p = self._counts() / self.indices.numel()
        return torch.exp(torch.special.entr(p).sum())

    def _counts(self) -> Tensor:
        return torch.bincount(self.indices.flatten(), minlength=self.codebook_size).float()


class Codebook(nn.Module):
    """Replace each latent vector by the nearest of `size` learned codes."""

    CHUNK = 16384  # latent vectors per distance matrix: 0.5 GB fp32 with 8192 codes

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dim).uniform_(-1 / size, 1 / size))

    @torch.no_grad()
    def nearest(self, vectors: Tensor) -> Tensor:
        """Index of the nearest code e of each vector v. vectors: (M, D) -> (M,) int64.

        The argmin of |v - e|^2 is computed without |v|^2, which is the same for all codes. It is
        computed in fp32 or wider, even under autocast: half precision cannot tell codes apart.
        """
        codes = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        half_norms = 0.5 * codes.square().sum(1)
        # the meta device, where only shapes are computed, has no autocast
        with torch.autocast("cpu" if codes.is_meta else codes.device.type, enabled=False):
            chunks = [
                (half_norms - v.to(codes.dtype) @ codes.T).argmin(1)
                for v in vectors.split(self.CHUNK)
            ]
        return torch.cat(chunks)

    def lookup(self, indices: Tensor) -> Tensor:
        """indices: (N, h, w) int64 -> (N, D, h, w)."""
        return F.embedding(indices, self.weight).permute(0, 3, 1, 2)

    def forward(self, z: Tensor) -> Quantized:
        """z: (N, D, h, w)."""
        n, d, h, w = z.shape
        vectors = z.permute(0, 2, 3, 1).reshape(-1, d)  # (N*h*w, D)
        indices = self.nearest(vectors).view(n, h, w)
        codes = self.lookup(indices)
        return Quantized(
            z=z,
            z_q=z + (codes - z).detach(),
            indices=indices,
            codebook_loss=F.mse_loss(codes, z.detach()),
            commitment_loss=F.mse_loss(z, codes.detach()),
            codebook_size=len(self.weight),
        )


def _res_block(in_channels: int, out_channels: int, config: AutoencoderConfig) -> ResBlock:
    return ResBlock(in_channels, out_channels, num_groups=config.norm_groups, eps=NORM_EPS)


def _attention(channels: int, config: AutoencoderConfig) -> AttentionBlock:
    return AttentionBlock(channels, 1, num_groups=config.norm_groups, eps=NORM_EPS)


def _middle(channels: int, config: AutoencoderConfig) -> list[nn.Module]:
    return [
        _res_block(channels, channels, config),
        *([_attention(channels, config)] if config.middle_attention else []),
        _res_block(channels, channels, config),
    ]


class Chain(nn.Module):
    """conv_in, blocks, norm and SiLU, conv_out: the structure of both encoder and decoder."""

    def __init__(
        self,
        in_channels: int,
        blocks: list[nn.Module],
        out_channels: int,
        config: AutoencoderConfig,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = False  # recompute each block in the backward pass
        first, last = blocks[0], [b for b in blocks if isinstance(b, ResBlock)][-1]
        assert isinstance(first, ResBlock)
        self.conv_in = nn.Conv2d(in_channels, first.in_channels, 3, padding=1)
        self.blocks = nn.ModuleList(blocks)
        self.norm_out = GroupNorm(last.out_channels, config.norm_groups, NORM_EPS)
        self.conv_out = nn.Conv2d(last.out_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        addends = run_before_norm(self.conv_in, x)
        blocks = [*self.blocks]
        for block, following in zip(blocks, [*blocks[1:], self.norm_out], strict=True):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                addends = checkpointed(_step, block, norm_first(following), *addends)
            else:
                addends = _step(block, norm_first(following), *addends)
        x, residual, bias = addends
        x, _ = self.norm_out(x, residual=residual, channel_add=bias)
        return self.conv_out(x)


def _step(
    block: nn.Module,
    before_norm: bool,
    x: Tensor,
    residual: Tensor | None,
    bias: Tensor | None,
) -> Addends:
    """Run one block of a chain; blocks that change the resolution need the sum x + residual.

    before_norm: whether a norm follows the block. bias: None before a change of resolution.
    """
    if isinstance(block, ResBlock):
        addends: Addends = block(x, residual, bias=bias, before_norm=before_norm)[0]
        return addends
    if isinstance(block, AttentionBlock):
        return block(x, residual, bias=bias, before_norm=before_norm)[0]
    x = Addends(x, residual).total()
    return run_before_norm(block, x) if before_norm else Addends(block(x))


def encoder_blocks(config: AutoencoderConfig) -> list[nn.Module]:
    """The encoder's blocks, finest level first, then the middle."""
    blocks: list[nn.Module] = []
    width = config.model_channels
    for level, out in enumerate(config.widths):
        for _ in range(config.num_res_blocks):
            blocks.append(_res_block(width, out, config))
            if config.has_attention(level):
                blocks.append(_attention(out, config))
            width = out
        if level < len(config.widths) - 1:
            blocks.append(Downsample(width, "asymmetric"))
    return blocks + _middle(width, config)


def decoder_blocks(config: AutoencoderConfig) -> list[nn.Module]:
    """The decoder's blocks: the middle, then the coarsest level first."""
    width = config.widths[-1]
    blocks = _middle(width, config)
    for level in reversed(range(len(config.widths))):
        for _ in range(config.num_res_blocks + 1):
            blocks.append(_res_block(width, config.widths[level], config))
            width = config.widths[level]
            if config.has_attention(level):
                blocks.append(_attention(width, config))
        if level > 0:
            blocks.append(Upsample(width))
    return blocks


class Autoencoder(nn.Module):
    """Encoder, quant convolutions, KL posterior or codebook, decoder.

    Latents are those of the encoder; the caller multiplies them by `scale_factor`.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        z = config.latent_channels
        moments = 2 * z if config.regularization == "kl" else z
        self.encoder = Chain(config.image_channels, encoder_blocks(config), moments, config)
        self.quant_conv = nn.Conv2d(moments, moments, 1)
        if config.regularization == "vq":
            self.codebook = Codebook(config.codebook_size, z)
        self.post_quant_conv = nn.Conv2d(z, z, 1)
        self.decoder = Chain(z, decoder_blocks(config), config.image_channels, config)

    @property
    def downsample_factor(self) -> int:
        """Image pixels per latent pixel, along one side."""
        return self.config.downsample_factor

    @property
    def last_layer(self) -> Tensor:
        """The weight whose gradients balance the adversarial loss (Esser et al. 2021, eq. 7)."""
        return self.decoder.conv_out.weight

    def encode(self, x: Tensor) -> Posterior | Quantized:
        """Distribution (kl) or quantised latents (vq) of an image.

        Args:
            x: (N, image_channels, H, W) in [-1, 1], H and W multiples of `downsample_factor`.

        Raises:
            ValueError: wrong number of channels, or a size that is not such a multiple.
        """
        moments = self._encode(x)
        return self.codebook(moments) if self.config.regularization == "vq" else _posterior(moments)

    def _encode(self, x: Tensor) -> Tensor:
        self._check_image(x)
        return self.quant_conv(self.encoder(x))

    def _check_image(self, x: Tensor) -> None:
        channels, factor = self.config.image_channels, self.downsample_factor
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(
                f"image must be (N, {channels}, H, W), got {tuple(x.shape)}; "
                f"convert it to {channels} channel{'s' if channels > 1 else ''}"
            )
        if any(side % factor or side == 0 for side in x.shape[2:]):
            raise ValueError(
                f"image sides must be positive multiples of {factor}, "
                f"got {x.shape[2]} x {x.shape[3]}; resize, crop or pad the image"
            )

    def encode_latent(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """The latents that diffusion works on, for both kinds of autoencoders.

        kl: a sample of the posterior with the given noise, or its mode without noise. vq: the
        latents before quantisation; `decode` quantises them (Rombach et al. 2022, section 3.1).

        Args:
            x: (N, image_channels, H, W). noise: (N, latent_channels, H/f, W/f) standard normal.

        Returns:
            (N, latent_channels, H/f, W/f).
        """
        moments = self._encode(x)
        if self.config.regularization == "vq":
            return moments
        posterior = _posterior(moments)
        return posterior.mode() if noise is None else posterior.sample(noise)

    def decode(self, z: Tensor, *, quantize: bool = True) -> Tensor:
        """Decode latents to an image.

        Args:
            z: (N, latent_channels, h, w).
            quantize: vq only; False if z already consists of codes, as in training.

        Returns:
            (N, image_channels, h*f, w*f), roughly in [-1, 1], not clamped.

        Raises:
            ValueError: wrong number of channels.
        """
        self._check_latent(z)
        if self.config.regularization == "vq" and quantize:
            z = self.codebook(z).z_q
        return self.decoder(self.post_quant_conv(z))

    def _check_latent(self, z: Tensor) -> None:
        channels = self.config.latent_channels
        if z.ndim != 4 or z.shape[1] != channels or 0 in z.shape[2:]:
            raise ValueError(
                f"latents must be (N, {channels}, h, w), got {tuple(z.shape)}; "
                "use the autoencoder that the U-Net was trained with"
            )

    @torch.no_grad()
    def decode_tiled(self, z: Tensor, tile: int, overlap: int) -> Tensor:
        """Decode a large latent in overlapping tiles, blended linearly.

        Peak memory is the image plus the decoder's activations for one tile, whatever the size of
        z. The norms and the attention see one tile instead of the whole image, so the result
        differs slightly from `decode`. A latent that fits into one tile is decoded at once and
        gives the bits of `decode`.

        Args:
            z: (N, latent_channels, h, w).
            tile: side of a tile in latent pixels.
            overlap: minimum overlap of neighbours in latent pixels, 0 <= overlap < tile; about
                tile/4 hides the seams.

        Returns:
            (N, image_channels, h*f, w*f).

        Raises:
            ValueError: tile or overlap out of range, wrong number of channels.
        """
        self._check_latent(z)
        shape = (len(z), self.config.image_channels)
        return tiled(self.decode, z, shape, tile, overlap, 1, self.downsample_factor)

    @torch.no_grad()
    def encode_tiled(self, x: Tensor, tile: int, overlap: int) -> Tensor:
        """Encode a large image in overlapping tiles; returns the mode, as `encode_latent` does.

        Args:
            x: (N, image_channels, H, W). tile, overlap: in latent pixels, as in `decode_tiled`.

        Returns:
            (N, latent_channels, H/f, W/f).

        Raises:
            ValueError: tile or overlap out of range, or an image that `encode` rejects.
        """
        self._check_image(x)
        shape = (len(x), self.config.latent_channels)
        return tiled(self.encode_latent, x, shape, tile, overlap, self.downsample_factor, 1)

    def forward(
        self, x: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, Posterior | Quantized]:
        """Reconstruct x; both results feed the training losses.

        Args:
            x: (N, image_channels, H, W). noise: as in `encode_latent`.
        """
        latent = self.encode(x)
        if isinstance(latent, Quantized):
            return self.decode(latent.z_q, quantize=False), latent
        z = latent.mode() if noise is None else latent.sample(noise)
        return self.decode(z), latent


def _posterior(moments: Tensor) -> Posterior:
    mean, logvar = moments.chunk(2, dim=1)
    return Posterior(mean, logvar.clamp(-30.0, 20.0))
