"""ControlNet: a copy of a U-Net's encoder that reads a picture and adds to its skip connections.

Zhang et al. 2023 (arXiv 2302.05543), section 3. The copy runs on x plus an embedding of the
picture (the hint), and a 1x1 convolution, zero before training, follows each of its blocks:

    skip_i' = skip_i + s Z_i(h_i)        middle' = middle + s Z(h)                 (section 3.2)

with s the strength. Several ControlNets add the sum of their residuals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.models.layers import (
    Addends,
    ResBlock,
    SpatialTransformer,
    embedding_parameters,
    move_together,
    pointwise,
    project_contexts,
    project_embedding,
    zero_init,
)
from fastdiff.models.network import Context, Network, check_no_mask
from fastdiff.models.unet import (
    ContextKV,
    UNet,
    UNetConfig,
    added_embedder,
    condition_embedding,
    embedder,
    encoder,
    first_of,
)


@dataclass(frozen=True, kw_only=True)
class ControlNetConfig:
    """The architecture of a ControlNet."""

    encoder: UNetConfig  # the U-Net whose way down and middle it copies; it reads x alone
    image_channels: int = 3  # channels of the picture
    hint_channels: tuple[int, ...] = (16, 32, 96, 256)
    # widths of the picture's embedding; its sides are halved between two of them

    def __post_init__(self) -> None:
        def require(holds: bool, message: str) -> None:
            if not holds:
                raise ValueError(f"ControlNetConfig: {message}")

        first = self.encoder
        require(
            first.has_transformers,
            "the encoder must have cross-attention, got one without; a ControlNet is for models "
            "that read text",
        )
        require(
            first.num_classes is None,
            f"the encoder must have no classes, got {first.num_classes}",
        )
        require(
            self.image_channels > 0,
            f"image_channels must be positive, got {self.image_channels}",
        )
        require(
            bool(self.hint_channels) and min(self.hint_channels) > 0,
            f"hint_channels must be positive widths, got {self.hint_channels}",
        )

    @property
    def factor(self) -> int:
        """Ratio of the sides of the picture to those of x."""
        return 2 ** (len(self.hint_channels) - 1)

    @property
    def num_blocks(self) -> int:
        """Number of residual and transformer blocks."""
        return self.encoder.num_blocks


class HintEmbedding(nn.Module):
    """Convolutions that bring a picture to the size and width of the first level."""

    def __init__(self, image_channels: int, widths: Sequence[int], channels: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(image_channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for width, following in pairwise(widths):
            self.blocks.append(nn.Conv2d(width, width, 3, padding=1))
            self.blocks.append(nn.Conv2d(width, following, 3, padding=1, stride=2))
        self.conv_out = zero_init(nn.Conv2d(widths[-1], channels, 3, padding=1))

    def forward(self, picture: Tensor) -> Tensor:
        """picture: (N, image_channels, H, W) in [0, 1] -> (N, channels, h, w)."""
        x = F.silu(self.conv_in(picture))
        for block in self.blocks:
            x = F.silu(block(x))
        hint: Tensor = self.conv_out(x)
        return hint


class ControlNet(nn.Module):
    """What a picture adds to the skip connections and to the middle of a U-Net."""

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__()
        first = config.encoder
        self.config = config
        self.time_embed = embedder(first.time_width, first.emb_dim)
        if first.added_condition_dim is not None:
            self.added_embed = added_embedder(first)
        self.input_blocks, self.middle_block, widths = encoder(first)
        self.hint = HintEmbedding(config.image_channels, config.hint_channels, first.model_channels)
        self.zero_convs = nn.ModuleList(zero_init(nn.Conv2d(w, w, 1)) for w in widths)
        self.middle_out = zero_init(nn.Conv2d(widths[-1], widths[-1], 1))
        for index, transformer in enumerate(self.transformers()):
            transformer.index = index
        for index, block in enumerate(self.res_blocks()):
            block.index = index

    def transformers(self) -> list[SpatialTransformer]:
        """The spatial transformers, in the order in which they run."""
        return [b for b in self._blocks() if isinstance(b, SpatialTransformer)]

    def res_blocks(self) -> list[ResBlock]:
        """The residual blocks, in the order in which they run."""
        return [b for b in self._blocks() if isinstance(b, ResBlock)]

    def _blocks(self) -> list[nn.Module]:
        stages = *self.input_blocks, self.middle_block
        return [block for stage in stages for block in stage.children()]

    def together(self) -> list[list[Tensor]]:
        """Lists of parameters for `fastdiff.models.layers.move_together`."""
        layers = [layer for each in self.transformers() for layer in each.cross_attentions()]
        found = [[layer.kv.weight for layer in layers]]
        if not self.config.encoder.scale_shift_norm:
            found += embedding_parameters(self.res_blocks())
        return [parameters for parameters in found if parameters]

    def embed(self, t: Tensor, added: Tensor | None = None) -> Tensor:
        """(N,) timesteps and (N, added_condition_dim) -> (N, emb_dim), as `Network.embed`."""
        return condition_embedding(self, self.config.encoder, t, None, added)

    def project_context(self, context: Tensor) -> ContextKV:
        """(N, T, context_dim) -> keys and values, as `Network.project_context`."""
        transformers = self.transformers()
        layers = [layer for each in transformers for layer in each.cross_attentions()]
        kvs = iter(project_contexts(layers, context))
        return [[next(kvs) for _ in each.cross_attentions()] for each in transformers]

    def residuals(self, x: Tensor, emb: Tensor, context: ContextKV, hint: Tensor) -> list[Tensor]:
        """What is added, at strength 1, to each skip connection and to the middle.

        Args:
            x: (N, in_channels, h, w), the noisy latents.
            emb: (N, emb_dim), the result of `embed`.
            context: the result of `project_context`.
            hint: (N, model_channels, h, w), the result of `hint` for the picture.

        Returns:
            One (N, C, h', w') per input block, and one for the middle block.
        """
        projected = project_embedding(self.res_blocks(), emb)
        first, *rest = self.input_blocks
        state, results = Addends(first_of(first)(x), hint), list[Tensor]()
        stages = [*rest, self.middle_block]
        for stage, after in zip(stages, [*stages[1:], None], strict=True):
            following = None if after is None else first_of(after)
            state, total = stage(state, emb, context, following=following, projected=projected)
            results.append(total)  # what the stage was given, summed by its first norm
        results.append(state.total())
        convs = [*self.zero_convs, self.middle_out]
        return [pointwise(conv, result) for conv, result in zip(convs, results, strict=True)]


class Controlled(Network):
    """A U-Net with its ControlNets, of which each evaluation uses some, or none."""

    config: UNetConfig

    def __init__(self, unet: UNet, nets: Sequence[ControlNet]) -> None:
        super().__init__()
        self.config = unet.config
        self.unet, self.nets = unet, nn.ModuleList(nets)
        self.num_controls = len(nets)
        self._widths = [unet.config.emb_dim, *(net.config.encoder.emb_dim for net in nets)]

    def net(self, index: int) -> ControlNet:
        """One of the ControlNets."""
        found = self.nets[index]
        assert isinstance(found, ControlNet)
        return found

    def embed(self, t: Tensor, y: Tensor | None = None, added: Tensor | None = None) -> Tensor:
        """See `Network.embed`: the U-Net's embedding, then those of the ControlNets."""
        nets = [self.net(index).embed(t, added) for index in range(self.num_controls)]
        return torch.cat([self.unet.embed(t, y, added), *nets], dim=1)

    def project_context(self, context: Tensor, mask: Tensor | None = None) -> Context:
        """See `Network.project_context`: the U-Net's, then those of the ControlNets."""
        check_no_mask(mask)
        nets = [self.net(index).project_context(context) for index in range(self.num_controls)]
        return [self.unet.project_context(context), *nets]

    def _own(self, emb: Tensor, context: Tensor | Context | None) -> tuple[Tensor, ContextKV]:
        """The U-Net's part of the embedding and of the projected context."""
        if isinstance(context, Tensor):
            context = self.project_context(context)
        assert context is not None, "networks with ControlNets read text"
        return emb[:, : self._widths[0]].contiguous(), context[0]  # type: ignore[return-value]

    def check_input(self, x: Tensor, context: Tensor | Context | None) -> None:
        """See `Network.check_input`."""
        self.unet.check_input(x, context)

    def body(self, x: Tensor, emb: Tensor, context: Tensor | Context | None = None) -> Tensor:
        """See `Network.body`: the U-Net alone."""
        return self.unet.body(x, *self._own(emb, context))

    def body_controlled(
        self,
        x: Tensor,
        emb: Tensor,
        context: Context,
        used: Sequence[int],
        hints: Sequence[Tensor],
        scales: Tensor,
    ) -> Tensor:
        """See `Network.body_controlled`."""
        embs = emb.split(self._widths, dim=1)
        total: list[Tensor] = []
        for index, hint in zip(used, hints, strict=True):
            net = self.net(index)
            own: ContextKV = context[1 + index]  # type: ignore[assignment]
            latents = x[:, : net.config.encoder.in_channels]  # the others are of inpainting
            found = net.residuals(latents, embs[1 + index].contiguous(), own, hint)
            scale = scales[:, index, None, None, None]
            scaled = [(residual * scale).to(residual.dtype) for residual in found]
            pairs = zip(total, scaled, strict=True)
            total = [one + other for one, other in pairs] if total else scaled
        return self.unet.body_adding(x, *self._own(emb, context), total)

    @property
    def shares_prefix(self) -> bool:
        """See `Network.shares_prefix`."""
        return self.unet.shares_prefix

    def body_of_pairs(self, x: Tensor, emb: Tensor, context: Tensor | Context) -> Tensor:
        """See `Network.body_of_pairs`."""
        return self.unet.body_of_pairs(x, *self._own(emb, context))

    @property
    def branches(self) -> int:
        """See `Network.branches`."""
        return self.unet.branches

    def deep_shape(self, branch: int, sides: Sequence[int]) -> tuple[int, ...]:
        """See `Network.deep_shape`."""
        return self.unet.deep_shape(branch, sides)

    def body_keeping(
        self, x: Tensor, emb: Tensor, context: Tensor | Context | None, branches: Sequence[int]
    ) -> tuple[Tensor, list[Tensor]]:
        """See `Network.body_keeping`."""
        return self.unet.body_keeping(x, *self._own(emb, context), branches)

    def shallow(
        self, x: Tensor, emb: Tensor, context: Tensor | Context | None, branch: int, deep: Tensor
    ) -> Tensor:
        """See `Network.shallow`."""
        return self.unet.shallow(x, *self._own(emb, context), branch, deep)

    def pack(self) -> None:
        """See `Network.pack`: of the ControlNets; the U-Net is a network of its own."""
        for index in range(self.num_controls):
            for parameters in self.net(index).together():
                move_together(parameters)


def with_controlnets(denoiser: Network, nets: Sequence[ControlNet]) -> Network:
    """A denoiser with ControlNets; the denoiser itself without any."""
    if not nets:
        return denoiser
    assert isinstance(denoiser, UNet), "checked when the model was loaded"
    return Controlled(denoiser, nets)
