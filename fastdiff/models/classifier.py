"""The noisy classifier: the way down of the ADM U-Net, pooled to the logits of the classes.

Dhariwal & Nichol 2021 (arXiv 2105.05233), section 4.1 and appendix H. It is trained on noised
images at every timestep, so that the gradient of log p(y | x_t) can pull samples towards a class
(`fastdiff.diffusion.gradients`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.kernels import attention
from fastdiff.models.layers import (
    Addends,
    GroupNorm,
    checkpointed,
    split_qkv,
    timestep_embedding,
    to_tokens,
    zero_init,
)
from fastdiff.models.network import Context, Network, check_image, register
from fastdiff.models.unet import UNetConfig, embedder, encoder
from fastdiff.names import QKVOrder

Pool = Literal["adaptive", "attention", "spatial", "spatial_v2"]
HIDDEN = 2048
"""Width of the hidden layer of the spatial pools."""


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """The architecture of a noisy classifier. A level is a resolution; level 0 is the finest."""

    in_channels: int  # channels of x, image or latent
    num_classes: int  # classes that it tells apart
    model_channels: int  # width of level 0; level i has model_channels * channel_mult[i]
    channel_mult: tuple[int, ...]  # one factor per level
    num_res_blocks: int  # residual blocks per level
    attention_depth: tuple[int, ...]  # per level: 0 none, 1 attention after each residual block
    pool: Pool = "attention"
    # adaptive: mean over the pixels; attention: CLIP's (Radford et al. 2021, section 2.4); spatial,
    # spatial_v2: a hidden layer on the means of all blocks' results
    sample_size: int | None = None  # height and width of x; attention pools need it
    num_heads: int | None = None  # heads of every attention; give this or head_dim
    head_dim: int | None = 64  # width of a head
    scale_shift_norm: bool = True  # the embedding scales and shifts the second norm
    resblock_updown: bool = True  # residual blocks halve the resolution instead of convolutions
    qkv_order: QKVOrder = "legacy"  # rows of packed qkv weights in blocks; the pool's are "new"
    time_channels: int | None = None  # width of the sinusoids; None: model_channels
    norm_groups: int = 32  # groups of every GroupNorm
    norm_eps: float = 1e-5  # epsilon of every GroupNorm
    dropout: float = 0.0  # probability, in residual blocks

    def __post_init__(self) -> None:
        def require(holds: bool, message: str) -> None:
            if not holds:
                raise ValueError(f"ClassifierConfig: {message}")

        try:
            encoder = self.encoder
        except ValueError as error:
            message = str(error).replace("UNetConfig", type(self).__name__)
            raise ValueError(message) from None
        require(self.num_classes > 1, f"num_classes must be at least 2, got {self.num_classes}")
        pools = get_args(Pool)
        require(self.pool in pools, f"pool must be one of {pools}, got {self.pool!r}")
        side, factor = self.sample_size, encoder.downsample_factor
        require(
            side is None or (side > 0 and side % factor == 0),
            f"sample_size must be a multiple of {factor}, got {side}",
        )
        require(
            side is not None or self.pool != "attention",
            "sample_size must be set for the pool 'attention', which has one position embedding "
            "per pixel, got None",
        )
        require(
            self.pool != "spatial_v2" or HIDDEN % self.norm_groups == 0,
            f"norm_groups must divide {HIDDEN} for the pool 'spatial_v2', got {self.norm_groups}",
        )

    @cached_property
    def encoder(self) -> UNetConfig:
        """The U-Net whose way down and middle this is."""
        return UNetConfig(
            in_channels=self.in_channels,
            out_channels=self.in_channels,
            model_channels=self.model_channels,
            channel_mult=self.channel_mult,
            num_res_blocks=self.num_res_blocks,
            attention_depth=self.attention_depth,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            scale_shift_norm=self.scale_shift_norm,
            resblock_updown=self.resblock_updown,
            qkv_order=self.qkv_order,
            norm_groups=self.norm_groups,
            norm_eps=self.norm_eps,
            dropout=self.dropout,
            time_channels=self.time_channels,
        )

    @property
    def out_channels(self) -> int:
        """Logits per sample."""
        return self.num_classes

    @property
    def learned_sigma(self) -> bool:
        return False

    @property
    def null_class(self) -> bool:
        return False

    @property
    def context_dim(self) -> None:
        return None

    @property
    def added_condition_dim(self) -> None:
        return None

    @property
    def size_multiple(self) -> int:
        return self.encoder.size_multiple

    @property
    def num_blocks(self) -> int:
        return self.encoder.num_blocks


class AttentionPool(nn.Module):
    """Attention with one query, the mean over the pixels (Radford et al. 2021, section 2.4).

    The mean is prepended to the pixels as a token of its own, and every token has a position.
    """

    def __init__(self, side: int, channels: int, num_heads: int, out_features: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        positions = torch.randn(channels, side**2 + 1) / channels**0.5
        self.positions = nn.Parameter(positions)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W) -> (N, out_features)."""
        tokens = to_tokens(x)  # (N, H*W, C)
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)
        tokens = tokens + self.positions.T.to(tokens.dtype)
        q, k, v = split_qkv(self.qkv(tokens), self.num_heads, "new")
        return self.proj(attention(q[:, :1], k, v).flatten(1))


