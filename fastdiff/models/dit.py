"""DiT: a vision transformer with adaptive norms, modulated by timestep and class.

Peebles & Xie 2023 (arXiv 2212.09748). x is cut into patches, one token each; position embeddings
are fixed sinusoids. In every block a linear layer on the embedding predicts the scale, shift and
gate of both branches (adaLN-Zero, section 3.2). That layer is initialized to zero, so that every
block starts as the identity.

    h = x + gate1 * attention(LN(x) * (1 + scale1) + shift1)
    y = h + gate2 * mlp(LN(h) * (1 + scale2) + shift2)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.kernels.ada_layer_norm import ada_layer_norm
from fastdiff.kernels.gate_residual import gate_residual
from fastdiff.models.layers import (
    GELUFeedForward,
    SelfAttention,
    checkpointed,
    from_patches,
    timestep_embedding,
    to_tokens,
    zero_init,
)
from fastdiff.models.network import (
    Context,
    Network,
    check_conditions,
    check_image,
    check_patches,
    embed_labels,
    register,
)

FREQUENCIES = 256
"""Width of the sinusoidal timestep embedding, independent of the width of the model."""
EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """The architecture of a `DiT`."""

    in_channels: int  # channels of x
    out_channels: int  # channels of the prediction; with learned_sigma twice those of x
    width: int  # width of a token, a multiple of 4
    depth: int  # number of blocks
    num_heads: int  # attention heads of every block; divides width
    patch_size: int = 2  # side of the square of pixels of x in a token
    sample_size: int = 32  # height and width of x in training, the scale of the positions
    mlp_ratio: float = 4.0  # width of the hidden layers relative to a token
    num_classes: int | None = None  # class labels 0 .. num_classes - 1
    null_class: bool = False  # one more label, index num_classes: "no class", for guidance
    learned_sigma: bool = False  # the second half of the output interpolates the log variance
    frequency_shift: int = 0  # shift of the timestep's frequencies; 1 in diffusers' DiT
    mlp_norm_eps: float = EPS  # epsilon of the norm before an MLP; 1e-5 in diffusers' DiT
    dropout: float = 0.0  # probability, after attention and inside MLPs

    def __post_init__(self) -> None:
        def require(holds: bool, message: str) -> None:
            if not holds:
                raise ValueError(f"DiTConfig: {message}")

        require(self.width % 4 == 0, f"width must be a multiple of 4, got {self.width}")
        check_patches(self, require)
        require(
            self.frequency_shift in (0, 1),
            f"frequency_shift must be 0 or 1, got {self.frequency_shift}",
        )
        require(self.mlp_norm_eps > 0, f"mlp_norm_eps must be positive, got {self.mlp_norm_eps}")

    @property
    def hidden(self) -> int:
        """Width of the hidden layers."""
        return int(self.width * self.mlp_ratio)

    @property
    def context_dim(self) -> None:
        return None

    @property
    def added_condition_dim(self) -> None:
        return None

    @property
    def size_multiple(self) -> int:
        return self.patch_size

    @property
    def num_blocks(self) -> int:
        return self.depth


def position_table(width: int, grid: tuple[int, int], base: int, device: torch.device) -> Tensor:
    """Fixed position embeddings of a grid of tokens: sinusoids of its columns and rows.

    Positions are scaled to the square grid that the model was trained on, so a finer grid has
    fractional positions. The first half of the width is [sin | cos] of the column, the second half
    of the row, with frequencies 10000^(-i / n) for i = 0 .. n - 1, n = width/4.

    grid: (h, w). base: tokens along a side in training. Returns (h*w, width) fp32 in row-major
    order. As in the published code, the table is computed in fp64 and rounded.
    """
    frequencies = torch.arange(width // 4, dtype=torch.float64, device=device) / (width / 4)
    frequencies = 1.0 / 10000**frequencies

    def along(count: int) -> Tensor:
        places = torch.arange(count, dtype=torch.float32, device=device) / (count / base)
        angles = torch.outer(places.double(), frequencies)
        return torch.cat([angles.sin(), angles.cos()], dim=1).float()  # (count, width/2)

    rows, columns = (along(count) for count in grid)
    table = torch.cat(
        [columns[None].expand(*grid, -1), rows[:, None].expand(*grid, -1)], dim=2
    )  # (h, w, width)
    return table.flatten(0, 1)


class DiTBlock(nn.Module):
    """Attention and MLP, each after an adaptive norm and before a gate (adaLN-Zero)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.mlp_norm_eps = config.mlp_norm_eps
        self.modulation = zero_init(nn.Linear(config.width, 6 * config.width))
        self.attn = SelfAttention(config.width, config.num_heads, bias=True)
        self.dropout = nn.Dropout(config.dropout)
        self.mlp = GELUFeedForward(
            config.width, config.hidden, approximate="tanh", dropout=config.dropout
        )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x: (N, L, C); emb: (N, C), activated -> (N, L, C)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(emb).chunk(6, dim=1)
        h = self.attn(ada_layer_norm(x, scale1, shift1, eps=EPS))
        x = gate_residual(self.dropout(h), gate1, x)
        h = self.mlp(ada_layer_norm(x, scale2, shift2, eps=self.mlp_norm_eps))
        return gate_residual(h, gate2, x)


