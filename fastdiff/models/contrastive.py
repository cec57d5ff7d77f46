"""A contrastive net of pictures and captions: both become unit vectors, near where they belong.

Radford et al. 2021 (arXiv 2103.00020), figure 3: the symmetric cross-entropy of all pairs of a
batch, with a learned temperature. The image tower is a small residual net, the text tower the
transformer that our text-to-image models use, averaged over a caption's tokens.

A net of noised pictures takes their timestep as well (Nichol et al. 2022, arXiv 2112.10741, section
2.3), so that the gradient of its dot product can pull samples towards a caption.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.configs import LATER
from fastdiff.models.layers import Downsample, GroupNorm, ResBlock, timestep_embedding
from fastdiff.models.text_transformer import TextTransformer, TextTransformerConfig
from fastdiff.models.unet import embedder

EPS = 1e-5
MAX_SCALE = 100.0
"""Largest inverse temperature, as in the paper (section 2.5)."""


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
    """The architecture of both towers."""

    text: TextTransformerConfig
    """The text tower."""
    widths: tuple[int, ...] = (32, 64, 128, 256)
    """Channels of the image tower's levels; the first works at half the picture's side, every
    further one at half of that before it."""
    dim: int = 128
    """Width of the embeddings."""
    image_channels: int = 3
    """1 for grey, 3 for RGB; of latents, their channels."""
    norm_groups: int = 8
    """Groups of every GroupNorm."""
    noised: bool = field(default=False, metadata=LATER)
    """Whether the pictures are noised, and the image tower takes their timesteps."""

    def __post_init__(self) -> None:
        if not self.widths or any(width % self.norm_groups for width in self.widths):
            raise ValueError(
                f"widths must be multiples of norm_groups {self.norm_groups}, got {self.widths}"
            )
        if self.dim < 1 or self.image_channels < 1:
            raise ValueError(
                f"dim and image_channels must be at least 1, got {self.dim} and "
                f"{self.image_channels}"
            )

    @property
    def num_blocks(self) -> int:
        """Lower bound of the number of blocks with weights."""
        return len(self.widths) + self.text.num_blocks


class Contrastive(nn.Module):
    """An image tower and a text tower."""

    def __init__(self, config: ContrastiveConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = nn.Conv2d(config.image_channels, config.widths[0], 3, stride=2, padding=1)
        blocks: list[nn.Module] = []
        before = config.widths[0]
        emb_dim = 4 * before if config.noised else None
        if emb_dim is not None:
            self.time_embed = embedder(before, emb_dim)
        for level, width in enumerate(config.widths):
            if level:
                blocks.append(Downsample(before))
            groups = config.norm_groups
            blocks.append(ResBlock(before, width, num_groups=groups, eps=EPS, emb_dim=emb_dim))
            before = width
        self.blocks = nn.ModuleList(blocks)
        self.norm = GroupNorm(before, config.norm_groups, EPS)
        # Without them all pictures begin at almost one point, and so do all captions, where the
        # loss has a plateau that takes hundreds of steps to leave.
        self.image_centre = nn.BatchNorm1d(before)
        self.text_centre = nn.BatchNorm1d(config.text.hidden_size)
        self.image_head = nn.Linear(before, config.dim)
        self.text = TextTransformer(config.text)
        self.text_head = nn.Linear(config.text.hidden_size, config.dim)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @property
    def scale(self) -> Tensor:
        """The inverse temperature, a scalar."""
        return self.log_scale.exp().clamp(max=MAX_SCALE)

    def embed_images(self, images: Tensor, t: Tensor | None = None) -> Tensor:
        """Pictures (N, C, H, W) in [-1, 1], or noised ones at timesteps t (N,), to unit vectors
        (N, dim), at least fp32.

        Raises:
            ValueError: the net takes timesteps and got none, or takes none.
        """
        emb = self._embed_time(t)
        h = self.stem(images)
        for block in self.blocks:
            h = block(h, emb=emb)[0].total() if isinstance(block, ResBlock) else block(h)
        mean = _widened(self.norm(h)[0].mean((2, 3)))
        return F.normalize(_widened(self.image_head(self.image_centre(mean))), dim=1)

    def _embed_time(self, t: Tensor | None) -> Tensor | None:
        """The timesteps (N,) as (N, E), activated; None for a net without."""
        if (t is None) == self.config.noised:
            takes = "takes the timesteps of" if self.config.noised else "was not trained on"
            got = "none; give t" if t is None else "timesteps; leave t out"
            raise ValueError(f"this contrastive net {takes} noised pictures, got {got}")
        if t is None:
            return None
        emb = timestep_embedding(t, self.config.widths[0])
        return F.silu(self.time_embed(emb.to(self.stem.weight.dtype)))

    def embed_text(self, ids: Tensor) -> Tensor:
        """Captions as token ids (N, T) to unit vectors (N, dim), at least fp32."""
        mean = self.text.mean(_widened(self.text.encode(ids)), ids)
        return F.normalize(_widened(self.text_head(self.text_centre(mean))), dim=1)

    def forward(self, images: Tensor, ids: Tensor, t: Tensor | None = None) -> Tensor:
        """The loss of a batch: pictures (N, C, H, W) and their captions (N, T). Returns ()."""
        same = (ids[:, None] == ids[None]).all(-1)
        return contrastive_loss(
            self.embed_images(images, t), self.embed_text(ids), self.scale, same=same
        )


def _widened(x: Tensor) -> Tensor:
    """x, at least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def contrastive_loss(
    images: Tensor, texts: Tensor, scale: Tensor | float, *, same: Tensor | None = None
) -> Tensor:
    """The symmetric cross-entropy of all pairs of a batch (Radford et al. 2021, figure 3).

    images, texts: (N, D), unit vectors; row i of one belongs to row i of the other. scale: the
    inverse temperature. same: (N, N) bool, captions that are equal, which share the probability;
    None: no two are. Returns ().
    """
    logits = scale * images @ texts.T
    target = torch.eye(len(images), device=images.device) if same is None else same.float()
    target = target / target.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