@register(ClassifierConfig)
class Classifier(Network):
    """Logits of the classes of x at timestep t. It does not denoise, and takes no condition.

    `classifier(x, t)`: x (N, in_channels, H, W), t () or (N,) -> (N, num_classes).
    """

    config: ClassifierConfig
    denoises = False

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # recompute each stage in the backward pass
        first = config.encoder
        self.time_embed = embedder(first.time_width, first.emb_dim)
        self.input_blocks, self.middle_block, results = encoder(first)
        width = results[-1]
        features, classes = sum(results) + width, config.num_classes
        if config.pool in ("adaptive", "attention"):
            self.norm_out = GroupNorm(width, config.norm_groups, config.norm_eps)
        if config.pool == "adaptive":
            self.linear_out = zero_init(nn.Linear(width, classes))
        elif config.pool == "attention":
            assert config.sample_size is not None, "checked by the config"
            side = config.sample_size // first.downsample_factor
            self.pool = AttentionPool(side, width, first.heads(width), classes)
        else:
            self.hidden = nn.Linear(features, HIDDEN)
            if config.pool == "spatial_v2":
                self.norm_out = GroupNorm(HIDDEN, config.norm_groups, config.norm_eps)
            self.linear_out = nn.Linear(HIDDEN, classes)
        self.only_side = config.sample_size if config.pool == "attention" else None

    def embed(self, t: Tensor, y: Tensor | None = None, added: Tensor | None = None) -> Tensor:
        """See `Network.embed`; y and added must be None. Returns (N, E), activated."""
        if y is not None or added is not None:
            raise ValueError("a classifier takes no condition; leave y and added out")
        first = self.config.encoder
        emb = timestep_embedding(t, first.time_width, first.time_embedding)
        return F.silu(self.time_embed(emb.to(next(self.parameters()).dtype)))

    def check_input(self, x: Tensor, context: Tensor | Context | None) -> None:
        """Raise ValueError unless `body` can run on x: (N, in_channels, H, W), without context."""
        check_image(self.config, x, context)
        only = self.only_side
        if only is not None and x.shape[2:] != (only, only):
            raise ValueError(
                f"x must be {only} x {only} for this classifier, whose pool has one position "
                f"embedding per pixel, got {x.shape[2]} x {x.shape[3]}; resize the input"
            )

    def body(self, x: Tensor, emb: Tensor, context: Tensor | Context | None = None) -> Tensor:
        """The network after the embedding. x: (N, in_channels, H, W). Returns (N, num_classes)."""
        means: list[Tensor] = []
        spatial = self.config.pool.startswith("spatial")
        for stage in (*self.input_blocks, self.middle_block):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                addends, _ = checkpointed(stage, Addends(x), emb, [])
            else:
                addends, _ = stage(Addends(x), emb, [])
            x = addends.total()
            if spatial:
                means.append(x.mean(dim=(2, 3)))
        if spatial:
            return self._from_means(torch.cat(means, dim=1))
        x, _ = self.norm_out(x)  # (N, C, h, w)
        if self.config.pool == "attention":
            return self.pool(x)
        return self.linear_out(x.mean(dim=(2, 3)))

    def check_label(self, label: int) -> None:
        """Raise ValueError unless this is a class."""
        count = self.config.num_classes
        if not 0 <= label < count:
            raise ValueError(
                f"the label of a classifier's pull must be a class from 0 to {count - 1}, got "
                f"{label}; set label="
            )

    def log_prob(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """log p(y | x_t): (N,), at least fp32; an `Objective` of `fastdiff.diffusion.gradients`.

        x: (N, in_channels, H, W), any float dtype. t: (N,) timesteps. y: (N,) int64 classes.
        """
        logits: Tensor = self(x.to(next(self.parameters()).dtype), t)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits.log_softmax(1).gather(1, y[:, None])[:, 0]

    def _from_means(self, means: Tensor) -> Tensor:
        """(N, features) -> (N, num_classes)."""
        h = self.hidden(means)
        if self.config.pool == "spatial":
            return self.linear_out(F.relu(h))
        h, _ = self.norm_out(h[:, :, None, None])
        return self.linear_out(h.flatten(1))
