"""A denoiser for points: residual blocks of two linear layers, each conditioned on the noise level.

x is (N, C) without spatial dimensions. This is for low-dimensional data, and for toy problems with
a known optimal denoiser. The block is the U-Net's residual block with linear layers in place of
convolutions (DDPM, appendix B).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.models.layers import timestep_embedding, zero_init
from fastdiff.models.network import Context, Network, check_conditions, embed_labels, register


@dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """The architecture of an `MLP`."""

    in_channels: int = 2  # coordinates of a point
    width: int = 128  # width of the hidden layers and the time embedding
    num_blocks: int = 3  # residual layers
    num_classes: int | None = None  # class labels 0 .. num_classes - 1
    null_class: bool = False  # one more label, index num_classes: "no class", for guidance

    def __post_init__(self) -> None:
        for name in ("in_channels", "width", "num_blocks"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"MLPConfig: {name} must be positive, got {value}")
        if self.width % 2:
            raise ValueError(f"MLPConfig: width must be even, got {self.width}")
        if self.num_classes is not None and self.num_classes < 1:
            raise ValueError(
                f"MLPConfig: num_classes must be None or positive, got {self.num_classes}"
            )
        if self.null_class and self.num_classes is None:
            raise ValueError("MLPConfig: null_class needs num_classes, got None")

    @property
    def out_channels(self) -> int:
        return self.in_channels

    @property
    def learned_sigma(self) -> bool:
        return False

    @property
    def context_dim(self) -> None:
        return None

    @property
    def added_condition_dim(self) -> None:
        return None

    @property
    def size_multiple(self) -> int:
        return 1


class Block(nn.Module):
    """h + W2 SiLU(W1 SiLU(h) + E emb)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.emb = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)
        zero_init(self.outer)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        """h, emb: (N, width)."""
        return h + self.outer(F.silu(self.inner(F.silu(h)) + self.emb(emb)))


@register(MLPConfig)
class MLP(Network):
    """Predict the noise (or v, or x0) in points x at timestep t."""

    config: MLPConfig

    def __init__(self, config: MLPConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.time_embed = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        if config.num_classes is not None:
            self.label_embed = nn.Embedding(config.num_classes + config.null_class, width)
        self.linear_in = nn.Linear(config.in_channels, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(config.num_blocks))
        self.linear_out = nn.Linear(width, config.out_channels)
        zero_init(self.linear_out)

    def embed(self, t: Tensor, y: Tensor | None = None, added: Tensor | None = None) -> Tensor:
        """See `Network.embed`. Returns (N, width)."""
        check_conditions(self.config, len(t), y, added)
        dtype = self.linear_in.weight.dtype
        emb = self.time_embed(timestep_embedding(t, self.config.width).to(dtype))  # (N, width)
        return F.silu(emb if y is None else emb + embed_labels(self.label_embed, y))

    def check_input(self, x: Tensor, context: Tensor | Context | None) -> None:
        """Raise ValueError unless `body` can run on x: (N, in_channels), without a context."""
        channels = self.config.in_channels
        if x.ndim != 2 or x.shape[1] != channels:
            raise ValueError(
                f"x must be (N, {channels}), got {tuple(x.shape)}; use points with as many "
                "coordinates as the model was trained on"
            )
        if context is not None:
            raise ValueError(
                "context must be None for this model, got a context; leave out context="
            )

    def body(self, x: Tensor, emb: Tensor, context: Tensor | Context | None = None) -> Tensor:
        """See `Network.body`. x: (N, in_channels). Returns its shape."""
        h = self.linear_in(x)  # (N, width)
        for block in self.blocks:
            h = block(h, emb)
        return self.linear_out(F.silu(h))  # (N, in_channels)