@register(DiTConfig)
class DiT(Network):
    """Predict the noise (or v, or x0) in x at timestep t."""

    config: DiTConfig

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # recompute each block in the backward pass
        width, patch = config.width, config.patch_size
        self.patch_embed = nn.Conv2d(config.in_channels, width, patch, stride=patch)
        self.time_embed = nn.Sequential(
            nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width)
        )
        if config.num_classes is not None:
            self.label_embed = nn.Embedding(config.num_classes + config.null_class, width)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.modulation_out = nn.Linear(width, 2 * width)
        self.linear_out = nn.Linear(width, patch * patch * config.out_channels)
        self._initialize()

    def _initialize(self) -> None:
        """Initialize as published.

        Xavier for linear layers, std 0.02 for embeddings, and zeros for modulations and the output,
        so that every block starts as the identity.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.weight.flatten(1))
        assert self.patch_embed.bias is not None
        nn.init.zeros_(self.patch_embed.bias)
        for module in self.time_embed:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        if self.config.num_classes is not None:
            nn.init.normal_(self.label_embed.weight, std=0.02)
        for block in self.blocks:
            assert isinstance(block, DiTBlock)
            zero_init(block.modulation)
        zero_init(self.modulation_out)
        zero_init(self.linear_out)

    def embed(self, t: Tensor, y: Tensor | None = None, added: Tensor | None = None) -> Tensor:
        """See `Network.embed`. Returns (N, width), after the SiLU that starts every block."""
        check_conditions(self.config, len(t), y, added)
        emb = timestep_embedding(t, FREQUENCIES, "openai", self.config.frequency_shift)
        emb = self.time_embed(emb.to(self.linear_out.weight.dtype))  # (N, width)
        return F.silu(emb if y is None else emb + embed_labels(self.label_embed, y))

    def check_input(self, x: Tensor, context: Tensor | Context | None) -> None:
        """Raise ValueError unless `body` can run on x: (N, in_channels, H, W), without context."""
        check_image(self.config, x, context)

    def body(self, x: Tensor, emb: Tensor, context: Tensor | Context | None = None) -> Tensor:
        """See `Network.body`. x: (N, in_channels, H, W). Returns (N, out_channels, H, W)."""
        config, patch = self.config, self.config.patch_size
        grid = x.shape[2] // patch, x.shape[3] // patch
        positions = position_table(config.width, grid, config.sample_size // patch, x.device)
        h = to_tokens(self.patch_embed(x))  # (N, L, width)
        h = h + positions.to(h.dtype)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h = checkpointed(block, h, emb)
            else:
                h = block(h, emb)
        shift, scale = self.modulation_out(emb).chunk(2, dim=1)
        h = self.linear_out(ada_layer_norm(h, scale, shift, eps=EPS))  # (N, L, p*p*out_channels)
        return from_patches(h, grid, patch)
