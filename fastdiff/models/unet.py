"""One U-Net for DDPM, IDDPM, ADM, GLIDE, unCLIP, latent diffusion and Stable Diffusion 1, 2 and XL.

Ho et al. 2020 (arXiv 2006.11239), Nichol & Dhariwal 2021 (2102.09672), Dhariwal & Nichol 2021
(2105.05233), Nichol et al. 2021 (2112.10741), Ramesh et al. 2022 (2204.06125), Rombach et al. 2022
(2112.10752), Podell et al. 2023 (2307.01952). They differ only in their `UNetConfig`. Parameters
are named after OpenAI's flat lists: `input_blocks.N.M`, `middle_block.M`, `output_blocks.N.M`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.configs import LATER
from fastdiff.models.layers import (
    Addends,
    AttentionBlock,
    CrossAttention,
    Downsample,
    DownsampleMean,
    DownsamplePadding,
    GroupNorm,
    ResBlock,
    SpatialTransformer,
    TimeEmbedding,
    Upsample,
    UpsampleNearest,
    checkpointed,
    embedding_parameters,
    move_together,
    norm_first,
    project_contexts,
    project_embedding,
    repeated,
    run_before_norm,
    timestep_embedding,
    zero_init,
)
from fastdiff.models.network import (
    Context,
    Network,
    check_conditions,
    check_image,
    check_no_mask,
    embed_labels,
    register,
)
from fastdiff.names import QKVOrder

ContextKV = list[list[Tensor]]
# per transformer, per block: (N, T, 2, H, d); per attention with appended tokens: that, and a mask
ContextAttention = Literal["cross", "appended"]

_CHOICES = {
    "context_attention": get_args(ContextAttention),
    "downsample_padding": get_args(DownsamplePadding),
    "time_embedding": get_args(TimeEmbedding),
    "qkv_order": get_args(QKVOrder),
}


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The architecture of a U-Net. A level is a resolution; level 0 is the finest."""

    in_channels: int  # channels of x, image or latent, plus channels concatenated to it
    out_channels: int  # channels of the prediction; with learned_sigma twice those of the image
    model_channels: (
        int  # width of the first convolution; level i has model_channels * channel_mult[i]
    )
    channel_mult: tuple[int, ...]  # one factor per level
    num_res_blocks: int  # residual blocks per level on the way down; one more on the way up
    attention_depth: tuple[int, ...]  # per level: 0 none; with context_dim k transformer blocks
    middle_depth: int = 1  # attention depth of the middle block
    num_heads: int | None = None  # heads of every attention; give this or head_dim
    head_dim: int | None = None  # width of a head; give this or num_heads
    context_dim: int | None = None  # width of context tokens; turns attention into transformers
    added_condition_dim: int | None = None  # width of the vector added to the time embedding (SDXL)
    num_classes: int | None = None  # class labels 0 .. num_classes - 1
    null_class: bool = False  # one more label, index num_classes: "no class", for guidance
    scale_shift_norm: bool = False  # the embedding scales and shifts the second norm
    resblock_updown: bool = False  # residual blocks change the resolution instead of convolutions
    downsample_padding: DownsamplePadding = "symmetric"  # asymmetric: DDPM
    time_embedding: TimeEmbedding = "openai"  # see `layers.timestep_embedding`
    timestep_scale: float = 1.0  # factor of t; IDDPM's rescale_timesteps: 1000 / T
    qkv_order: QKVOrder = "new"  # rows of packed qkv weights: new (3, H, d), legacy (H, 3, d)
    learned_sigma: bool = False  # the second half of the output interpolates the log variance
    norm_groups: int = 32  # groups of every GroupNorm
    norm_eps: float = 1e-5  # epsilon of every GroupNorm except the transformers' (1e-6)
    dropout: float = 0.0  # probability, in residual blocks and feed-forwards
    num_heads_upsample: int | None = field(default=None, metadata=LATER)
    # heads on the way up (IDDPM's option of the same name); None: num_heads
    time_channels: int | None = field(default=None, metadata=LATER)
    # width of the sinusoids, a quarter of the embedding's (ADM-512: 256); None: model_channels
    conv_resample: bool = field(default=True, metadata=LATER)
    # convolutions change the resolution; False: means of 2x2 and nearest neighbours do
    context_attention: ContextAttention = field(default="cross", metadata=LATER)
    # cross: transformers (LDM); appended: self-attention over pixels and tokens (GLIDE, unCLIP)
    added_layers: int = field(default=2, metadata=LATER)
    # linear layers from the added vector to the time embedding: SDXL 2, GLIDE 1, unCLIP 0
    self_attention: tuple[bool, ...] = field(default=(), metadata=LATER)
    # per level: False where transformers have a second cross-attention in place of self-attention
    # (Stable Diffusion's x4-upscaler); empty: self-attention everywhere

    def __post_init__(self) -> None:
        def require(holds: bool, message: str) -> None:
            if not holds:
                raise ValueError(f"UNetConfig: {message}")

        levels = len(self.channel_mult)
        require(levels > 0, "channel_mult must have at least one level, got ()")
        require(
            len(self.attention_depth) == levels,
            f"attention_depth must have {levels} entries, one per level of channel_mult, "
            f"got {self.attention_depth}",
        )
        for name in (
            "in_channels",
            "out_channels",
            "model_channels",
            "num_res_blocks",
            "norm_groups",
        ):
            value = getattr(self, name)
            require(value > 0, f"{name} must be positive, got {value}")
        for name in (
            "num_heads",
            "num_heads_upsample",
            "head_dim",
            "context_dim",
            "added_condition_dim",
            "num_classes",
            "time_channels",
        ):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} must be None or positive, got {value}")
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            require(value in choices, f"{name} must be one of {choices}, got {value!r}")
        require(
            min(self.channel_mult) > 0, f"channel_mult must be positive, got {self.channel_mult}"
        )
        require(
            0 < self.timestep_scale < float("inf"),
            f"timestep_scale must be positive, got {self.timestep_scale}",
        )
        require(self.norm_eps > 0, f"norm_eps must be positive, got {self.norm_eps}")
        require(
            self.model_channels % self.norm_groups == 0,
            f"norm_groups must divide model_channels, got {self.norm_groups} and "
            f"{self.model_channels}",
        )
        depths = (*self.attention_depth, self.middle_depth)
        require(min(depths) >= 0, f"attention depths must be 0 or more, got {depths}")
        require(
            self.has_transformers or max(depths) <= 1,
            f"attention depths must be 0 or 1 without context_dim, and with context_attention "
            f"'appended', got {depths}; set context_dim for transformers of more blocks",
        )
        require(
            self.context_attention == "cross" or self.context_dim is not None,
            f"context_attention {self.context_attention!r} needs context_dim, got None",
        )
        require(
            len(self.self_attention) in (0, levels),
            f"self_attention must be empty or have {levels} entries, one per level, got "
            f"{self.self_attention}",
        )
        require(
            all(self.self_attention) or self.has_transformers,
            f"self_attention {self.self_attention} needs transformers; set context_dim",
        )
        require(
            self.added_layers in (0, 1, 2),
            f"added_layers must be 0, 1 or 2, got {self.added_layers}",
        )
        require(
            self.added_layers > 0 or self.added_condition_dim in (None, self.emb_dim),
            f"added_condition_dim must be {self.emb_dim} without added_layers, got "
            f"{self.added_condition_dim}",
        )
        require(
            (self.num_heads is None) != (self.head_dim is None),
            f"give one of num_heads and head_dim, got {self.num_heads} and {self.head_dim}",
        )
        require(
            self.num_heads_upsample is None or self.num_heads is not None,
            f"num_heads_upsample needs num_heads, got {self.num_heads_upsample} with head_dim "
            f"{self.head_dim}",
        )
        name = "model_channels" if self.time_channels is None else "time_channels"
        require(self.time_width % 2 == 0, f"{name} must be even, got {self.time_width}")
        require(
            self.conv_resample or not self.resblock_updown,
            "conv_resample=False has no meaning with resblock_updown=True, whose residual blocks "
            "change the resolution; leave it out",
        )
        require(
            not self.null_class or self.num_classes is not None,
            "null_class needs num_classes, got None",
        )
        require(
            not self.learned_sigma or self.out_channels % 2 == 0,
            f"out_channels must be even with learned_sigma, got {self.out_channels}",
        )
        require(0 <= self.dropout < 1, f"dropout must be in [0, 1), got {self.dropout}")
        for width, depth in zip(
            (*self.widths, self.widths[-1]), (*self.attention_depth, self.middle_depth), strict=True
        ):
            require(
                width % self.norm_groups == 0,
                f"norm_groups must divide every level's width, got {self.norm_groups} and {width}",
            )
            split = self.num_heads or self.head_dim or 1
            require(
                depth == 0 or width % split == 0,
                f"num_heads or head_dim must divide the width {width} of a level, got {split}",
            )
        for width, depth in zip(self.widths, self.attention_depth, strict=True):
            split = self.num_heads_upsample or 1
            require(
                depth == 0 or width % split == 0,
                f"num_heads_upsample must divide the width {width} of a level, got {split}",
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.model_channels * factor for factor in self.channel_mult)

    @property
    def has_transformers(self) -> bool:
        """Whether attention is in `SpatialTransformer`s rather than in `AttentionBlock`s."""
        return self.context_dim is not None and self.context_attention == "cross"

    @property
    def time_width(self) -> int:
        """Width of the sinusoids from which the time embedding is computed."""
        return self.model_channels if self.time_channels is None else self.time_channels

    @property
    def emb_dim(self) -> int:
        """Width of the time embedding."""
        return 4 * self.time_width

    @property
    def downsample_factor(self) -> int:
        """Ratio between the sides of the input and those of the coarsest level."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def size_multiple(self) -> int:
        """H and W must be multiples of this; symmetrically padded convolutions halve any size."""
        convolutions = self.conv_resample and not self.resblock_updown
        convolutions = convolutions and self.downsample_padding == "symmetric"
        return 1 if convolutions else self.downsample_factor

    @property
    def num_blocks(self) -> int:
        """Number of residual and transformer blocks on the way down and in the middle."""
        down = sum(1 + depth for depth in self.attention_depth)
        return self.num_res_blocks * down + self.middle_depth

    def attends_to_itself(self, level: int) -> bool:
        """Whether the transformers of a level have self-attention."""
        return not self.self_attention or self.self_attention[level]

    def heads(self, width: int, *, up: bool = False) -> int:
        """Number of heads of an attention over `width` channels; up: whether on the way up."""
        if up and self.num_heads_upsample is not None:
            return self.num_heads_upsample
        if self.num_heads is not None:
            return self.num_heads
        assert self.head_dim is not None
        return width // self.head_dim


class Stage(nn.ModuleList):
    """A sequence of blocks of the U-Net; sums of addends are only computed where needed."""

    def forward(
        self,
        given: Addends,
        emb: Tensor,
        kvs: ContextKV,
        *,
        following: nn.Module | None = None,
        size: tuple[int, int] | None = None,
        projected: Sequence[Tensor] | None = None,
        skip: Tensor | None = None,
    ) -> tuple[Addends, Tensor]:
        """Run the blocks.

        following: the block that takes the result; None: something else, which adds no bias.
        size: (H, W) of the next skip connection, to which x is upsampled.
        projected: the result of `project_embedding` for all residual blocks of the U-Net.
        skip: (N, C2, H, W), concatenated to what is given; the first block is then a `ResBlock`.

        Returns:
            The stage's result as addends, and the sum of the given ones.
        """
        blocks, total, first = list(self), given.x, True
        for block, after in zip(blocks, [*blocks[1:], following], strict=True):
            before_norm = after is not None and norm_first(after)
            x, residual, bias = given
            if isinstance(block, ResBlock):
                own = None if projected is None else projected[block.index]
                options: dict[str, Any] = {"before_norm": before_norm}
                options["projected"] = None if own is None else rows_for(own, len(x))
                given, x = block(
                    x, residual, rows_for(emb, len(x)), bias=bias, skip=skip, **options
                )
                skip = None
            elif isinstance(block, AttentionBlock):
                read = [] if block.context_kv is None else kvs[block.index]
                given, x = block(x, residual, *read, bias=bias, before_norm=before_norm)
            elif isinstance(block, SpatialTransformer):
                kv = kvs[block.index]
                given, x = block(x, residual, kv, bias=bias, before_norm=before_norm)
            else:
                x = given.total()
                assert before_norm or not isinstance(block, Upsample)
                given = run_before_norm(block, x, size) if before_norm else Addends(block(x))
            total, first = (x if first else total), False
        return given, total


def rows_for(rows: Tensor, count: int) -> Tensor:
    """A row per sample, (count, C), of rows that are `fastdiff.models.layers.repeated` or not yet;
    of a single row (C,), which all samples share."""
    if len(rows) == count:
        return rows
    return rows[0] if len(rows) == 1 else rows[:: len(rows) // count].contiguous()


def first_of(stage: nn.Module) -> nn.Module:
    """The block that a stage begins with."""
    return next(stage.children())


def embedder(in_features: int, width: int) -> nn.Sequential:
    """Two linear layers that embed a timestep's sinusoids, or an added vector."""
    return nn.Sequential(nn.Linear(in_features, width), nn.SiLU(), nn.Linear(width, width))


