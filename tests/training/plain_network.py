"""A denoiser other than a U-Net: two convolutions with the embedding added in between."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.models.network import Context, Network

KIND = "plain"


@dataclass(frozen=True, kw_only=True)
class PlainConfig:
    width: int = 6
    in_channels: int = 1
    out_channels: int = 1
    learned_sigma: bool = False
    num_classes: int | None = 2
    null_class: bool = True
    context_dim: int | None = None
    added_condition_dim: int | None = None
    size_multiple: int = 1
    num_blocks: int = 1


class Plain(Network):
    config: PlainConfig

    def __init__(self, config: PlainConfig) -> None:
        super().__init__()
        self.config = config
        classes = (config.num_classes or 0) + 1
        self.classes = nn.Embedding(classes, config.width)
        self.first = nn.Conv2d(config.in_channels, config.width, 3, padding=1)
        self.last = nn.Conv2d(config.width, config.out_channels, 3, padding=1)

    def embed(self, t: Tensor, y: Tensor | None = None, added: Tensor | None = None) -> Tensor:
        assert y is not None
        phase = t.float()[:, None] / 1000 * torch.arange(1, self.config.width + 1)
        return self.classes(y) + phase.sin()

    def body(self, x: Tensor, emb: Tensor, context: Tensor | Context | None = None) -> Tensor:
        return self.last(F.silu(self.first(x) + emb[:, :, None, None]))
