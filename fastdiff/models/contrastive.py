"""A contrastive net of pictures and captions: both become unit vectors, near where they belong.

Radford et al. 2021 (arXiv 2103.00020), figure 3: the symmetric cross-entropy of all pairs of a
batch, with a learned temperature. The image tower is a small residual net, the text tower the
transformer that our text-to-image models use, averaged over a caption's tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.models.layers import Downsample, GroupNorm, ResBlock
from fastdiff.models.text_transformer import TextTransformer, TextTransformerConfig

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
    """1 for grey, 3 for RGB."""
    norm_groups: int = 8
    """Groups of every GroupNorm."""

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


class Contrastive(nn.Module):
    """An image tower and a text tower."""

    def __init__(self, config: ContrastiveConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = nn.Conv2d(config.image_channels, config.widths[0], 3, stride=2, padding=1)
        blocks: list[nn.Module] = []
        before = config.widths[0]
        for level, width in enumerate(config.widths):
            if level:
                blocks.append(Downsample(before))
            blocks.append(ResBlock(before, width, num_groups=config.norm_groups, eps=EPS))
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

    def embed_images(self, images: Tensor) -> Tensor:
        """Pictures (N, C, H, W) in [-1, 1] to unit vectors (N, dim)."""
        h = self.stem(images)
        for block in self.blocks:
            h = block(h)[0].total() if isinstance(block, ResBlock) else block(h)
        h = self.norm(h)[0].mean((2, 3))
        return F.normalize(self.image_head(self.image_centre(h.float())).float(), dim=1)

    def embed_text(self, ids: Tensor) -> Tensor:
        """Captions as token ids (N, T) to unit vectors (N, dim)."""
        mean = self.text.mean(self.text.encode(ids).float(), ids)
        return F.normalize(self.text_head(self.text_centre(mean)).float(), dim=1)

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        """The loss of a batch: pictures (N, C, H, W) and their captions (N, T). Returns ()."""
        same = (ids[:, None] == ids[None]).all(-1)
        return contrastive_loss(
            self.embed_images(images), self.embed_text(ids), self.scale, same=same
        )


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