def added_embedder(config: UNetConfig) -> nn.Module:
    """The layers that embed the added vector."""
    assert config.added_condition_dim is not None
    if config.added_layers == 0:
        return nn.Identity()
    if config.added_layers == 1:
        return nn.Linear(config.added_condition_dim, config.emb_dim)
    return embedder(config.added_condition_dim, config.emb_dim)


def res_block(
    config: UNetConfig,
    in_channels: int,
    out_channels: int,
    direction: Literal["up", "down"] | None = None,
) -> nn.Module:
    """A residual block; direction: whether it also doubles or halves H and W."""
    return ResBlock(
        in_channels,
        out_channels,
        num_groups=config.norm_groups,
        eps=config.norm_eps,
        emb_dim=config.emb_dim,
        scale_shift_norm=config.scale_shift_norm,
        dropout=config.dropout,
        resample=direction,
    )


def attention(
    config: UNetConfig,
    width: int,
    depth: int,
    *,
    up: bool = False,
    self_attention: bool = True,
) -> list[nn.Module]:
    """The attention after a residual block; empty for depth 0."""
    if depth == 0:
        return []
    heads, groups = config.heads(width, up=up), config.norm_groups
    if not config.has_transformers:
        return [
            AttentionBlock(
                width,
                heads,
                num_groups=groups,
                eps=config.norm_eps,
                qkv_order=config.qkv_order,
                context_dim=config.context_dim,
            )
        ]
    assert config.context_dim is not None
    return [
        SpatialTransformer(
            width,
            config.context_dim,
            heads,
            depth=depth,
            num_groups=groups,
            dropout=config.dropout,
            self_attention=self_attention,
        )
    ]


