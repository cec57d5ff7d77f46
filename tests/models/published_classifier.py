"""guided-diffusion's noisy classifier in plain PyTorch, with the published names and order of ops.

Written from the paper and the published names and shapes, so that ours is compared with an
independent source: its state dict is that of the files.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.models.classifier import ClassifierConfig


class Attention(nn.Module):
    """Self-attention; legacy: rows of qkv are ordered (heads, 3, d)."""

    def __init__(self, channels: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        flat = x.flatten(2)
        qkv = self.qkv(self.norm(flat)).unflatten(1, (self.heads, -1))  # (N, H, 3 d, L)
        return (flat + self.proj_out(attended(*qkv.chunk(3, dim=2)).flatten(1, 2))).view_as(x)


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(N, H, d, L) each -> (N, H, d, L)."""
    scores = torch.einsum("nhdq,nhdk->nhqk", q, k) / math.sqrt(q.shape[2])
    return torch.einsum("nhqk,nhdk->nhdq", scores.softmax(3), v)


class ResBlock(nn.Module):
    def __init__(self, before: int, after: int, config: ClassifierConfig, *, down: bool) -> None:
        super().__init__()
        groups, self.down, self.film = config.norm_groups, down, config.scale_shift_norm
        emb = 4 * (config.time_channels or config.model_channels)
        self.in_layers = nn.Sequential(
            nn.GroupNorm(groups, before), nn.SiLU(), nn.Conv2d(before, after, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, (1 + self.film) * after))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups, after),
            nn.SiLU(),
            nn.Dropout(0.0),
            nn.Conv2d(after, after, 3, padding=1),
        )
        self.skip_connection = nn.Identity() if before == after else nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers[:2](x)
        if self.down:
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        h = self.in_layers[2](h)
        emb = self.emb_layers(emb)[:, :, None, None]
        if not self.film:
            return self.skip_connection(x) + self.out_layers(h + emb)
        scale, shift = emb.chunk(2, dim=1)
        h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        return self.skip_connection(x) + h


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        return self.op(x)


class AttentionPool2d(nn.Module):
    """CLIP's pool; rows of qkv_proj are ordered (3, heads, d)."""

    def __init__(self, side: int, channels: int, heads: int, classes: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(channels, side**2 + 1))
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2)
        x = torch.cat([x.mean(dim=2, keepdim=True), x], dim=2) + self.positional_embedding
        q, k, v = self.qkv_proj(x).unflatten(1, (3, self.heads, -1)).unbind(1)
        return self.c_proj(attended(q, k, v).flatten(1, 2))[:, :, 0]


class PublishedClassifier(nn.Module):
    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.sinusoids = config.time_channels or config.model_channels
        emb, groups, classes = 4 * self.sinusoids, config.norm_groups, config.num_classes
        self.time_embed = nn.Sequential(
            nn.Linear(self.sinusoids, emb), nn.SiLU(), nn.Linear(emb, emb)
        )
        width = config.model_channels
        blocks = [nn.ModuleList([nn.Conv2d(config.in_channels, width, 3, padding=1)])]
        features = width
        for level, factor in enumerate(config.channel_mult):
            for _ in range(config.num_res_blocks):
                after = factor * config.model_channels
                stage = nn.ModuleList([ResBlock(width, after, config, down=False)])
                width = after
                if config.attention_depth[level]:
                    stage.append(Attention(width, self.heads(width), groups))
                blocks.append(stage)
                features += width
            if level + 1 < len(config.channel_mult):
                down = ResBlock(width, width, config, down=True)
                blocks.append(
                    nn.ModuleList([down if config.resblock_updown else Downsample(width)])
                )
                features += width
        self.input_blocks = nn.ModuleList(blocks)
        self.middle_block = nn.ModuleList(
            [
                ResBlock(width, width, config, down=False),
                Attention(width, self.heads(width), groups),
                ResBlock(width, width, config, down=False),
            ]
        )
        features += width
        if config.pool == "adaptive":
            self.out = nn.Sequential(
                nn.GroupNorm(groups, width),
                nn.SiLU(),
                nn.AdaptiveAvgPool2d((1, 1)),
                nn.Conv2d(width, classes, 1),
                nn.Flatten(),
            )
        elif config.pool == "attention":
            assert config.sample_size is not None
            side = config.sample_size >> (len(config.channel_mult) - 1)
            pool = AttentionPool2d(side, width, self.heads(width), classes)
            self.out = nn.Sequential(nn.GroupNorm(groups, width), nn.SiLU(), pool)
        else:
            hidden = [nn.ReLU()]
            if config.pool == "spatial_v2":
                hidden = [nn.GroupNorm(groups, 2048), nn.SiLU()]
            self.out = nn.Sequential(nn.Linear(features, 2048), *hidden, nn.Linear(2048, classes))

    def heads(self, width: int) -> int:
        return self.config.num_heads or width // (self.config.head_dim or 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        half = self.sinusoids // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        angles = t.float()[:, None] * frequencies
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1).to(x.dtype))
        means = []
        for stage in (*self.input_blocks, self.middle_block):
            for block in stage:
                x = block(x) if isinstance(block, nn.Conv2d) else block(x, emb)
            means.append(x.mean(dim=(2, 3)))
        if self.config.pool.startswith("spatial"):
            x = torch.cat(means, dim=1)
        return self.out(x)