def resample(config: UNetConfig, width: int, direction: Literal["up", "down"]) -> nn.Module:
    """The block between two levels."""
    if config.resblock_updown:
        return res_block(config, width, width, direction)
    if not config.conv_resample:
        return UpsampleNearest() if direction == "up" else DownsampleMean()
    if direction == "up":
        return Upsample(width)
    return Downsample(width, config.downsample_padding)


def condition_embedding(
    layers: Any, config: UNetConfig, t: Tensor, y: Tensor | None, added: Tensor | None
) -> Tensor:
    """`UNet.embed` with the layers `time_embed`, `label_embed` and `added_embed` of a module."""
    check_conditions(config, len(t), y, added)
    dtype = layers.time_embed[0].weight.dtype
    if config.timestep_scale != 1:
        t = t.float() * config.timestep_scale
    emb = timestep_embedding(t, config.time_width, config.time_embedding)
    emb = layers.time_embed(emb.to(dtype))  # (N, emb_dim)
    if y is not None:
        emb = emb + embed_labels(layers.label_embed, y)
    if added is not None:
        emb = emb + layers.added_embed(added.to(dtype))
    return F.silu(emb)


def encoder(config: UNetConfig) -> tuple[nn.ModuleList, Stage, list[int]]:
    """The way down and the middle: input blocks, middle block, and the width of each input block's
    result."""
    widths, last = config.widths, len(config.widths) - 1
    width = config.model_channels
    blocks = nn.ModuleList([Stage([nn.Conv2d(config.in_channels, width, 3, padding=1)])])
    results = [width]
    for level, depth in enumerate(config.attention_depth):
        itself = config.attends_to_itself(level)
        for _ in range(config.num_res_blocks):
            stage = [
                res_block(config, width, widths[level]),
                *attention(config, widths[level], depth, self_attention=itself),
            ]
            blocks.append(Stage(stage))
            width = widths[level]
            results.append(width)
        if level < last:
            blocks.append(Stage([resample(config, width, "down")]))
            results.append(width)
    middle = Stage(
        [
            res_block(config, width, width),
            *attention(config, width, config.middle_depth),
            res_block(config, width, width),
        ]
    )
    return blocks, middle, results


@register(UNetConfig)
class UNet(Network):
    """Predict the noise (or v, or x0) in x at timestep t.

    Memory format: if x and the weights are channels_last, so is every activation.
    """

    config: UNetConfig

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # recompute each stage in the backward pass
        self.time_embed = embedder(config.time_width, config.emb_dim)
        if config.num_classes is not None:
            self.label_embed = nn.Embedding(config.num_classes + config.null_class, config.emb_dim)
        if config.added_condition_dim is not None:
            self.added_embed = added_embedder(config)

        widths, last = config.widths, len(config.widths) - 1
        self.input_blocks, self.middle_block, skips = encoder(config)
        width = widths[-1]

        self.output_blocks = nn.ModuleList()
        self._deep: list[tuple[int, int]] = []  # per branch: channels and level of its features
        for level in reversed(range(last + 1)):
            depth, itself = config.attention_depth[level], config.attends_to_itself(level)
            for index in range(config.num_res_blocks + 1):
                self._deep.insert(0, (width, level))
                stage = [
                    res_block(config, width + skips.pop(), widths[level]),
                    *attention(config, widths[level], depth, up=True, self_attention=itself),
                ]
                width = widths[level]
                if level > 0 and index == config.num_res_blocks:
                    stage.append(resample(config, width, "up"))
                self.output_blocks.append(Stage(stage))

        self.norm_out = GroupNorm(width, config.norm_groups, config.norm_eps)
        self.conv_out = nn.Conv2d(width, config.out_channels, 3, padding=1)
        zero_init(self.conv_out)
        for index, reader in enumerate(self.readers()):
            reader.index = index
        for index, block in enumerate(self.res_blocks()):
            block.index = index

    def transformers(self) -> list[SpatialTransformer]:
        """The spatial transformers, in the order in which they run."""
        return [b for b in self._blocks() if isinstance(b, SpatialTransformer)]

    def readers(self) -> list[SpatialTransformer | AttentionBlock]:
        """The blocks that read the context, in the order in which they run."""
        return [
            block
            for block in self._blocks()
            if isinstance(block, SpatialTransformer)
            or (isinstance(block, AttentionBlock) and block.context_kv is not None)
        ]

    def cross_attentions(self) -> list[CrossAttention]:
        """The layers of transformers that read the context, in the order in which they run."""
        return [layer for each in self.transformers() for layer in each.cross_attentions()]

    def res_blocks(self) -> list[ResBlock]:
        """The residual blocks, in the order in which they run."""
        return [b for b in self._blocks() if isinstance(b, ResBlock)]

    def _blocks(self) -> list[nn.Module]:
        stages = *self.input_blocks, self.middle_block, *self.output_blocks
        return [block for stage in stages for block in cast(Stage, stage)]

    def together(self) -> list[list[Tensor]]:
        """Those of `project_contexts` and, without FiLM, of `project_embedding`."""
        found = [[layer.kv.weight for layer in self.cross_attentions()]]
        if not self.config.scale_shift_norm:
            found += embedding_parameters(self.res_blocks())
        return [parameters for parameters in found if parameters]

    def pack(self) -> None:
        """See `Network.pack`."""
        for parameters in self.together():
            move_together(parameters)

    def embed(self, t: Tensor, y: Tensor | None = None, added: Tensor | None = None) -> Tensor:
        """Combine everything that conditions the residual blocks into one vector per sample.

        It does not depend on x, so the runtime computes it once for all rows of a sampler's table.

        Args:
            t: (N,) timesteps, integer or real.
            y: (N,) int64 class labels, or weights of a mixture; None for a model without classes.
            added: (N, added_condition_dim); None for a model without it.

        Returns:
            (N, emb_dim), after the SiLU that every residual block would apply first.

        Raises:
            ValueError: a condition is missing, not supported, or of the wrong shape.
        """
        return condition_embedding(self, self.config, t, y, added)

    def project_context(self, context: Tensor, mask: Tensor | None = None) -> ContextKV:
        """Keys and values of every block that reads the context; they do not depend on the step.

        Args:
            context: (N, T, context_dim).
            mask: (N, T) bool, False for padding; only with `context_attention="appended"`.

        Returns:
            The keys and values (and the mask), which `forward` accepts in place of `context`.
        """
        width = self.config.context_dim
        if width is None:
            raise ValueError("context must be None for a model without context; leave it out")
        if context.ndim != 3 or context.shape[2] != width:
            raise ValueError(
                f"context must be (N, T, {width}), got {tuple(context.shape)}; "
                "use the text encoder that the model was trained with"
            )
        if not self.config.has_transformers:
            blocks = [block for block in self.readers() if isinstance(block, AttentionBlock)]
            also = [] if mask is None else [mask]
            return [[block.project(context), *also] for block in blocks]
        check_no_mask(mask)
        kvs = iter(project_contexts(self.cross_attentions(), context))
        return [[next(kvs) for _ in each.cross_attentions()] for each in self.transformers()]

    def check_input(self, x: Tensor, context: Tensor | Context | None) -> None:
        """Raise ValueError unless `body` can run on x: (N, in_channels, H, W) and this context."""
        check_image(self.config, x, context)

    def body(self, x: Tensor, emb: Tensor, context: Tensor | Context | None = None) -> Tensor:
        """The network after the embedding.

        Args:
            x: (N, in_channels, H, W).
            emb: (N, emb_dim), the result of `embed`.
            context: as in `forward`.
        """
        return self.body_keeping(x, emb, context, ())[0]

    def body_adding(
        self, x: Tensor, emb: Tensor, context: Tensor | Context | None, residuals: Sequence[Tensor]
    ) -> Tensor:
        """`body` with a ControlNet's residuals: one per input block, added to the skip connection
        that it leads to, and a last one, added to the middle block's result."""
        projected = project_embedding(self.res_blocks(), emb)
        return self._whole(x, emb, context, (), projected, residuals)[0]

    @property
    def shares_prefix(self) -> bool:
        """See `Network.shares_prefix`."""
        return self.config.has_transformers

    def body_of_pairs(self, x: Tensor, emb: Tensor, context: Tensor | Context) -> Tensor:
        """See `Network.body_of_pairs`: before the first cross-attention every block sees N rows."""
        if len(x) > 1:
            emb = repeated(emb, 2 * len(x))
        projected = project_embedding(self.res_blocks(), emb)
        if projected is None:
            emb = repeated(emb, 2 * len(x))
        return self._whole(x, emb, context, (), projected)[0]

    @property
    def branches(self) -> int:
        """See `Network.branches`: the number of skip connections."""
        return len(self.output_blocks)

    def deep_shape(self, branch: int, sides: Sequence[int]) -> tuple[int, ...]:
        """See `Network.deep_shape`."""
        channels, level = self._deep[branch]
        for _ in range(level):
            sides = [-(-side // 2) for side in sides]
        return channels, *sides

    def body_keeping(
        self, x: Tensor, emb: Tensor, context: Tensor | Context | None, branches: Sequence[int]
    ) -> tuple[Tensor, list[Tensor]]:
        """See `Network.body_keeping`."""
        projected = project_embedding(self.res_blocks(), emb)
        return self._whole(x, emb, context, branches, projected)

    def _whole(
        self,
        x: Tensor,
        emb: Tensor,
        context: Tensor | Context | None,
        branches: Sequence[int],
        projected: list[Tensor] | None,
        residuals: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """`body_keeping` with the embedding's projections, which one row may serve for all.

        residuals: as for `body_adding`.
        """
        run = self._runner(emb, context, projected)
        skips: list[Tensor] = []
        state, stages = Addends(x), [*self.input_blocks, self.middle_block]
        for stage, after in zip(stages, [*stages[1:], self.output_blocks[0]], strict=True):
            state, total = run(stage, state, following=first_of(after))
            skips.append(total)  # what the stage was given, summed by its first norm
        if residuals is not None:
            *more, middle = residuals
            skips[1:] = [skip + extra for skip, extra in zip(skips[1:], more, strict=True)]
            state = Addends(state.total() + middle)
        return self._up(run, state, skips, branches)

    def shallow(
        self, x: Tensor, emb: Tensor, context: Tensor | Context | None, branch: int, deep: Tensor
    ) -> Tensor:
        """See `Network.shallow`."""
        run = self._runner(emb, context, None)
        skips: list[Tensor] = []
        state, stages = Addends(x), self.input_blocks[: branch + 1]
        for stage, after in zip(stages, [*stages[1:], None], strict=True):
            state, total = run(stage, state, following=None if after is None else first_of(after))
            skips.append(total)
        return self._up(run, Addends(deep), [*skips, state.total()], ())[0]

    def _runner(
        self, emb: Tensor, context: Tensor | Context | None, projected: list[Tensor] | None
    ) -> Callable[..., tuple[Addends, Tensor]]:
        """`_run` with what all stages are given."""
        if isinstance(context, Tensor):
            context = self.project_context(context)
        kvs = cast(ContextKV, context or [])
        return functools.partial(self._run, emb=emb, kvs=kvs, projected=projected)

    def _up(
        self,
        run: Callable[..., tuple[Addends, Tensor]],
        state: Addends,
        skips: list[Tensor],
        branches: Sequence[int],
    ) -> tuple[Tensor, list[Tensor]]:
        """The blocks on the way up that the skip connections lead to, and the output.

        skips: what the stages on the way down were given, from x on, and the last one's result.
        branches: those whose inputs are returned as well.
        """
        kept: dict[int, Tensor] = {}
        stages = [*self.output_blocks][-(len(skips) - 1) :]
        firsts = [first_of(stage) for stage in stages]
        for stage, following in zip(stages, [*firsts[1:], self.norm_out], strict=True):
            if (branch := len(skips) - 2) in branches:
                state = Addends(state.total())
                kept[branch] = state.x
            skip = skips.pop()
            last = len(skips) == 1  # the network's input, which no stage reads
            size = None if last else (skips[-1].shape[2], skips[-1].shape[3])
            skip = repeated(skip, len(state.x))
            state, _ = run(stage, state, following=following, size=size, skip=skip)
        x, _ = self.norm_out(state.x, residual=state.residual, channel_add=state.bias)
        return self.conv_out(x), [kept[branch] for branch in branches]  # (N, out_channels, H, W)

    def _run(self, stage: nn.Module, given: Addends, **options: Any) -> tuple[Addends, Tensor]:
        emb, kvs = options.pop("emb"), options.pop("kvs")
        run = functools.partial(stage, **options)
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpointed(run, given, emb, kvs)
        return run(given, emb, kvs)
